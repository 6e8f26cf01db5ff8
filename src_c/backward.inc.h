/* The vector-Jacobian products of softmax and log_softmax, from the output y of the forward pass:
 *
 *     softmax        dx = y (g - sum(g y))          terms of the sum: g y
 *     log_softmax    dx = g - exp(y) sum(g)         terms of the sum: g
 *
 * times 1/temperature. An entry that took no part (y = 0, y = -inf) adds nothing and gets 0,
 * whatever its gradient. The sum is exact in the sense of exp.inc.h: the terms, rounded once, are
 * scaled by a power of two so that the largest is below 1, and counted in multiples of 2^-44
 * (2^-102) of it. So these rows have no order either. If a term is not finite, the sum is that of
 * such terms alone. */

#define walk FSM_NAME(walk)
#define walk_of FSM_NAME(walk_of)
#define load_part FSM_NAME(load_part)
#define backward_term FSM_NAME(backward_term)
#define backward_max FSM_NAME(backward_max)
#define backward_reference FSM_NAME(backward_reference)
#define backward_sum FSM_NAME(backward_sum)
#define backward_finish FSM_NAME(backward_finish)
#define backward_map FSM_NAME(backward_map)
#define fold_vsum FSM_NAME(fold_vsum)
#define softmax_backward_max FSM_NAME(softmax_backward_max)
#define softmax_backward_sum FSM_NAME(softmax_backward_sum)
#define softmax_backward_map FSM_NAME(softmax_backward_map)
#define log_backward_max FSM_NAME(log_backward_max)
#define log_backward_sum FSM_NAME(log_backward_sum)
#define log_backward_map FSM_NAME(log_backward_map)

/* Both shapes of tile as vectors: those of group g belong to lanes g * VL.. of the state, or all to
 * its one row. */
typedef struct {
    ptrdiff_t groups, steps, stride, tail;
} walk;

FSM_INLINE walk walk_of(const fsm_state *st, const fsm_tile *t) {
    if (st->lanes > 1) return (walk){st->lanes / VL, t->n, st->lanes, VL};
    const ptrdiff_t steps = (t->n + VL - 1) / VL;
    return (walk){1, steps, VL, t->n - (steps - 1) * VL};
}

FSM_INLINE vec load_part(const real *p, ptrdiff_t k) {
    return k < VL ? v_load_n(p, k, v_set1(0)) : v_load(p);
}

/* A vsum of group g into the sums of its lanes, or of the one row. */
FSM_INLINE void fold_vsum(fsm_state *st, ptrdiff_t g, const vsum *s, ptrdiff_t adds, real base,
                          int fine) {
    if (st->lanes > 1) lane_fold(&st->sum, (int)(g * VL), s, adds, base, fine);
    else
        for (int j = 0; j < (fine ? 3 : 2); j++)
            sum_fold(&st->sum, 0, j, v_sum_int(vsum_int(s, j, adds, base)));
}

FSM_INLINE vec backward_term(int log, vec g, vec y) {
    return log ? v_unless(y, v_set1(-INFINITY), g) : v_unless(y, v_set1(0), v_mul(g, y));
}

FSM_INLINE void backward_max(int log, fsm_state *st, const fsm_tile *t) {
    const walk w = walk_of(st, t);
    for (ptrdiff_t g = 0; g < w.groups; g++) {
        const real *x = (const real *)t->x + g * VL, *y = (const real *)t->y + g * VL;
        vec m = v_set1(0), odd = v_set1(0);
        for (ptrdiff_t s = 0; s < w.steps; s++) {
            const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
            vec term =
                backward_term(log, load_part(x + s * w.stride, k), load_part(y + s * w.stride, k));
            m = v_max(v_abs(term), m);
            odd = v_add(odd, v_sub(term, term));
        }
        real lane[VL], *max = LANE(st->max), *nonfinite = LANE(st->nonfinite);
        v_store(lane, m);
        for (int l = 0; l < VL; l++) {
            const ptrdiff_t at = st->lanes > 1 ? g * VL + l : 0;
            max[at] = lane[l] > max[at] ? lane[l] : max[at];
        }
        const real any = v_hsum(odd);
        for (ptrdiff_t s = 0; s < w.steps && any != any; s++) {
            const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
            v_store(lane, backward_term(log, load_part(x + s * w.stride, k),
                                        load_part(y + s * w.stride, k)));
            for (int l = 0; l < k; l++)
                if (lane[l] - lane[l] != 0) nonfinite[st->lanes > 1 ? g * VL + l : 0] += lane[l];
        }
    }
}

/* exp[0] * exp[1] = 2^-exponent, in two steps because one can overflow; max < 2^exponent. */
static void backward_reference(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const double m = (double)LANE(st->max)[l];
        int exponent = m > 0 && m - m == 0 ? exponent_of(m) + 1 : 0, half = exponent / 2;
        LANE(st->exponent)[l] = (real)exponent;
        LANE(st->exp[0])[l] = (real)exp2i(-half);
        LANE(st->exp[1])[l] = (real)exp2i(half - exponent);
    }
}

FSM_INLINE void backward_sum(int log, fsm_state *st, const fsm_tile *t, int fine) {
    const walk w = walk_of(st, t);
    for (ptrdiff_t g = 0; g < w.groups; g++) {
        const real *x = (const real *)t->x + g * VL, *y = (const real *)t->y + g * VL;
        const vec s1 =
            st->lanes > 1 ? v_load(LANE(st->exp[0]) + g * VL) : v_set1(LANE(st->exp[0])[0]);
        const vec s2 =
            st->lanes > 1 ? v_load(LANE(st->exp[1]) + g * VL) : v_set1(LANE(st->exp[1])[0]);
        for (ptrdiff_t s = 0; s < w.steps;) {
            const ptrdiff_t end = s + (w.steps - s < FOLD_EVERY ? w.steps - s : FOLD_EVERY),
                            adds = end - s;
            vsum sum = vsum_zero();
            for (; s < end; s++) {
                const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
                vec term = backward_term(log, load_part(x + s * w.stride, k),
                                         load_part(y + s * w.stride, k));
                vsum_add(&sum, v_mul(v_mul(term, s1), s2), 3, 0, fine);
            }
            fold_vsum(st, g, &sum, adds, 3, fine);
        }
    }
}

/* value[0] + value[1]: the sum of the terms. */
static void backward_finish(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const pair s = sum_value(&st->sum, l);
        const int exponent = (int)LANE(st->exponent)[l], half = exponent / 2;
        const double a = exp2i(half), b = exp2i(exponent - half), hi = s.hi * a * b,
                     nonfinite = (double)LANE(st->nonfinite)[l];
        const real r = (real)(nonfinite == 0 ? hi : nonfinite);
        LANE(st->value[0])[l] = r;
        LANE(st->value[1])[l] = r - r == 0 ? (real)((hi - (double)r) + s.lo * a * b) : 0;
    }
}

FSM_INLINE void backward_map(int log, const fsm_state *st, const fsm_tile *t) {
    const walk w = walk_of(st, t);
    const exp_vref r0 = exp_broadcast(exp_reference(0, EXP_RANGE));
    for (ptrdiff_t g = 0; g < w.groups; g++) {
        const real *x = (const real *)t->x + g * VL, *y = (const real *)t->y + g * VL,
                   *scale = t->scale;
        real *out = (real *)t->out + g * VL;
        const int across = st->lanes > 1;
        const vec hi = across ? v_load(LANE(st->value[0]) + g * VL) : v_set1(LANE(st->value[0])[0]);
        const vec lo = across ? v_load(LANE(st->value[1]) + g * VL) : v_set1(LANE(st->value[1])[0]);
        const vec r = !scale ? v_set1(1) : across ? v_load(scale + g * VL) : v_set1(scale[0]);
        for (ptrdiff_t s = 0; s < w.steps; s++) {
            const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
            const vec a = load_part(x + s * w.stride, k), b = load_part(y + s * w.stride, k);
            vec d;
            if (log) {
                /* y > 0 is no log-probability; min(y, 1) keeps exp in its range. y - y is NaN for a
                 * NaN, which exp_vec reads as the clamp. */
                vec p = exp_vec(v_sub(v_set1(0), v_max(v_sub(v_set1(0), b), v_set1(-1))), r0, 0, 0);
                d = v_add(v_fnma(p, lo, v_fnma(p, hi, a)), v_sub(b, b));
                d = v_unless(b, v_set1(-INFINITY), v_canon(v_mul(d, r)));
            } else {
                d = v_mul(b, v_mul(v_sub(v_sub(a, hi), lo),
                                   r)); /* y last: the one factor that can make it subnormal */
                d = v_unless(b, v_set1(0), v_canon(d));
            }
            if (k < VL) v_store_n(out + s * w.stride, d, k);
            else v_store(out + s * w.stride, d);
        }
    }
}

static void softmax_backward_max(fsm_state *st, const fsm_tile *t) { backward_max(0, st, t); }
static void softmax_backward_sum(fsm_state *st, const fsm_tile *t) {
    backward_sum(0, st, t, FSM_BITS == 32 && st->n > EXACT_COARSE);
}
static void softmax_backward_map(const fsm_state *st, const fsm_tile *t) { backward_map(0, st, t); }
static void log_backward_max(fsm_state *st, const fsm_tile *t) { backward_max(1, st, t); }
static void log_backward_sum(fsm_state *st, const fsm_tile *t) {
    backward_sum(1, st, t, FSM_BITS == 32 && st->n > EXACT_COARSE);
}
static void log_backward_map(const fsm_state *st, const fsm_tile *t) { backward_map(1, st, t); }
