/* Whole contiguous rows with nothing fused: the three passes back to back while the row is in the nearest cache. */

#define rows_pass FSM_NAME(rows_pass)
#define rows_long FSM_NAME(rows_long)
#define rows_short FSM_NAME(rows_short)
#define rows_all FSM_NAME(rows_all)
#define transpose_in FSM_NAME(transpose_in)
#define transpose_out FSM_NAME(transpose_out)
#define fill_row FSM_NAME(fill_row)
#define exp_array FSM_NAME(exp_array)

FSM_INLINE void rows_pass(fsm_op op, fsm_state *st, const fsm_tile *t, int map) {
    max_pass(st, t);
    reference_pass(st);
    sum_pass(st, t);
    if (op == FSM_SOFTMAX) finish_softmax(st);
    else if (op == FSM_LOG_SOFTMAX) finish_log_softmax(st);
    else finish_logsumexp(st);
    if (!map) return;
    if (op == FSM_SOFTMAX) map_softmax(st, t);
    else map_log_softmax(st, t);
}

static void fill_row(fsm_dtype dtype, char *out, ptrdiff_t n, real value) {
    for (ptrdiff_t i = 0; i < n; i += VL) store_as(dtype, out, i, n - i < VL ? n - i : VL, v_set1(value));
}

/* One row after the other. */
FSM_INLINE void rows_long(fsm_op op, const fsm_rows *w) {
    fsm_state st;
    real lse[FSM_LANES];
    for (ptrdiff_t r = 0, kept = 0; r < w->rows; r++) {
        char *out = w->out + r * w->out_stride;
        fsm_tile t = {.n = w->n, .x = w->x + r * w->x_stride, .x_dtype = w->x_dtype, .out = out, .out_dtype = w->out_dtype};
        if (r + 1 < w->rows) t.ahead = (const char *)t.x + w->x_stride;
        if (op == FSM_SOFTMAX) t.e = w->out_dtype == REAL_DTYPE ? (void *)out : w->scratch;
        begin_state(&st, 1, w->n);
        rows_pass(op, &st, &t, op != FSM_LOGSUMEXP);
        if (op == FSM_LOGSUMEXP) {
            lse[kept++] = LANE(st.value[0])[0];
            if (kept == FSM_LANES || r == w->rows - 1) {
                store_run(w->out + (r + 1 - kept) * w->out_stride, w->out_stride, w->out_dtype, lse, kept);
                kept = 0;
            }
        } else if (st.special) fill_row(w->out_dtype, out, w->n, NAN);
    }
}

/* `rows` rows of n elements into a tile of `lanes` lanes, and back, in squares of VL; lanes without a row become 0. */
FSM_INLINE void transpose_in(real *tile, int lanes, const char *x, ptrdiff_t stride, fsm_dtype dtype, int rows, ptrdiff_t n) {
    for (int g = 0; g < lanes; g += VL)
        for (ptrdiff_t i = 0; i < n; i += VL) {
            const ptrdiff_t k = n - i < VL ? n - i : VL;
            vec a[VL];
            for (int l = 0; l < VL; l++)
                a[l] = g + l < rows ? load_as(dtype, x + (g + l) * stride, i, k, v_set1(0)) : v_set1(0);
            v_transpose(a);
            for (int l = 0; l < VL; l++)
                if (l < k) v_store(tile + (i + l) * lanes + g, a[l]);
        }
}

FSM_INLINE void transpose_out(const real *tile, int lanes, char *out, ptrdiff_t stride, fsm_dtype dtype, int rows, ptrdiff_t n) {
    for (int g = 0; g < lanes; g += VL)
        for (ptrdiff_t i = 0; i < n; i += VL) {
            const ptrdiff_t k = n - i < VL ? n - i : VL;
            vec a[VL];
            for (int l = 0; l < VL; l++) a[l] = v_load(tile + (i + (l < k ? l : 0)) * lanes + g);
            v_transpose(a);
            for (int l = 0; l < VL; l++)
                if (g + l < rows) store_as(dtype, out + (g + l) * stride, i, k, a[l]);
        }
}

/* Rows of a few elements: a vector along one would be mostly empty and its reductions would cost more than the row. Lanes are rows. */
FSM_INLINE void rows_short(fsm_op op, const fsm_rows *w, fsm_dtype x_dtype, fsm_dtype out_dtype) {
    fsm_state st;
    real tile[FSM_SHORT_ROW * FSM_LANES];
    for (ptrdiff_t r = 0; r < w->rows; r += FSM_LANES) {
        const int rows = w->rows - r < FSM_LANES ? (int)(w->rows - r) : FSM_LANES;
        const int lanes = (rows + FSM_LANE_QUANTUM - 1) / FSM_LANE_QUANTUM * FSM_LANE_QUANTUM;
        char *out = w->out + r * w->out_stride;
        fsm_tile t = {.n = w->n, .x = tile, .x_dtype = REAL_DTYPE, .out = tile, .out_dtype = REAL_DTYPE};
        if (op == FSM_SOFTMAX) t.e = tile;
        transpose_in(tile, lanes, w->x + r * w->x_stride, w->x_stride, x_dtype, rows, w->n);
        begin_state(&st, lanes, w->n);
        rows_pass(op, &st, &t, op != FSM_LOGSUMEXP);
        if (op == FSM_LOGSUMEXP) {
            store_run(out, w->out_stride, out_dtype, LANE(st.value[0]), rows);
            continue;
        }
        transpose_out(tile, lanes, out, w->out_stride, out_dtype, rows, w->n);
        for (int l = 0; l < rows && st.special; l++)
            if (LANE(st.max)[l] - LANE(st.max)[l] != 0) fill_row(out_dtype, out + l * w->out_stride, w->n, NAN);
    }
}

static void rows_all(fsm_op op, const fsm_rows *w) {
    const int is_short = w->n <= FSM_SHORT_ROW && w->rows >= 4;
    switch (op) {
    case FSM_SOFTMAX: is_short ? rows_short(FSM_SOFTMAX, w, w->x_dtype, w->out_dtype) : rows_long(FSM_SOFTMAX, w); break;
    case FSM_LOG_SOFTMAX: is_short ? rows_short(FSM_LOG_SOFTMAX, w, w->x_dtype, w->out_dtype) : rows_long(FSM_LOG_SOFTMAX, w); break;
    default: is_short ? rows_short(FSM_LOGSUMEXP, w, w->x_dtype, w->out_dtype) : rows_long(FSM_LOGSUMEXP, w); break;
    }
}

static void exp_array(void *out, const void *x, ptrdiff_t n) {
    const exp_vref r = exp_broadcast(exp_reference(0, EXP_RANGE));
    for (ptrdiff_t i = 0; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        store_as(REAL_DTYPE, out, i, k, exp_vec(load_as(REAL_DTYPE, x, i, k, v_set1(0)), r, 0));
    }
}
