/* Rows side by side, their elements a stride apart (softmax along an axis that is not the last), with
 * nothing fused: up to FSM_LANES of them are copied while their maximum is taken, and stored by the
 * last pass. Steps of a power of two would put all of a column into a few sets of the cache, so it
 * is touched once only.
 *
 * The tile is panels of VL rows, element i of row l of one at [i * VL + l], so that each pass reads
 * a stream. At [i * lanes + l] a vector of rows has a quarter of the lines, in a quarter of the sets
 * of the cache (Zen 5, exp and sum of 1000 x 1024: 2.2 ns a vector, so and in one loop 1.5). */

#define columns_copy_as FSM_NAME(columns_copy_as)
#define columns_copy FSM_NAME(columns_copy)
#define panels_out FSM_NAME(panels_out)
#define panels_in FSM_NAME(panels_in)
#define columns_in_as FSM_NAME(columns_in_as)
#define columns_in FSM_NAME(columns_in)
#define columns_out_as FSM_NAME(columns_out_as)
#define columns_out FSM_NAME(columns_out)
#define columns_store_as FSM_NAME(columns_store_as)
#define columns_store FSM_NAME(columns_store)
#define columns_few FSM_NAME(columns_few)
#define columns_all FSM_NAME(columns_all)

/* `panels` panels from that of row g on, and the extrema of their rows; the last has k rows. */
FSM_INLINE void panels_in(fsm_dtype dtype, int panels, fsm_state *st, real *tile,
                          const fsm_columns *c, int g, int k) {
    enum { MOST = FSM_LANES / VL };
    const ptrdiff_t n = c->n, step = c->x_step; /* for the compiler the tile may be over *c */
    real *const max = LANE(st->max) + g, *const min = LANE(st->min) + g;
    const char *x = c->x;
    real *to = tile + g * n;
    vec m[MOST], low[MOST], s[MOST];
    for (int p = 0; p < panels; p++) {
        m[p] = v_load(max + p * VL);
        low[p] = v_load(min + p * VL);
        s[p] = v_set1(0);
    }
    for (ptrdiff_t i = 0; i < n; i++, x += step, to += VL)
        for (int p = 0; p < panels; p++) {
            const vec a = load_as(dtype, x, g + p * VL, p < panels - 1 ? VL : k, v_set1(0));
            v_store(to + p * n * VL, a);
            m[p] = v_max(a, m[p]);
            low[p] = v_min(a, low[p]);
            s[p] = v_add_m(a, s[p]);
        }
    for (int p = 0; p < panels; p++) {
        v_store(max + p * VL, v_add(m[p], v_set1(0)));
        v_store(min + p * VL, low[p]);
        lane_suspects(max + p * VL, VL, tile + (g + p * VL) * n, n, s[p]);
    }
}

/* Four panels side by side: with AVX-512 256 bytes of each element in a row, and of those that
 * follow the processor asks for the next lines itself. A panel after the other, 16 elements at a
 * time, reads 64 bytes and leaves; 2048 x 2048 took 1.4 times as long, asked for in advance or not. */
FSM_INLINE void columns_in_as(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
    int g = 0;
    for (; g + 4 * VL <= c->rows; g += 4 * VL) panels_in(dtype, 4, st, tile, c, g, VL);
    for (; g + 2 * VL <= c->rows; g += 2 * VL) panels_in(dtype, 2, st, tile, c, g, VL);
    for (; g < c->rows; g += VL)
        panels_in(dtype, 1, st, tile, c, g, c->rows - g < VL ? c->rows - g : VL);
}

FSM_APART void columns_in(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
#define CALL(DTYPE) columns_in_as(DTYPE, st, tile, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* Element by element: some of one panel, then of the next, is slower (1000 x 1024: 608 us for 415),
 * perhaps because two panels share each line of an out that is not aligned to them. */
FSM_INLINE void panels_out(fsm_dtype dtype, int rows, const fsm_state *st, const real *tile,
                           int log, const fsm_columns *c) {
    const ptrdiff_t n = c->n, step = c->out_step; /* for the compiler out may be over *c */
    char *out = c->out;
    map_vref map[FSM_LANES / VL];
    for (int p = 0; p * VL < rows; p++)
        map[p] =
            (map_vref){v_load(LANE(st->value[0]) + p * VL), v_load(LANE(st->value[1]) + p * VL)};
    for (ptrdiff_t i = 0; i < n; i++, out += step, tile += VL)
        for (int g = 0; g < rows; g += VL)
            store_as(dtype, out, g, rows - g < VL ? rows - g : VL,
                     map_vec(log, v_load(tile + g * n), map[g / VL]));
}

/* A full tile, unrolled, is 1.1 times as fast; of halves, 0.85 where a power of two lies between
 * their elements (1000 x 1024), 1.1 where not. */
FSM_INLINE void columns_out_as(fsm_dtype dtype, const fsm_state *st, const real *tile, int log,
                               const fsm_columns *c) {
    if (dtype == REAL_DTYPE && c->rows == FSM_LANES) panels_out(dtype, FSM_LANES, st, tile, log, c);
    else panels_out(dtype, c->rows, st, tile, log, c);
    for (int l = 0; l < c->rows && st->special; l++)
        for (ptrdiff_t i = 0; i < c->n && is_special(LANE(st->max)[l]); i++)
            store_as(dtype, c->out + i * c->out_step, l, 1, v_set1(NAN));
}

FSM_APART void columns_out(fsm_dtype dtype, const fsm_state *st, const real *tile, int log,
                           const fsm_columns *c) {
#define CALL(DTYPE)                                 \
    if (log) columns_out_as(DTYPE, st, tile, 1, c); \
    else columns_out_as(DTYPE, st, tile, 0, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* Columns of a few elements, at [i * lanes + l] of the tile. */
FSM_INLINE void columns_copy_as(fsm_dtype dtype, real *tile, int lanes, const fsm_columns *c) {
    const ptrdiff_t size = float_size(dtype);
    for (ptrdiff_t i = 0; i < c->n; i++) {
        const char *x = c->x + i * c->x_step;
        if (i + FSM_COLUMNS_AHEAD < c->n)
            for (int b = 0; b < c->rows * size; b += FSM_ALIGN)
                FSM_PREFETCH(x + FSM_COLUMNS_AHEAD * c->x_step + b);
        for (int g = 0; g < lanes; g += VL)
            v_store(tile + i * lanes + g,
                    load_as(dtype, x, g, c->rows - g < VL ? c->rows - g : VL, v_set1(0)));
    }
}

FSM_APART void columns_copy(fsm_dtype dtype, real *tile, int lanes, const fsm_columns *c) {
#define CALL(DTYPE) columns_copy_as(DTYPE, tile, lanes, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_INLINE void columns_store_as(fsm_dtype dtype, const real *tile, int lanes,
                                 const fsm_columns *c) {
    for (ptrdiff_t i = 0; i < c->n; i++)
        for (int g = 0; g < lanes; g += VL)
            store_as(dtype, c->out + i * c->out_step, g, c->rows - g < VL ? c->rows - g : VL,
                     v_load(tile + i * lanes + g));
}

FSM_APART void columns_store(fsm_dtype dtype, const real *tile, int lanes, const fsm_columns *c) {
#define CALL(DTYPE) columns_store_as(DTYPE, tile, lanes, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

static void columns_few(int lanes, const fsm_columns *c) {
    columns_copy(c->x_dtype, c->tile, lanes, c);
    few_softmax(c->tile, lanes, c->n);
    columns_store(c->out_dtype, c->tile, lanes, c);
}

static void columns_all(fsm_op op, const fsm_columns *c) {
    fsm_state st;
    real *tile = c->tile;
    const int lanes = (c->rows + VL - 1) / VL * VL;
    if (op == FSM_SOFTMAX && c->n <= FSM_SHORT_ROW) {
        columns_few(lanes, c);
        return;
    }
    begin_state(&st, lanes, c->n);
    columns_in(c->x_dtype, &st, tile, c);
    reference_pass(&st);
    lane_sum(&st, op == FSM_SOFTMAX ? tile : NULL, tile, c->n, 0, c->n * VL, VL);
    finish_pass(op, &st);
    if (op == FSM_SOFTMAX && !st.normal) { /* what is left is y - 0 - 0 */
        far_lanes(&st, tile, c->n, c->n * VL, VL);
        for (int l = 0; l < lanes; l++) LANE(st.value[0])[l] = LANE(st.value[1])[l] = 0;
    }
    if (op == FSM_LOGSUMEXP)
        store_run(c->out, float_size(c->out_dtype), c->out_dtype, LANE(st.value[0]), c->rows);
    else columns_out(c->out_dtype, &st, tile, op == FSM_LOG_SOFTMAX || !st.normal, c);
}
