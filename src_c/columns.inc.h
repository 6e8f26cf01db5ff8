/* Rows side by side, their elements a stride apart (softmax along an axis that is not the last), with
 * nothing fused: up to FSM_LANES of them are copied to a tile while their maximum is taken, and
 * stored from it by the last pass. Steps of a power of two would put all of a column into a few sets
 * of the cache, so it is touched once only, and asked for in advance. */

#define columns_in FSM_NAME(columns_in)
#define columns_out FSM_NAME(columns_out)
#define columns_of FSM_NAME(columns_of)
#define columns_of_any FSM_NAME(columns_of_any)
#define columns_all FSM_NAME(columns_all)

FSM_INLINE void columns_in(fsm_state *st, real *tile, fsm_dtype dtype, const fsm_columns *c) {
    const ptrdiff_t size = float_size(dtype);
    vec m[FSM_LANES / VL], low[FSM_LANES / VL], s[FSM_LANES / VL];
    for (int g = 0; g < st->lanes; g += VL) {
        m[g / VL] = v_set1(-INFINITY);
        low[g / VL] = v_set1(INFINITY);
        s[g / VL] = v_set1(0);
    }
    for (ptrdiff_t i = 0; i < c->n; i++) {
        const char *x = c->x + i * c->x_step;
        if (i + FSM_COLUMNS_AHEAD < c->n)
            for (int b = 0; b < c->rows * size; b += 64)
                FSM_PREFETCH(x + FSM_COLUMNS_AHEAD * c->x_step + b);
        for (int g = 0; g < st->lanes; g += VL) {
            const int k = c->rows - g;
            const vec a = k >= VL ? load_as(dtype, x, g, VL, v_set1(0))
                          : k > 0 ? load_as(dtype, x, g, k, v_set1(0))
                                  : v_set1(0);
            v_store(tile + i * st->lanes + g, a);
            m[g / VL] = v_max(a, m[g / VL]);
            low[g / VL] = v_min(a, low[g / VL]);
            s[g / VL] = v_add_m(a, s[g / VL]);
        }
    }
    for (int g = 0; g < st->lanes; g += VL) {
        v_store(LANE(st->max) + g, v_add(m[g / VL], v_set1(0)));
        v_store(LANE(st->min) + g, low[g / VL]);
        lane_suspects(LANE(st->max) + g, st->lanes, tile + g, c->n, s[g / VL]);
    }
}

FSM_INLINE void columns_out(const fsm_state *st, const real *tile, int log, fsm_dtype dtype,
                            const fsm_columns *c) {
    for (ptrdiff_t i = 0; i < c->n; i++)
        for (int g = 0; g < c->rows; g += VL) {
            const map_vref map = {v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)};
            const vec y = map_vec(log, v_load(tile + i * st->lanes + g), map);
            store_as(dtype, c->out + i * c->out_step, g, c->rows - g < VL ? c->rows - g : VL, y);
        }
    for (int l = 0; l < c->rows && st->special; l++)
        for (ptrdiff_t i = 0; i < c->n && is_special(st, l); i++)
            store_as(dtype, c->out + i * c->out_step, l, 1, v_set1(NAN));
}

FSM_INLINE void columns_of(fsm_op op, fsm_dtype x_dtype, const fsm_columns *c) {
    fsm_state st;
    real *tile = c->tile;
    begin_state(&st, (c->rows + FSM_LANE_QUANTUM - 1) / FSM_LANE_QUANTUM * FSM_LANE_QUANTUM, c->n);
    columns_in(&st, tile, x_dtype, c);
    const fsm_tile t = {.n = c->n, .x = tile, .e = op == FSM_SOFTMAX ? tile : NULL};
    reference_pass(&st);
    sum_pass(&st, &t);
    finish_pass(op, &st);
    if (op == FSM_LOGSUMEXP) {
        const ptrdiff_t size = float_size(c->out_dtype);
        store_run(c->out, size, c->out_dtype, LANE(st.value[0]), c->rows);
        return;
    }
#define CALL(DTYPE) columns_out(&st, tile, op == FSM_LOG_SOFTMAX, DTYPE, c)
    SWITCH_DTYPE(c->out_dtype, CALL);
#undef CALL
}

FSM_INLINE void columns_of_any(fsm_op op, const fsm_columns *c) {
#define CALL(DTYPE) columns_of(op, DTYPE, c)
    SWITCH_DTYPE(c->x_dtype, CALL);
#undef CALL
}

static void columns_all(fsm_op op, const fsm_columns *c) {
    if (op == FSM_SOFTMAX) columns_of_any(FSM_SOFTMAX, c);
    else if (op == FSM_LOG_SOFTMAX) columns_of_any(FSM_LOG_SOFTMAX, c);
    else columns_of_any(FSM_LOGSUMEXP, c);
}
