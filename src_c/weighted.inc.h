/* log|sum(b exp(x))| with weights b of either sign.
 *
 * x and b may compensate each other over their whole ranges (b = 1e-300 at x = 700), so the
 * reference of the sum is neither the largest x nor the largest b but the largest exponent among
 * the terms, found in a pass of its own (max2): with exp(x - max) = p 2^n and b = m 2^j the term is
 * (p m) 2^(n + j). The sum of the terms, scaled by that exponent, is exact in the sense of
 * exp.inc.h. b = 0 takes no part and hides inf and NaN in x. Terms that are not finite follow IEEE
 * arithmetic: their sum is the result. */

#define split_weights FSM_NAME(split_weights)
#define weighted_max FSM_NAME(weighted_max)
#define weighted_reference FSM_NAME(weighted_reference)
#define weighted_max2 FSM_NAME(weighted_max2)
#define weighted_sum FSM_NAME(weighted_sum)
#define weighted_sum_fine FSM_NAME(weighted_sum_fine)
#define weighted_finish FSM_NAME(weighted_finish)

#undef NO_TERM
#undef EXP2_MIN
#define NO_TERM -65536 /* an exponent below that of any term */
#define EXP2_MIN \
    (FSM_BITS == 32 ? -140 : -1000) /* a term that small is below the last level of the sum */

static void weighted_max(fsm_state *st, const fsm_tile *t) {
    const real *x = t->x, *b = t->y;
    real *max = LANE(st->max), *nonfinite = LANE(st->nonfinite);
    for (ptrdiff_t i = 0; i < t->n; i++)
        for (int l = 0; l < st->lanes; l++, x++, b++) {
            if (*b == 0) continue;
            const real e = *x - *x == 0 ? 1 : *x == -INFINITY ? 0 : *x, term = *b * e;
            if (term - term != 0) nonfinite[l] += term;
            else max[l] = *x > max[l] ? *x : max[l];
        }
}

static void weighted_reference(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const real m = LANE(st->max)[l];
        set_ref(st, l, exp_reference(m - m == 0 ? m : 0, WEIGHTED_RANGE));
    }
}

/* The mantissas of VL weights, in [1, 2) and signed, and their exponents. A weight of 0 (or not
 * finite) becomes 0. */
FSM_INLINE void split_weights(const real *b, ptrdiff_t k, vec *mantissa, vec *exponent) {
    real m[VL], e[VL];
    for (int l = 0; l < VL; l++) {
        const double a = l < k ? (double)b[l] : 0;
        const int none = a == 0 || a - a != 0, j = none ? 0 : exponent_of(a < 0 ? -a : a),
                  half = j / 2;
        m[l] = none ? 0 : (real)(a * exp2i(-half) * exp2i(half - j));
        e[l] = none ? NO_TERM : (real)j;
    }
    *mantissa = v_load(m);
    *exponent = v_load(e);
}

static void weighted_max2(fsm_state *st, const fsm_tile *t) {
    const walk w = walk_of(st, t);
    for (ptrdiff_t g = 0; g < w.groups; g++) {
        const real *x = (const real *)t->x + g * VL, *y = (const real *)t->y + g * VL;
        const exp_vref r =
            st->lanes > 1 ? lanes_of(st, (int)(g * VL)) : exp_broadcast(row_ref(st, 0));
        vec most = v_set1(NO_TERM);
        for (ptrdiff_t s = 0; s < w.steps; s++) {
            const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
            vec m, j;
            split_weights(y + s * w.stride, k, &m, &j);
            const vec n = exp_begin(load_part(x + s * w.stride, k), r, 1, 0)
                              .n; /* anything, where x takes no part: inf, say */
            most = v_max(v_add(v_unless(m, v_set1(0), n), j), most);
        }
        real lane[VL], *exponent = LANE(st->exponent);
        v_store(lane, most);
        for (int l = 0; l < VL; l++) {
            const ptrdiff_t at = st->lanes > 1 ? g * VL + l : 0;
            exponent[at] = lane[l] > exponent[at] ? lane[l] : exponent[at];
        }
    }
}

FSM_INLINE void weighted_sum_fine(fsm_state *st, const fsm_tile *t, int fine) {
    const walk w = walk_of(st, t);
    for (ptrdiff_t g = 0; g < w.groups; g++) {
        const real *x = (const real *)t->x + g * VL, *y = (const real *)t->y + g * VL;
        const exp_vref r =
            st->lanes > 1 ? lanes_of(st, (int)(g * VL)) : exp_broadcast(row_ref(st, 0));
        const vec most =
            st->lanes > 1 ? v_load(LANE(st->exponent) + g * VL) : v_set1(LANE(st->exponent)[0]);
        for (ptrdiff_t s = 0; s < w.steps;) {
            const ptrdiff_t end = s + (w.steps - s < FOLD_EVERY ? w.steps - s : FOLD_EVERY),
                            adds = end - s;
            vsum sum = vsum_zero();
            for (; s < end; s++) {
                const ptrdiff_t k = s == w.steps - 1 ? w.tail : VL;
                const exp_mid mid = exp_begin(load_part(x + s * w.stride, k), r, 1, 0);
                vec m, j;
                split_weights(y + s * w.stride, k, &m, &j);
                const vec n = v_max(v_sub(v_sub(v_add(mid.n, j), most), v_set1(2)),
                                    v_set1(EXP2_MIN)); /* |p m| < 4: below 1 */
                const vec term = v_mul(v_mul(v_add(exp_less_one(mid), v_set1(1)), m), v_exp2(n));
                vsum_add(&sum, v_unless(m, v_set1(0), term), 3, 0,
                         fine); /* p may be NaN where x is inf and takes no part */
            }
            fold_vsum(st, g, &sum, adds, 3, fine);
        }
    }
}
static void weighted_sum(fsm_state *st, const fsm_tile *t) {
    if (FSM_BITS == 32 && st->n > EXACT_COARSE) weighted_sum_fine(st, t, 1);
    else weighted_sum_fine(st, t, 0);
}

/* value[0] = log|sum|, value[1] = its sign (0 for an empty or cancelled sum, NaN for NaN). The log
 * of a negative sum is NaN if nobody asks for the sign. */
static void weighted_finish(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const double s = sum_value(&st->sum, l).hi, nonfinite = (double)LANE(st->nonfinite)[l];
        double value, sign;
        if (nonfinite != 0) {
            value = nonfinite != nonfinite ? NAN : INFINITY;
            sign = nonfinite != nonfinite ? NAN : nonfinite > 0 ? 1 : -1;
        } else if (s == 0 || LANE(st->max)[l] == -INFINITY) {
            value = -INFINITY;
            sign = 0;
        } else {
            value = log_scaled(s < 0 ? -s : s, (double)LANE(st->exponent)[l] + 2,
                               (double)LANE(st->max)[l]);
            sign = s < 0 ? -1 : 1;
        }
        LANE(st->value[0])[l] = sign < 0 && !st->want_sign ? NAN : (real)value;
        LANE(st->value[1])[l] = (real)sign;
    }
}
