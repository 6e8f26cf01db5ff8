/* Rows of a few elements: a vector along one would be mostly empty, and its reductions would cost more
 * than the row. Lanes are rows. */

#define rows_short FSM_NAME(rows_short)
#define transpose_in_as FSM_NAME(transpose_in_as)
#define transpose_out_as FSM_NAME(transpose_out_as)
#define transpose_in FSM_NAME(transpose_in)
#define transpose_out FSM_NAME(transpose_out)
#define finish_pass FSM_NAME(finish_pass)
#define fill_row FSM_NAME(fill_row)
#define dtype_of FSM_NAME(dtype_of)
#define fuse_rows FSM_NAME(fuse_rows)
#define fuse_rows_as FSM_NAME(fuse_rows_as)
#define rows_at FSM_NAME(rows_at)
#define rows_from FSM_NAME(rows_from)
#define few_normalisers FSM_NAME(few_normalisers)
#define few_span FSM_NAME(few_span)
#define few_exp FSM_NAME(few_exp)
#define few_exp_normal FSM_NAME(few_exp_normal)
#define few_softmax FSM_NAME(few_softmax)
#define rows_few FSM_NAME(rows_few)

FSM_INLINE void finish_pass(fsm_op op, fsm_state *st) {
    if (op == FSM_SOFTMAX) finish_softmax(st);
    else if (op == FSM_LOG_SOFTMAX) finish_log_softmax(st);
    else finish_logsumexp(st);
}

static void fill_row(fsm_dtype dtype, char *out, ptrdiff_t n, real value) {
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_as(dtype, out, i, n - i < VL ? n - i : VL, v_set1(value));
}

/* ---- what is fused into the reading of rows ---- */

FSM_INLINE void fuse_rows_as(real *z, const fsm_rows *w, fsm_dtype dtype, ptrdiff_t first,
                             ptrdiff_t rows) {
    const fsm_fuse *f = w->fuse;
    const vec least = v_set1(LEAST), excluded = v_set1(-INFINITY);
    for (ptrdiff_t r = first; r < first + rows; r++, z += w->n) {
        const char *x = w->x + r * w->x_stride;
        const char *add = f->additive + r * f->additive_stride;
        real scale = 1;
        if (f->scale) memcpy(&scale, f->scale + r * f->scale_stride, sizeof scale);
        const vec s = v_set1(scale);
        FSM_UNROLL(2)
        for (ptrdiff_t i = 0; i < w->n; i += VL) {
            const ptrdiff_t k = w->n - i < VL ? w->n - i : VL;
            const vec a = load_as(dtype, x, i, k, v_set1(0)),
                      b = load_as(REAL_DTYPE, add, i, k, v_set1(0));
            store_as(REAL_DTYPE, z, i, k, v_if_less(b, least, excluded, v_fma(a, s, b)));
        }
    }
}

/* Rows from row `first` on into z. */
FSM_APART void fuse_rows(real *z, const fsm_rows *w, ptrdiff_t first, ptrdiff_t rows) {
#define CALL(DTYPE) fuse_rows_as(z, w, DTYPE, first, rows)
    SWITCH_DTYPE(w->x_dtype, CALL);
#undef CALL
}

typedef struct {
    const char *at;
    ptrdiff_t stride;
} rows_at;

/* As many rows, of the type dtype_of(w): where they lie, or fused. */
static rows_at rows_from(const fsm_rows *w, ptrdiff_t first, int rows) {
    if (!w->fuse) return (rows_at){w->x + first * w->x_stride, w->x_stride};
    fuse_rows(w->fuse->z, w, first, rows);
    return (rows_at){w->fuse->z, w->n * (ptrdiff_t)sizeof(real)};
}

FSM_INLINE fsm_dtype dtype_of(const fsm_rows *w) { return w->fuse ? REAL_DTYPE : w->x_dtype; }

/* ---- softmax of `lanes` rows side by side, which stay in the nearest cache ----
 *
 * Element i of row l lies at [i * lanes + l]; lanes is a multiple of VL. Each step is done for all
 * lanes before the next: the chain of steps is long, and those of the vectors overlap. */

/* Maxima, NaN where an element is NaN, and minima. */
FSM_INLINE void few_span(vec *max, vec *least, const real *tile, int lanes, ptrdiff_t n) {
    const vec zero = v_set1(0);
    vec sums = zero;
    for (int g = 0; g < lanes; g += VL) {
        vec most = v_set1(-INFINITY), min = v_set1(INFINITY), sum = zero;
        for (ptrdiff_t i = 0; i < n; i++) {
            const vec a = v_load(tile + i * lanes + g);
            most = v_max(a, most);
            min = v_min(a, min);
            sum = v_add_m(a, sum);
        }
        max[g / VL] = v_add(most, zero);
        least[g / VL] = min;
        sums = v_add(sums, sum);
    }
    const real total = v_hsum(sums);
    for (int g = 0; g < lanes && total != total; g += VL) { /* a suspicion only: inf - inf */
        vec odd = zero;
        for (ptrdiff_t i = 0; i < n; i++) {
            const vec a = v_load(tile + i * lanes + g);
            odd = v_add(odd, v_unless(a, a, v_set1(1)));
        }
        max[g / VL] = v_if_less(zero, odd, v_set1(NAN), max[g / VL]);
    }
}

/* `normaliser` of the sums of n terms. */
FSM_INLINE void few_normalisers(real *a, real *b, const vsum *s, int lanes, ptrdiff_t n) {
#if FSM_BITS == 32
    bits_t his[FSM_LANES], los[FSM_LANES];
    for (int g = 0; g < lanes; g += VL) {
        v_store_int(his + g, vsum_int(&s[g / VL], 0, n, 2));
        v_store_int(los + g, vsum_int(&s[g / VL], 1, n, 2));
    }
    for (int l = 0; l < lanes; l += f64_VL) {
        const f64_vec hi = f64_load_i32(his + l), lo = f64_load_i32(los + l);
        store_normalisers(a + l, b + l,
                          f64_fma(hi, f64_set1(0x1p-22), f64_mul(lo, f64_set1(0x1p-44))));
    }
#else
    fsm_exact_sum sum;
    for (int j = 0; j < FSM_PARTS; j++)
        for (int l = 0; l < lanes; l++) sum.parts[j][l] = 0;
    for (int g = 0; g < lanes; g += VL) lane_fold(&sum, g, &s[g / VL], n, 2, 0);
    for (int l = 0; l < lanes; l++) {
        const map_ref one = normaliser(&sum, l);
        a[l] = one.a;
        b[l] = one.b;
    }
#endif
}

FSM_INLINE void few_exp(real *tile, const vec *max, int lanes, ptrdiff_t n, int shift, int normal) {
    for (int g = 0; g < lanes; g += VL) {
        const exp_vref r = exp_references(max[g / VL]);
        exp_steps(tile + g, lanes, tile + g, lanes, n, r, shift, normal, NULL);
    }
}

FSM_APART void few_exp_normal(real *tile, vec *max, int lanes, ptrdiff_t n) {
    few_exp(tile, max, lanes, n, 0, 1);
}

/* In place. Returns how many rows have no finite maximum; they are NaN. */
static ptrdiff_t few_softmax(real *tile, int lanes, ptrdiff_t n) {
    const vec zero = v_set1(0), one = v_set1(1), infinity = v_set1(INFINITY);
    vec max[FSM_LANES / VL], finite[FSM_LANES / VL], least[FSM_LANES / VL];
    vec special = zero, far = zero;
    vsum sum[FSM_LANES / VL];
    real a[FSM_LANES], b[FSM_LANES];
    few_span(max, least, tile, lanes, n);
    for (int k = 0; k < lanes / VL; k++) {
        const vec size = v_abs(max[k]);
        finite[k] = v_if_less(size, infinity, max[k], zero);
        special = v_add(special, v_if_less(size, infinity, zero, one));
        far = v_add(far, v_if_less(size, v_set1(EXP_BIG), zero, one));
        far = v_add(far, v_if_less(v_sub(max[k], least[k]), v_set1(EXP_NORMAL), zero, one));
    }
    const int normal = v_hsum(far) == 0;
    if (normal) few_exp_normal(tile, finite, lanes, n);
    else few_exp(tile, finite, lanes, n, 1, 0);
    for (int g = 0; g < lanes; g += VL) {
        vsum s = vsum_zero();
        for (ptrdiff_t i = 0; i < n && normal; i++)
            vsum_add(&s, v_load(tile + i * lanes + g), 2, 1, 0);
        for (ptrdiff_t i = 0; i < n && !normal; i++)
            vsum_add(&s, v_load(tile + i * lanes + g), 2, 0, 0);
        sum[g / VL] = s;
    }
    few_normalisers(a, b, sum, lanes, n);
    for (int g = 0; g < lanes; g += VL) {
        const map_vref map = {v_load(a + g), v_load(b + g)};
        if (!normal) far_run(tile + g, lanes, n * VL, map);
        for (ptrdiff_t i = 0; i < n && normal; i++)
            v_store(tile + i * lanes + g, map_vec(0, v_load(tile + i * lanes + g), map));
    }
    const ptrdiff_t count = (ptrdiff_t)v_hsum(special);
    for (int g = 0; count && g < lanes; g += VL)
        for (ptrdiff_t i = 0; i < n; i++) {
            real *y = tile + i * lanes + g;
            v_store(y, v_if_less(v_abs(max[g / VL]), infinity, v_load(y), v_set1(NAN)));
        }
    return count;
}

/* ---- rows, transposed ---- */

/* `rows` rows of n elements into a tile of `lanes` lanes, and back, in squares of VL; lanes without
 * a row become 0. */
FSM_INLINE void transpose_in_as(fsm_dtype dtype, real *tile, int lanes, const char *x,
                                ptrdiff_t stride, int rows, ptrdiff_t n) {
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

FSM_APART void transpose_in(fsm_dtype dtype, real *tile, int lanes, const char *x, ptrdiff_t stride,
                            int rows, ptrdiff_t n) {
#define CALL(DTYPE) transpose_in_as(DTYPE, tile, lanes, x, stride, rows, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_INLINE void transpose_out_as(fsm_dtype dtype, const real *tile, int lanes, char *out,
                                 ptrdiff_t stride, int rows, ptrdiff_t n) {
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

FSM_APART void transpose_out(fsm_dtype dtype, const real *tile, int lanes, char *out,
                             ptrdiff_t stride, int rows, ptrdiff_t n) {
#define CALL(DTYPE) transpose_out_as(DTYPE, tile, lanes, out, stride, rows, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* Softmax. Returns what rows_long does. */
static ptrdiff_t rows_few(const fsm_rows *w) {
    real tile[FSM_SHORT_ROW * FSM_LANES];
    ptrdiff_t special = 0;
    for (ptrdiff_t r = 0; r < w->rows; r += FSM_LANES) {
        const int rows = w->rows - r < FSM_LANES ? (int)(w->rows - r) : FSM_LANES;
        const int lanes = (rows + VL - 1) / VL * VL;
        const rows_at in = rows_from(w, r, rows);
        transpose_in(dtype_of(w), tile, lanes, in.at, in.stride, rows, w->n);
        special += few_softmax(tile, lanes, w->n);
        transpose_out(w->out_dtype, tile, lanes, w->out + r * w->out_stride, w->out_stride, rows,
                      w->n);
    }
    return special;
}

/* The other operations. */
static ptrdiff_t rows_short(fsm_op op, const fsm_rows *w) {
    const fsm_dtype out_dtype = w->out_dtype;
    ptrdiff_t special = 0;
    fsm_state st;
    real tile[FSM_SHORT_ROW * FSM_LANES];
    for (ptrdiff_t r = 0; r < w->rows; r += FSM_LANES) {
        const int rows = w->rows - r < FSM_LANES ? (int)(w->rows - r) : FSM_LANES;
        const int lanes = (rows + FSM_LANE_QUANTUM - 1) / FSM_LANE_QUANTUM * FSM_LANE_QUANTUM;
        char *out = w->out + r * w->out_stride;
        fsm_tile t = {
            .n = w->n, .x = tile, .x_dtype = REAL_DTYPE, .out = tile, .out_dtype = REAL_DTYPE};
        const rows_at in = rows_from(w, r, rows);
        transpose_in(dtype_of(w), tile, lanes, in.at, in.stride, rows, w->n);
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
        map_log_softmax(&st, &t);
        transpose_out(out_dtype, tile, lanes, out, w->out_stride, rows, w->n);
        for (int l = 0; l < rows && st.special; l++)
            if (is_special(LANE(st.max)[l]))
                fill_row(out_dtype, out + l * w->out_stride, w->n, NAN);
    }
    return special;
}
