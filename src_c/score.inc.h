/* What attention makes of a dot product, and who sees whom: the parts that many queries
 * (attention.inc.h) and one (decode.inc.h) share, for FSM_TYPE.
 *
 *     z = scale * q.k,  or softcap * tanh(scale * q.k / softcap)
 *     z = z + bias - slope * |position - key|
 *     z = -inf where the query does not see the key
 *     weight = 2^((z - max z) * c)
 *
 * Without softcap, bias, slopes and sinks, z stays the dot product itself and c = |scale| log2 e (q
 * takes the sign): the score is then never rounded to a multiple of scale, and what is subtracted
 * in z - max is exact to an ulp of the difference. Else c = log2 e. Scores may be anything;
 * differences of huge ones are what rounding left of them.
 *
 * A key that is not seen has the score -inf, whatever its dot product is, and the weight 0, exactly.
 * Its value may be NaN or inf, which times 0 is NaN: in blocks with keys that are not seen by all,
 * values that are not finite are replaced by 0, and the queries that do see them get them
 * afterwards (add_poison). */

#define score_rule FSM_NAME(score_rule)
#define row_view FSM_NAME(row_view)
#define make_rule FSM_NAME(make_rule)
#define rule_score FSM_NAME(rule_score)
#define rule_tanh FSM_NAME(rule_tanh)
#define tanh_vec FSM_NAME(tanh_vec)
#define at_row FSM_NAME(at_row)
#define view_of FSM_NAME(view_of)
#define sees FSM_NAME(sees)
#define sees_any FSM_NAME(sees_any)
#define element FSM_NAME(element)
#define load_additive FSM_NAME(load_additive)
#define fetch_rows FSM_NAME(fetch_rows)
#define fetch FSM_NAME(fetch)
#define rows_of FSM_NAME(rows_of)
#define all_finite FSM_NAME(all_finite)
#define without_poison FSM_NAME(without_poison)
#define sink_of FSM_NAME(sink_of)
#define end_sum FSM_NAME(end_sum)

/* ---- the score ---- */

typedef struct {
    int natural;     /* z is a score; else a dot product */
    int negate;      /* of q: the scale is below 0 */
    real scale, cap; /* cap = 0: none */
    real c;          /* 2^(c z) is the exp of the score */
    double unit;     /* z times this is the score */
    exp_vref at_zero;
} score_rule;

static score_rule make_rule(const fsm_attend *a) {
    const double size = fabs(a->scale);
    const real c = (real)(size * f64_LOG2E);
    score_rule r = {.scale = (real)a->scale, .cap = (real)a->softcap};
    r.natural =
        a->softcap != 0 || a->bias.at || a->slopes.at || a->sinks.at || c == 0 || c - c != 0;
    r.negate = !r.natural && a->scale < 0;
    r.c = r.natural ? LOG2E : c;
    r.unit = r.natural ? 1 : size;
    r.at_zero = exp_broadcast(exp_reference(0, EXP_RANGE));
    return r;
}

/* tanh y = -E / (2 + E), E = exp(-2|y|) - 1, which does not cancel: relative error 4 * 2^-24
 * (2^-53). NaN stays NaN. */
FSM_INLINE vec tanh_vec(vec y, exp_vref at_zero) {
    const exp_mid mid = exp_begin(v_mul(v_abs(y), v_set1(-2)), at_zero, 0, 0);
    const vec power = v_exp2(mid.n);
    const vec e = v_fma(exp_less_one(mid), power, v_sub(power, v_set1(1)));
    const vec t = v_div(e, v_add(v_set1(2), e)); /* of -|y| */
    return v_add(v_if_less(y, v_set1(0), t, v_sub(v_set1(0), t)), v_unless(y, y, y));
}

/* tanh(scale * q.k / softcap) */
FSM_INLINE vec rule_tanh(const score_rule *r, vec x) {
    return tanh_vec(v_div(v_mul(x, v_set1(r->scale)), v_set1(r->cap)), r->at_zero);
}

/* z of a dot product, but for visibility; distance = |position - key| */
FSM_INLINE vec rule_score(const score_rule *r, vec x, vec bias, vec slope, vec distance) {
    if (r->cap != 0) x = v_fma(v_set1(r->cap), rule_tanh(r, x), bias);
    else x = v_fma(x, v_set1(r->scale), bias);
    return v_fnma(slope, distance, x);
}

/* ---- who sees whom ---- */

/* One row: its head and query, where its mask and bias are, and the keys [lo, hi] that position and
 * length leave it. */
typedef struct {
    ptrdiff_t head, query;
    const char *mask, *bias;
    ptrdiff_t position, lo, hi;
} row_view;

FSM_INLINE char *element(const fsm_matrix *m, ptrdiff_t head, ptrdiff_t row, ptrdiff_t column) {
    return m->at ? m->at + head * m->head + row * m->row + column * m->column : NULL;
}

/* The row in a matrix, from a column on. */
FSM_INLINE char *at_row(const fsm_matrix *m, const row_view *view, ptrdiff_t column) {
    return element(m, view->head, view->query, column);
}

static row_view view_of(const fsm_attend *a, ptrdiff_t row) {
    const ptrdiff_t head = row / a->queries, query = row % a->queries, p = query + a->offset;
    row_view view = {.head = head,
                     .query = query,
                     .mask = element(&a->mask, head, query, 0),
                     .bias = element(&a->bias, head, query, 0),
                     .position = p,
                     .hi = a->length - 1};
    if (a->left >= 0 && p - a->left > 0) view.lo = p - a->left;
    if (a->right >= 0 && p + a->right < view.hi) view.hi = p + a->right;
    if (a->causal && p < view.hi) view.hi = p;
    if (view.lo > view.hi) { /* nothing */
        view.lo = a->keys;
        view.hi = -1;
    }
    return view;
}

static int sees(const fsm_attend *a, const row_view *view, ptrdiff_t key) {
    real bias = 0;
    if (key < view->lo || key > view->hi) return 0;
    if (view->bias) widen(&bias, view->bias + key * a->bias.column, 0, a->bias_dtype, 1);
    return bias != -INFINITY && (!view->mask || view->mask[key * a->mask.column]);
}

static int sees_any(const fsm_attend *a, const row_view *view) {
    for (ptrdiff_t j = view->lo; j <= view->hi; j++)
        if (sees(a, view, j)) return 1;
    return 0;
}

/* bias, or -inf where it or the mask hides the key, for n keys from `key` on; 0 where there is
 * neither. */
static void load_additive(const fsm_attend *a, const row_view *view, ptrdiff_t key, ptrdiff_t n,
                          real *to) {
    static const real none = 0;
    fsm_run run = {.x = (const char *)&none, .x_dtype = REAL_DTYPE, .excluded = -INFINITY};
    if (view->bias) {
        run.x = view->bias + key * a->bias.column;
        run.x_stride = a->bias.column;
        run.x_dtype = a->bias_dtype;
    }
    if (view->mask) {
        run.where = view->mask + key * a->mask.column;
        run.where_stride = a->mask.column;
    }
    load_run(to, &run, n);
}

static real sink_of(const fsm_attend *a, ptrdiff_t head) {
    real sink = -INFINITY;
    if (a->sinks.at) memcpy(&sink, element(&a->sinks, head, 0, 0), sizeof sink);
    return sink;
}

/* Returns the natural logarithm of a denominator, `sum` times exp of the maximum, if it is wanted, and
 * makes of *sum what to divide by: NaN if all that the row sees is -inf, 1 if it sees nothing. */
static real end_sum(const fsm_attend *a, const score_rule *r, const row_view *view, real max,
                    real *sum) {
    if (*sum > 0) return a->lse.at ? (real)log_scaled(*sum, 0, (double)max * r->unit) : 0;
    const real lse = *sum == 0 ? (real)-INFINITY : (real)NAN;
    const int blind = !sees_any(a, view);
    *sum = blind ? 1 : (real)NAN;
    return blind ? sink_of(a, view->head) : lse;
}

/* ---- reading ---- */

static void fetch_rows(real *to, const char *from, ptrdiff_t row, ptrdiff_t column, fsm_dtype dtype,
                       ptrdiff_t rows, ptrdiff_t columns) {
    const ptrdiff_t size = float_size(dtype);
    for (ptrdiff_t i = 0; i < rows; i++, from += row, to += columns) {
        if (column != size) {
            const fsm_run run = {.x = from, .x_stride = column, .x_dtype = dtype};
            load_run(to, &run, columns);
            continue;
        }
#define COPY(DTYPE)                                                            \
    for (ptrdiff_t d = 0; d < columns; d += VL) {                              \
        const ptrdiff_t k = columns - d < VL ? columns - d : VL;               \
        store_as(REAL_DTYPE, to, d, k, load_as(DTYPE, from, d, k, v_set1(0))); \
    }
        SWITCH_DTYPE(dtype, COPY);
#undef COPY
    }
}

/* Rows of k or v where they lie, or, if C cannot read them there, in `scratch`. */
typedef struct {
    const real *at;
    ptrdiff_t stride; /* in elements, from row to row */
} rows_of;

static rows_of fetch(const fsm_matrix *m, fsm_dtype dtype, ptrdiff_t row, ptrdiff_t rows,
                     ptrdiff_t columns, real *scratch) {
    const char *from = element(m, 0, row, 0);
    if (dtype == REAL_DTYPE && m->column == sizeof(real) && m->row % (ptrdiff_t)sizeof(real) == 0 &&
        (uintptr_t)from % sizeof(real) == 0)
        return (rows_of){(const real *)from, m->row / (ptrdiff_t)sizeof(real)};
    fetch_rows(scratch, from, m->row, m->column, dtype, rows, columns);
    return (rows_of){scratch, columns};
}

/* ---- poison ---- */

static int all_finite(rows_of v, ptrdiff_t rows, ptrdiff_t columns) {
    vec sum = v_set1(0);
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t d = 0; d < columns; d += VL) {
            const ptrdiff_t k = columns - d < VL ? columns - d : VL;
            const vec a = load_as(REAL_DTYPE, v.at + i * v.stride, d, k, v_set1(0));
            sum = v_add(sum, v_sub(a, a));
        }
    return v_hsum(sum) == 0;
}

static rows_of without_poison(rows_of v, ptrdiff_t rows, ptrdiff_t columns, real *scratch) {
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t d = 0; d < columns; d++) {
            const real a = v.at[i * v.stride + d];
            scratch[i * columns + d] = a - a == 0 ? a : 0;
        }
    return (rows_of){scratch, columns};
}
