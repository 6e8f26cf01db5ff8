/* Whole contiguous rows with nothing fused: the three passes back to back while the row is in the
 * nearest cache. */

#define rows_pass FSM_NAME(rows_pass)
#define map_and_max FSM_NAME(map_and_max)
#define rows_long FSM_NAME(rows_long)
#define rows_long_to FSM_NAME(rows_long_to)
#define rows_long_any FSM_NAME(rows_long_any)
#define rows_short FSM_NAME(rows_short)
#define rows_all FSM_NAME(rows_all)
#define transpose_in FSM_NAME(transpose_in)
#define transpose_out FSM_NAME(transpose_out)
#define fill_row FSM_NAME(fill_row)
#define fuse_rows FSM_NAME(fuse_rows)
#define fuse_rows_as FSM_NAME(fuse_rows_as)
#define finish_pass FSM_NAME(finish_pass)
#define exp_array FSM_NAME(exp_array)

FSM_INLINE void finish_pass(fsm_op op, fsm_state *st) {
    if (op == FSM_SOFTMAX) finish_softmax(st);
    else if (op == FSM_LOG_SOFTMAX) finish_log_softmax(st);
    else finish_logsumexp(st);
}

static void fill_row(fsm_dtype dtype, char *out, ptrdiff_t n, real value) {
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_as(dtype, out, i, n - i < VL ? n - i : VL, v_set1(value));
}

/* The map of a row, from x or e, bound by its stores, and the max of another, bound by its loads, in
 * one loop: they run at once. */
FSM_INLINE real map_and_max(int log, fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x,
                            fsm_dtype next_dtype, const void *next, ptrdiff_t n, map_ref map) {
    const map_vref mr = {v_set1(map.a), v_set1(map.b)};
    running_max m = max_begin();
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            const vec a = load_as(dtype, x, i + j * VL, VL, v_set1(0));
            max_add(&m, j, load_as(next_dtype, next, i + j * VL, VL, v_set1(0)));
            store_as(out_dtype, out, i + j * VL, VL, map_vec(log, a, mr));
        }
    for (; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        max_add(&m, 0, load_as(next_dtype, next, i, k, v_set1(-INFINITY)));
        store_as(out_dtype, out, i, k, map_vec(log, load_as(dtype, x, i, k, v_set1(0)), mr));
    }
    return max_end(&m, next_dtype, next, n);
}

/* Long rows, a block of them at a time: within a pass the rows do not wait for each other's
 * reductions, the constants of the block are computed as vectors, and while the results of one block
 * are stored the next one comes from memory. Returns how many rows have no finite maximum; softmax
 * and log_softmax have filled them with NaN. */
FSM_INLINE ptrdiff_t rows_long(fsm_op op, fsm_dtype out_dtype, fsm_dtype x_dtype,
                               const fsm_rows *w) {
    const ptrdiff_t fitting = FSM_BLOCK / w->n;
    const int block = fitting > FSM_LANES ? FSM_LANES : fitting > 1 ? (int)fitting : 1;
    const int fine = w->n > EXACT_COARSE, log = op == FSM_LOG_SOFTMAX;
    const int in_out = out_dtype == REAL_DTYPE; /* exp goes to out, else to scratch, or nowhere */
    ptrdiff_t special = 0;
    fsm_state st;
    real next_max[FSM_LANES];
    for (int l = 0; l < block && l < w->rows; l++)
        next_max[l] = row_max(x_dtype, w->x + l * w->x_stride, w->n);
    for (ptrdiff_t r = 0; r < w->rows; r += block) {
        const int rows = w->rows - r < block ? (int)(w->rows - r) : block;
        begin_state(&st, rows, w->n);
        memcpy(LANE(st.max), next_max, (size_t)rows * sizeof(real));
        reference_pass(&st);
        special += st.special;
        real *e[FSM_LANES];
        for (int l = 0; l < rows; l++) {
            e[l] = op != FSM_SOFTMAX ? NULL
                   : in_out          ? (real *)(w->out + (r + l) * w->out_stride)
                   : w->scratch      ? (real *)w->scratch + l * w->n
                                     : NULL;
            row_sum(x_dtype, e[l], w->x + (r + l) * w->x_stride, w->n, row_ref(&st, l), &st.sum, l,
                    fine);
        }
        finish_pass(op, &st);
        if (op == FSM_LOGSUMEXP)
            store_run(w->out + r * w->out_stride, w->out_stride, out_dtype, LANE(st.value[0]),
                      rows);
        for (int l = 0; l < rows; l++) {
            const char *x = w->x + (r + l) * w->x_stride, *next = x + block * w->x_stride;
            char *out = w->out + (r + l) * w->out_stride;
            const map_ref map = {LANE(st.value[0])[l], LANE(st.value[1])[l]};
            const int more = r + l + block < w->rows;
            if (more && log)
                next_max[l] = map_and_max(1, out_dtype, out, x_dtype, x, x_dtype, next, w->n, map);
            else if (more && e[l])
                next_max[l] =
                    map_and_max(0, out_dtype, out, REAL_DTYPE, e[l], x_dtype, next, w->n, map);
            else {
                if (e[l])
                    row_map(out_dtype, out, REAL_DTYPE, e[l], w->n, 0, 0, row_ref(&st, l), map);
                else if (op != FSM_LOGSUMEXP)
                    row_map(out_dtype, out, x_dtype, x, w->n, log, !log, row_ref(&st, l), map);
                if (more) next_max[l] = row_max(x_dtype, next, w->n);
            }
            if (op != FSM_LOGSUMEXP && LANE(st.max)[l] - LANE(st.max)[l] != 0)
                fill_row(out_dtype, out, w->n, NAN);
        }
    }
    return special;
}

/* `rows` rows of n elements into a tile of `lanes` lanes, and back, in squares of VL; lanes without
 * a row become 0. */
FSM_INLINE void transpose_in(real *tile, int lanes, const char *x, ptrdiff_t stride,
                             fsm_dtype dtype, int rows, ptrdiff_t n) {
    for (int g = 0; g < lanes; g += VL)
        for (ptrdiff_t i = 0; i < n; i += VL) {
            const ptrdiff_t k = n - i < VL ? n - i : VL;
            vec a[VL];
            for (int l = 0; l < VL; l++)
                a[l] = g + l < rows ? load_as(dtype, x + (g + l) * stride, i, k, v_set1(0))
                                    : v_set1(0);
            v_transpose(a);
            for (int l = 0; l < VL; l++)
                if (l < k) v_store(tile + (i + l) * lanes + g, a[l]);
        }
}

FSM_INLINE void transpose_out(const real *tile, int lanes, char *out, ptrdiff_t stride,
                              fsm_dtype dtype, int rows, ptrdiff_t n) {
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

/* Rows of a few elements: a vector along one would be mostly empty and its reductions would cost
 * more than the row. Lanes are rows. Returns what rows_long does. */
FSM_INLINE ptrdiff_t rows_short(fsm_op op, const fsm_rows *w, fsm_dtype x_dtype,
                                fsm_dtype out_dtype) {
    ptrdiff_t special = 0;
    fsm_state st;
    real tile[FSM_SHORT_ROW * FSM_LANES];
    for (ptrdiff_t r = 0; r < w->rows; r += FSM_LANES) {
        const int rows = w->rows - r < FSM_LANES ? (int)(w->rows - r) : FSM_LANES;
        const int lanes = (rows + FSM_LANE_QUANTUM - 1) / FSM_LANE_QUANTUM * FSM_LANE_QUANTUM;
        char *out = w->out + r * w->out_stride;
        fsm_tile t = {
            .n = w->n, .x = tile, .x_dtype = REAL_DTYPE, .out = tile, .out_dtype = REAL_DTYPE};
        if (op == FSM_SOFTMAX) t.e = tile;
        transpose_in(tile, lanes, w->x + r * w->x_stride, w->x_stride, x_dtype, rows, w->n);
        begin_state(&st, lanes, w->n);
        max_pass(&st, &t);
        reference_pass(&st);
        special += st.special;
        sum_pass(&st, &t);
        finish_pass(op, &st);
        if (op == FSM_LOGSUMEXP) {
            store_run(out, w->out_stride, out_dtype, LANE(st.value[0]), rows);
            continue;
        }
        if (op == FSM_SOFTMAX) map_softmax(&st, &t);
        else map_log_softmax(&st, &t);
        transpose_out(tile, lanes, out, w->out_stride, out_dtype, rows, w->n);
        for (int l = 0; l < rows && st.special; l++)
            if (LANE(st.max)[l] - LANE(st.max)[l] != 0)
                fill_row(out_dtype, out + l * w->out_stride, w->n, NAN);
    }
    return special;
}

FSM_INLINE ptrdiff_t rows_long_to(fsm_op op, fsm_dtype out_dtype, const fsm_rows *w) {
#define CALL(DTYPE) return rows_long(op, out_dtype, DTYPE, w)
    SWITCH_DTYPE(w->x_dtype, CALL);
#undef CALL
}

FSM_INLINE ptrdiff_t rows_long_any(fsm_op op, const fsm_rows *w) {
#define CALL(DTYPE) return rows_long_to(op, DTYPE, w)
    SWITCH_DTYPE(w->out_dtype, CALL);
#undef CALL
}

static ptrdiff_t rows_all(fsm_op op, const fsm_rows *w) {
    const int is_short = w->n <= FSM_SHORT_ROW && w->rows >= 4;
#define CALL(OP) \
    return is_short ? rows_short(OP, w, w->x_dtype, w->out_dtype) : rows_long_any(OP, w)
    if (op == FSM_SOFTMAX) CALL(FSM_SOFTMAX);
    if (op == FSM_LOG_SOFTMAX) CALL(FSM_LOG_SOFTMAX);
    CALL(FSM_LOGSUMEXP);
#undef CALL
}

/* ---- what is fused into the reading of whole rows ---- */

FSM_INLINE void fuse_rows_as(real *z, const fsm_fuse *f, fsm_dtype dtype, int biased, int hiding) {
    for (ptrdiff_t r = 0; r < f->rows; r++, z += f->n) {
        const char *x = f->x + r * f->x_stride;
        const real *add = (const real *)f->additive + r * f->additive_row;
        real scale = 1;
        if (f->scale) memcpy(&scale, f->scale + r * f->scale_stride, sizeof scale);
        const vec s = v_set1(scale), least = v_set1(LEAST), excluded = v_set1(-INFINITY);
        for (ptrdiff_t i = 0; i < f->n; i += VL) {
            const ptrdiff_t k = f->n - i < VL ? f->n - i : VL;
            vec a = load_as(dtype, x, i, k, v_set1(0)), b = v_set1(0);
            if (hiding) b = load_as(REAL_DTYPE, add, i, k, v_set1(0));
            a = biased ? v_fma(a, s, b) : v_mul(a, s);
            if (hiding) a = v_if_less(b, least, excluded, a);
            store_as(REAL_DTYPE, z, i, k, a);
        }
    }
}

/* z = fma(x, scale, additive), -inf where additive is. */
static void fuse_rows(void *z, const fsm_fuse *f) {
#define CALL(DTYPE)                                      \
    if (!f->additive) fuse_rows_as(z, f, DTYPE, 0, 0);   \
    else if (f->biased) fuse_rows_as(z, f, DTYPE, 1, 1); \
    else fuse_rows_as(z, f, DTYPE, 0, 1)
    SWITCH_DTYPE(f->x_dtype, CALL);
#undef CALL
}

static void exp_array(void *out, const void *x, ptrdiff_t n) {
    const exp_vref r = exp_broadcast(exp_reference(0, EXP_RANGE));
    for (ptrdiff_t i = 0; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        store_as(REAL_DTYPE, out, i, k, exp_vec(load_as(REAL_DTYPE, x, i, k, v_set1(0)), r, 0));
    }
}
