/* Rows side by side, their elements a stride apart (softmax along an axis that is not the last), with
 * nothing fused: up to FSM_LANES of them are copied to a tile while their maximum is taken, and
 * stored from it by the last pass. Steps of a power of two would put all of a column into a few sets
 * of the cache, so it is touched once only, and asked for in advance. */

#define columns_copy FSM_NAME(columns_copy)
#define columns_in_as FSM_NAME(columns_in_as)
#define columns_in FSM_NAME(columns_in)
#define columns_out_as FSM_NAME(columns_out_as)
#define columns_out FSM_NAME(columns_out)
#define columns_few_as FSM_NAME(columns_few_as)
#define columns_few_to FSM_NAME(columns_few_to)
#define columns_few FSM_NAME(columns_few)
#define columns_all FSM_NAME(columns_all)

/* Copies elements [begin, end) of the columns to the tile, and asks for those that follow. */
FSM_INLINE void columns_copy(fsm_dtype dtype, real *tile, int lanes, const fsm_columns *c,
                             ptrdiff_t begin, ptrdiff_t end) {
    const ptrdiff_t size = float_size(dtype);
    for (ptrdiff_t i = begin; i < end; i++) {
        const char *x = c->x + i * c->x_step;
        if (i + FSM_COLUMNS_AHEAD < c->n)
            for (int b = 0; b < c->rows * size; b += FSM_ALIGN)
                FSM_PREFETCH(x + FSM_COLUMNS_AHEAD * c->x_step + b);
        int g = 0;
        for (; g + VL <= c->rows; g += VL)
            v_store(tile + i * lanes + g, load_as(dtype, x, g, VL, v_set1(0)));
        for (; g < lanes; g += VL) {
            const int k = c->rows - g;
            v_store(tile + i * lanes + g, k > 0 ? load_as(dtype, x, g, k, v_set1(0)) : v_set1(0));
        }
    }
}

/* The tile, and the extrema of its lanes: some elements of each at a time are copied, and then looked
 * at while they are in the nearest cache. */
FSM_INLINE void columns_in_as(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
    enum { BLOCK = 16 };
    for (ptrdiff_t i = 0, end; i < c->n; i = end) {
        end = c->n - i < BLOCK ? c->n : i + BLOCK;
        columns_copy(dtype, tile, st->lanes, c, i, end);
        lane_span(LANE(st->max), LANE(st->min), st->lanes, tile + i * st->lanes, end - i);
    }
}

FSM_APART void columns_in(fsm_dtype dtype, fsm_state *st, real *tile, const fsm_columns *c) {
#define CALL(DTYPE) columns_in_as(DTYPE, st, tile, c)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_INLINE void columns_out_as(fsm_dtype dtype, const fsm_state *st, const real *tile, int log,
                               const fsm_columns *c) {
    for (ptrdiff_t i = 0; i < c->n; i++)
        for (int g = 0; g < c->rows; g += VL) {
            const map_vref map = {v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)};
            const vec y = map_vec(log, v_load(tile + i * st->lanes + g), map);
            store_as(dtype, c->out + i * c->out_step, g, c->rows - g < VL ? c->rows - g : VL, y);
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

/* Softmax of columns of a few elements. */
FSM_INLINE void columns_few_as(fsm_dtype x_dtype, fsm_dtype out_dtype, const fsm_columns *c) {
    const int lanes = (c->rows + VL - 1) / VL * VL;
    real *tile = c->tile;
    columns_copy(x_dtype, tile, lanes, c, 0, c->n);
    few_softmax(tile, lanes, c->n);
    for (ptrdiff_t i = 0; i < c->n; i++)
        for (int g = 0; g < lanes; g += VL) {
            const int k = c->rows - g < VL ? c->rows - g : VL;
            store_as(out_dtype, c->out + i * c->out_step, g, k, v_load(tile + i * lanes + g));
        }
}

FSM_INLINE void columns_few_to(fsm_dtype out_dtype, const fsm_columns *c) {
#define CALL(DTYPE) columns_few_as(DTYPE, out_dtype, c)
    SWITCH_DTYPE(c->x_dtype, CALL);
#undef CALL
}

FSM_APART void columns_few(const fsm_columns *c) {
#define CALL(DTYPE) columns_few_to(DTYPE, c)
    SWITCH_DTYPE(c->out_dtype, CALL);
#undef CALL
}

static void columns_all(fsm_op op, const fsm_columns *c) {
    fsm_state st;
    real *tile = c->tile;
    if (op == FSM_SOFTMAX && c->n <= FSM_SHORT_ROW) {
        columns_few(c);
        return;
    }
    begin_state(&st, (c->rows + FSM_LANE_QUANTUM - 1) / FSM_LANE_QUANTUM * FSM_LANE_QUANTUM, c->n);
    columns_in(c->x_dtype, &st, tile, c);
    const fsm_tile t = {.n = c->n, .x = tile, .e = op == FSM_SOFTMAX ? tile : NULL};
    reference_pass(&st);
    sum_pass(&st, &t);
    finish_pass(op, &st);
    if (op == FSM_LOGSUMEXP)
        store_run(c->out, float_size(c->out_dtype), c->out_dtype, LANE(st.value[0]), c->rows);
    else columns_out(c->out_dtype, &st, tile, op == FSM_LOG_SOFTMAX, c);
}
