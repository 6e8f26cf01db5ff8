/* The passes of the softmax family (kernels.h), written once, for FSM_TYPE and the vectors of one
 * ISA.
 *
 * Two shapes of each pass: row_*, vectors along one row, and lane_*, vectors across rows. What an
 * element becomes is the same inline function in both, and the sums are exact, so both give the
 * same bits. */

#define max_pass FSM_NAME(max_pass)
#define lane_max FSM_NAME(lane_max)
#define lane_suspects FSM_NAME(lane_suspects)
#define running_max FSM_NAME(running_max)
#define max_begin FSM_NAME(max_begin)
#define max_add FSM_NAME(max_add)
#define max_end FSM_NAME(max_end)
#define row_max FSM_NAME(row_max)
#define row_max_as FSM_NAME(row_max_as)
#define row_sum FSM_NAME(row_sum)
#define row_sum_as FSM_NAME(row_sum_as)
#define row_map FSM_NAME(row_map)
#define row_map_as FSM_NAME(row_map_as)
#define row_map_to FSM_NAME(row_map_to)
#define lane_sum FSM_NAME(lane_sum)
#define lane_map FSM_NAME(lane_map)
#define map_ref FSM_NAME(map_ref)
#define map_vref FSM_NAME(map_vref)
#define map_vec FSM_NAME(map_vec)
#define normaliser FSM_NAME(normaliser)
#define lane_fold FSM_NAME(lane_fold)
#define lanes_of FSM_NAME(lanes_of)
#define row_ref FSM_NAME(row_ref)
#define set_ref FSM_NAME(set_ref)
#define reference_pass FSM_NAME(reference_pass)
#define sum_pass FSM_NAME(sum_pass)
#define finish_softmax FSM_NAME(finish_softmax)
#define finish_log_softmax FSM_NAME(finish_log_softmax)
#define finish_logsumexp FSM_NAME(finish_logsumexp)
#define map_softmax FSM_NAME(map_softmax)
#define map_log_softmax FSM_NAME(map_log_softmax)
#define begin_state FSM_NAME(begin_state)
#define merge_state FSM_NAME(merge_state)

/* ---- max ---- */

/* The largest element, NaN if one is NaN. A running sum carries NaN past v_max; where the
 * multipliers are idle, as here, it costs no time. It is a suspicion only (inf - inf is NaN too),
 * so the row is then looked at again. Never -0, so that rows that differ in the sign of a zero
 * maximum agree. */
typedef struct {
    vec m[4], s[4];
} running_max;

FSM_INLINE running_max max_begin(void) {
    const vec least = v_set1(-INFINITY), zero = v_set1(0);
    return (running_max){{least, least, least, least}, {zero, zero, zero, zero}};
}

FSM_INLINE void max_add(running_max *r, int j, vec a) {
    r->m[j] = v_max(a, r->m[j]);
    r->s[j] = v_add_m(a, r->s[j]);
}

FSM_INLINE real max_end(const running_max *r, fsm_dtype dtype, const void *x, ptrdiff_t n) {
    const real total = v_hsum(v_add(v_add(r->s[0], r->s[1]), v_add(r->s[2], r->s[3])));
    if (total != total)
        for (ptrdiff_t i = 0; i < n; i += VL) {
            real lane[VL];
            v_store(lane, load_as(dtype, x, i, n - i < VL ? n - i : VL, v_set1(0)));
            for (int l = 0; l < VL; l++)
                if (lane[l] != lane[l]) return NAN;
        }
    return v_hmax(v_max(v_max(r->m[0], r->m[1]), v_max(r->m[2], r->m[3]))) + 0;
}

FSM_INLINE real row_max_as(fsm_dtype dtype, const void *x, ptrdiff_t n) {
    running_max m = max_begin();
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) max_add(&m, j, load_as(dtype, x, i + j * VL, VL, v_set1(0)));
    for (; i < n; i += VL)
        max_add(&m, 0, load_as(dtype, x, i, n - i < VL ? n - i : VL, v_set1(-INFINITY)));
    return max_end(&m, dtype, x, n);
}

static real row_max(fsm_dtype dtype, const void *x, ptrdiff_t n) {
#define CALL(DTYPE) return row_max_as(DTYPE, x, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* The suspects of VL lanes, looked at again. */
static void lane_suspects(real *max, int lanes, const real *x, ptrdiff_t n, vec s) {
    real suspect[VL];
    v_store(suspect, s);
    for (int l = 0; l < VL; l++)
        if (suspect[l] != suspect[l])
            for (ptrdiff_t i = 0; i < n; i++)
                if (x[i * lanes + l] != x[i * lanes + l]) max[l] = NAN;
}

static void lane_max(real *max, int lanes, const real *x, ptrdiff_t n) {
    for (int g = 0; g < lanes; g += VL) {
        vec m = v_load(max + g), s = v_set1(0);
        for (ptrdiff_t i = 0; i < n; i++) {
            vec a = v_load(x + i * lanes + g);
            m = v_max(a, m);
            s = v_add_m(a, s);
        }
        v_store(max + g, v_add(m, v_set1(0)));
        lane_suspects(max + g, lanes, x + g, n, s);
    }
}

/* ---- sum of exp ---- */

/* e may be NULL; e == x is fine. The sum goes into that lane. */
FSM_INLINE void row_sum_as(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref,
                           fsm_exact_sum *sum, int lane, int shift, int fine) {
    const exp_vref r = exp_broadcast(ref);
    for (ptrdiff_t i = 0; i < n;) {
        const ptrdiff_t left = n - i, end = i + (left < FOLD_EVERY * VL ? left : FOLD_EVERY * VL);
        vsum s = vsum_zero();
        ptrdiff_t adds = 0;
        /* One vector is begun, one ended and one added at a time, in the shadow of each other. */
        if (end - i >= VL) {
            exp_mid mid = exp_begin(load_as(dtype, x, i, VL, v_set1(0)), r, shift);
            vec done = v_set1(0);
            FSM_UNROLL(4)
            for (i += VL; i + VL <= end; i += VL, adds++) {
                const exp_mid next = exp_begin(load_as(dtype, x, i, VL, v_set1(0)), r, shift);
                vsum_add(&s, done, 2, fine);
                done = exp_end(mid);
                if (e) v_store(e + i - VL, done);
                mid = next;
            }
            vsum_add(&s, done, 2, fine);
            done = exp_end(mid);
            if (e) v_store(e + i - VL, done);
            vsum_add(&s, done, 2, fine);
            adds += 2;
        }
        for (; i < end; i += VL, adds++) {
            ptrdiff_t k = end - i < VL ? end - i : VL;
            /* lanes past the end add 0 */
            vec a = exp_vec(load_as(dtype, x, i, k, v_set1(-INFINITY)), r, shift);
            if (e) store_as(REAL_DTYPE, e, i, k, a);
            vsum_add(&s, a, 2, fine);
        }
        i = end;
        for (int j = 0; j < (fine ? 3 : 2); j++)
            sum_fold(sum, lane, j, v_sum_int(vsum_int(&s, j, adds, 2)));
    }
}

static void row_sum(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref,
                    fsm_exact_sum *sum, int lane, int fine) {
#define CALL(DTYPE)                                                               \
    if (FSM_BITS == 32 && fine) row_sum_as(DTYPE, e, x, n, ref, sum, lane, 1, 1); \
    else if (ref.c != 0) row_sum_as(DTYPE, e, x, n, ref, sum, lane, 1, 0);        \
    else if (e) row_sum_as(DTYPE, e, x, n, ref, sum, lane, 0, 0);                 \
    else row_sum_as(DTYPE, NULL, x, n, ref, sum, lane, 0, 0)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* The integer lanes of a vsum into the sums of VL rows. */
FSM_INLINE void lane_fold(fsm_exact_sum *sum, int g, const vsum *s, ptrdiff_t adds, real base,
                          int fine) {
    for (int j = 0; j < (fine ? 3 : 2); j++) {
        bits_t count[VL];
        v_store_int(count, vsum_int(s, j, adds, base));
        for (int l = 0; l < VL; l++) sum_fold(sum, g + l, j, count[l]);
    }
}

/* The constants of exp, of one lane or of VL of them. */
FSM_INLINE exp_ref row_ref(const fsm_state *st, int l) {
    return (exp_ref){LANE(st->exp[0])[l], LANE(st->exp[1])[l], LANE(st->exp[2])[l],
                     LANE(st->exp[3])[l], LANE(st->exp[4])[l]};
}

FSM_INLINE exp_vref lanes_of(const fsm_state *st, int g) {
    return (exp_vref){v_load(LANE(st->exp[0]) + g), v_load(LANE(st->exp[1]) + g),
                      v_load(LANE(st->exp[2]) + g), v_load(LANE(st->exp[3]) + g),
                      v_load(LANE(st->exp[4]) + g)};
}

FSM_INLINE void lane_sum(fsm_state *st, real *e, const real *x, ptrdiff_t n, int fine) {
    const int lanes = st->lanes;
    for (int g = 0; g < lanes; g += VL) {
        const exp_vref r = lanes_of(st, g);
        for (ptrdiff_t i = 0; i < n;) {
            const ptrdiff_t end = i + (n - i < FOLD_EVERY ? n - i : FOLD_EVERY), adds = end - i;
            vsum s = vsum_zero();
            for (; i < end; i++) {
                vec a = exp_vec(v_load(x + i * lanes + g), r, 1);
                if (e) v_store(e + i * lanes + g, a);
                vsum_add(&s, a, 2, fine);
            }
            lane_fold(&st->sum, g, &s, adds, 2, fine);
        }
    }
}

/* ---- map ---- */

/* softmax: y = e (a + b), a + b = 1/sum: one rounding more than ideal. log_softmax: y = (x - a) -
 * b, a = max, b = log(sum exp(x - max)). */
typedef struct {
    real a, b;
} map_ref;
typedef struct {
    vec a, b;
} map_vref;

FSM_INLINE vec map_vec(int log, vec x_or_e, map_vref r) {
    if (log) return v_sub(v_sub(x_or_e, r.a), r.b);
    return v_fma(x_or_e, r.a, v_mul(x_or_e, r.b));
}

/* 1/sum, to about twice the precision of real. */
FSM_INLINE map_ref normaliser(const fsm_exact_sum *sum, int lane) {
    const pair s = sum_value(sum, lane);
    double r = 1 / s.hi;
#if FSM_BITS == 32
    float a = (float)r;
    return (map_ref){a, (float)(r - a)};
#else
    return (map_ref){r, r * (fma(-r, s.hi, 1) - r * s.lo)};
#endif
}

/* x -> out; with exp != 0, x is a logit yet and e = exp(x) comes first. */
FSM_INLINE void row_map_as(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x,
                           ptrdiff_t n, int log, int exp, exp_ref ref, map_ref map) {
    const exp_vref r = exp_broadcast(ref);
    const map_vref mr = {v_set1(map.a), v_set1(map.b)};
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            vec a = load_as(dtype, x, i + j * VL, VL, v_set1(0));
            store_as(out_dtype, out, i + j * VL, VL, map_vec(log, exp ? exp_vec(a, r, 1) : a, mr));
        }
    for (; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        vec a = load_as(dtype, x, i, k, v_set1(0));
        store_as(out_dtype, out, i, k, map_vec(log, exp ? exp_vec(a, r, 1) : a, mr));
    }
}

FSM_INLINE void row_map_to(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x,
                           ptrdiff_t n, int log, int exp, exp_ref ref, map_ref map) {
#define CALL(DTYPE)                                                   \
    if (log) row_map_as(out_dtype, out, DTYPE, x, n, 1, 0, ref, map); \
    else row_map_as(out_dtype, out, DTYPE, x, n, 0, 1, ref, map)
    /* without log and exp x is e, of the compute type */
    if (!log && !exp) row_map_as(out_dtype, out, REAL_DTYPE, x, n, 0, 0, ref, map);
    else SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

static void row_map(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x, ptrdiff_t n,
                    int log, int exp, exp_ref ref, map_ref map) {
#define CALL(DTYPE) row_map_to(DTYPE, out, dtype, x, n, log, exp, ref, map)
    SWITCH_DTYPE(out_dtype, CALL);
#undef CALL
}

FSM_INLINE void lane_map(const fsm_state *st, real *out, const real *x, ptrdiff_t n, int log,
                         int exp) {
    const int lanes = st->lanes;
    for (int g = 0; g < lanes; g += VL) {
        const exp_vref r = lanes_of(st, g);
        const map_vref mr = {v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)};
        for (ptrdiff_t i = 0; i < n; i++) {
            vec a = v_load(x + i * lanes + g);
            v_store(out + i * lanes + g, map_vec(log, exp ? exp_vec(a, r, 1) : a, mr));
        }
    }
}

/* ---- the passes of the table ---- */

static void begin_state(fsm_state *st, int lanes, ptrdiff_t n) {
    st->lanes = lanes;
    st->n = n;
    for (int l = 0; l < lanes; l++) {
        LANE(st->max)[l] = -INFINITY;
        LANE(st->exponent)[l] = -INFINITY;
        LANE(st->nonfinite)[l] = 0;
    }
    for (int j = 0; j < 5; j++)
        for (int l = 0; l < lanes; l++) st->sum.parts[j][l] = 0;
}

static void merge_state(fsm_state *into, const fsm_state *from) {
    for (int l = 0; l < into->lanes; l++) {
        real a = LANE(into->max)[l], b = LANE(from->max)[l];
        LANE(into->max)[l] = a != a || b != b ? NAN : a > b ? a : b;
        if (LANE(from->exponent)[l] > LANE(into->exponent)[l])
            LANE(into->exponent)[l] = LANE(from->exponent)[l];
        LANE(into->nonfinite)[l] += LANE(from->nonfinite)[l];
        for (int j = 0; j < 5; j++) into->sum.parts[j][l] += from->sum.parts[j][l];
    }
}

static void max_pass(fsm_state *st, const fsm_tile *t) {
    if (st->lanes == 1) {
        real m = row_max(t->x_dtype, t->x, t->n), *max = LANE(st->max);
        *max = *max != *max || m != m ? NAN : *max > m ? *max : m;
    } else lane_max(LANE(st->max), st->lanes, t->x, t->n);
}

FSM_INLINE void set_ref(fsm_state *st, int lane, exp_ref r) {
    LANE(st->exp[0])[lane] = r.c;
    LANE(st->exp[1])[lane] = r.lo;
    LANE(st->exp[2])[lane] = r.ml;
    LANE(st->exp[3])[lane] = r.q;
    LANE(st->exp[4])[lane] = r.rest;
}

/* Lanes without a finite maximum get constants that do no harm; what map writes there is replaced
 * afterwards. */
static void reference_pass(fsm_state *st) {
    st->special = 0;
    for (int l = 0; l < st->lanes; l++) {
        real m = LANE(st->max)[l];
        int finite = m - m == 0;
        set_ref(st, l, exp_reference(finite ? m : 0, EXP_RANGE));
        st->special += !finite;
    }
}

static void sum_pass(fsm_state *st, const fsm_tile *t) {
    const int fine = st->n > EXACT_COARSE;
    if (st->lanes == 1) row_sum(t->x_dtype, t->e, t->x, t->n, row_ref(st, 0), &st->sum, 0, fine);
    else if (FSM_BITS == 32 && fine) lane_sum(st, t->e, t->x, t->n, 1);
    else lane_sum(st, t->e, t->x, t->n, 0);
}

static void finish_softmax(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        map_ref r = normaliser(&st->sum, l);
        LANE(st->value[0])[l] = r.a;
        LANE(st->value[1])[l] = r.b;
    }
}

/* value[0] = max, value[1] = log(sum exp(x - max)). */
static void finish_log_softmax(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        LANE(st->value[0])[l] = LANE(st->max)[l];
        LANE(st->value[1])[l] = (real)log1p_ratio(sum_less_one(&st->sum, l));
    }
}

/* value[0] = max + log(sum exp(x - max)); a maximum that is not finite is the result. */
static void finish_logsumexp(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const real m = LANE(st->max)[l];
        const double lse = (double)m + log1p_ratio(sum_less_one(&st->sum, l));
        LANE(st->value[0])[l] = m - m == 0 ? (real)lse : m;
    }
}

static void map_softmax(const fsm_state *st, const fsm_tile *t) {
    if (st->lanes == 1) {
        exp_ref r = row_ref(st, 0);
        map_ref m = {LANE(st->value[0])[0], LANE(st->value[1])[0]};
        if (t->e) row_map(t->out_dtype, t->out, REAL_DTYPE, t->e, t->n, 0, 0, r, m);
        else row_map(t->out_dtype, t->out, t->x_dtype, t->x, t->n, 0, 1, r, m);
    } else if (t->e) lane_map(st, t->out, t->e, t->n, 0, 0);
    else lane_map(st, t->out, t->x, t->n, 0, 1);
}

static void map_log_softmax(const fsm_state *st, const fsm_tile *t) {
    if (st->lanes == 1)
        row_map(t->out_dtype, t->out, t->x_dtype, t->x, t->n, 1, 0, (exp_ref){0},
                (map_ref){LANE(st->value[0])[0], LANE(st->value[1])[0]});
    else lane_map(st, t->out, t->x, t->n, 1, 0);
}
