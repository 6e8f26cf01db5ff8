/* Rows side by side, their elements a stride apart (softmax along an axis that is not the last), with
 * nothing fused: up to FSM_LANES of them are copied while their maximum is taken, and stored by the
 * last pass. Steps of a power of two would put all of a column into a few sets of the cache, so it
 * is touched once only, and asked for in advance.
 *
 * The tile is panels of VL rows, element i of row l of one at [i * VL + l], so that each pass reads
 * a stream. At [i * lanes + l] a vector of rows has a quarter of the lines, in a quarter of the sets
 * of the cache (Zen 5, exp and sum of 1000 x 1024: 2.2 ns a vector, so and in one loop 1.5). */

#define columns_copy_as FSM_NAME(columns_copy_as)
#define columns_copy FSM_NAME(columns_copy)
#define columns_in_as FSM_NAME(columns_in_as)
#define columns_in FSM_NAME(columns_in)
#define columns_out_as FSM_NAME(columns_out_as)
#define columns_out FSM_NAME(columns_out)
#define columns_store_as FSM_NAME(columns_store_as)
#define columns_store FSM_NAME(columns_store)
#define columns_few FSM_NAME(columns_few)
#define columns_all FSM_NAME(columns_all)

/* The panels, and the extrema of their rows, some elements of each panel at a time. */
FSM_INLINE void columns_in_as(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
    enum { BLOCK = 16 };
    const ptrdiff_t size = float_size(dtype);
    real *const max = LANE(st->max), *const min = LANE(st->min), sum[FSM_LANES] = {0};
    for (ptrdiff_t i = 0, end; i < c->n; i = end) {
        end = c->n - i < BLOCK ? c->n : i + BLOCK;
        for (int g = 0; g < st->lanes; g += VL) {
            const int k = c->rows - g < VL ? c->rows - g : VL;
            vec m = v_load(max + g), low = v_load(min + g), s = v_load(sum + g);
            for (ptrdiff_t j = i; j < end; j++) {
                const char *x = c->x + j * c->x_step;
                if (j + FSM_COLUMNS_AHEAD < c->n)
                    FSM_PREFETCH(x + FSM_COLUMNS_AHEAD * c->x_step + g * size);
                const vec a = load_as(dtype, x, g, k, v_set1(0));
                v_store(tile + g * c->n + j * VL, a);
                m = v_max(a, m);
                low = v_min(a, low);
                s = v_add_m(a, s);
            }
            v_store(max + g, m);
            v_store(min + g, low);
            v_store(sum + g, s);
        }
    }
    for (int g = 0; g < st->lanes; g += VL) {
        v_store(max + g, v_add(v_load(max + g), v_set1(0)));
        lane_suspects(max + g, VL, tile + g * c->n, c->n, v_load(sum + g));
    }
}

FSM_APART void columns_in(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
#define CALL(DTYPE) columns_in_as(DTYPE, st, tile, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* Element by element: some of one panel, then of the next, is slower (1000 x 1024: 608 us for 415),
 * perhaps because two panels share each line of an out that is not aligned to them. */
FSM_INLINE void columns_out_as(fsm_dtype dtype, const fsm_state *st, const real *tile, int log,
                               const fsm_columns *c) {
    const ptrdiff_t n = c->n, step = c->out_step; /* for the compiler out may be over *c */
    const int rows = c->rows;
    char *out = c->out;
    for (ptrdiff_t i = 0; i < n; i++, out += step, tile += VL)
        for (int g = 0; g < rows; g += VL) {
            const map_vref map = {v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)};
            store_as(dtype, out, g, rows - g < VL ? rows - g : VL,
                     map_vec(log, v_load(tile + g * n), map));
        }
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
    lane_sum(&st, op == FSM_SOFTMAX ? tile : NULL, tile, c->n, c->n > EXACT_COARSE, c->n * VL, VL);
    finish_pass(op, &st);
    if (op == FSM_LOGSUMEXP)
        store_run(c->out, float_size(c->out_dtype), c->out_dtype, LANE(st.value[0]), c->rows);
    else columns_out(c->out_dtype, &st, tile, op == FSM_LOG_SOFTMAX, c);
}
