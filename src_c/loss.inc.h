/* Cross entropy and its gradient, for FSM_TYPE: the maximum m and the exact sum s of the row are those
 * of softmax, x is the logit at the label and g the gradient of the row's loss,
 *
 *     loss = (m - x) + log(s),     dx_j = g / s * exp(x_j - m),  less g at the label.
 *
 * Neither part of the loss is below 0, and log(s) = log1p(s - 1) with s - 1 exact, so nothing
 * cancels: the error is that of exp, 1.5 * 2^-24 (2^-53) relative, in s - 1, what the sum drops, and
 * 1 ulp (2 ulp) of roundings. The same at the label: 1 - p = (s - 1) / s where x is the maximum,
 * and elsewhere p <= 1 / 2. */

#define finish_cross_entropy FSM_NAME(finish_cross_entropy)
#define finish_cross_entropy_backward FSM_NAME(finish_cross_entropy_backward)

static void finish_cross_entropy(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const double m = (double)LANE(st->max)[l], x = (double)LANE(st->label)[l];
        const double log_sum = log1p_ratio(sum_less_one(&st->sum, l));
        LANE(st->value[0])[l] = m - m == 0 ? (real)(log_sum + (m - x)) : (real)NAN;
    }
}

/* value[0] + value[1] = g / s, for map_loss. */
static void finish_cross_entropy_backward(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const real m = LANE(st->max)[l], x = LANE(st->label)[l];
        const double g = (double)LANE(st->grad)[l];
        const pair s = sum_value(&st->sum, l);
        real e[VL];
        v_store(e, exp_vec(v_set1(x), exp_broadcast(row_ref(st, l)), 1, 0));
        const double rest = sum_less_one(&st->sum, l);
        const real dx = (real)(-g * (x == m ? rest / s.hi : 1 - (double)e[0] / s.hi));
        LANE(st->label)[l] = dx == dx ? dx : (real)NAN;
        const double r = 1 / s.hi, hi = g * r;
#if FSM_BITS == 32
        const real a = (real)hi, b = (real)(hi - (double)a);
#else
        const real a = hi, b = fma(g, r, -hi) + hi * (fma(-r, s.hi, 1) - r * s.lo);
#endif
        LANE(st->value[0])[l] = a == a ? a : (real)NAN;
        LANE(st->value[1])[l] = a - a == 0 ? b : 0;
    }
}
