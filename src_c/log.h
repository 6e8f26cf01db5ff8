/* log for the constants of a row: double, plain C, no libm, the same bits on every ISA. */
#ifndef FSM_LOG_H
#define FSM_LOG_H

#include "exp_constants.h"
#include "vec.h"

/* The exponent of a finite a > 0: 2^e <= a < 2^(e + 1). */
FSM_INLINE int exponent_of(double a) {
    const int subnormal = a < 0x1p-1022;
    uint64_t u;
    if (subnormal) a *= 0x1p64;
    memcpy(&u, &a, sizeof u);
    return (int)(u >> 52) - 1023 - (subnormal ? 64 : 0);
}

/* 2^k for -1022 <= k <= 1023. */
FSM_INLINE double exp2i(int k) {
    const uint64_t u = (uint64_t)(k + 1023) << 52;
    double a;
    memcpy(&a, &u, sizeof a);
    return a;
}

/* log((1 + u) / (1 - u)) = 2 atanh(u) = 2u + u^3 P(u^2) for |u| <= 3 - 2 sqrt(2); derive_exp.py,
 * relative error 2^-59.4. */
FSM_INLINE double two_atanh(double u) {
    const double v = u * u;
    double p = f64_LOG_P6;
    p = fma(p, v, f64_LOG_P5);
    p = fma(p, v, f64_LOG_P4);
    p = fma(p, v, f64_LOG_P3);
    p = fma(p, v, f64_LOG_P2);
    p = fma(p, v, f64_LOG_P1);
    p = fma(p, v, f64_LOG_P0);
    return fma(u * v, p, 2 * u);
}

#define SQRT2 0x1.6a09e667f3bcdp+0

/* c + log(a 2^k) for a finite a > 0 and an integer k; error: 1 ulp of the largest of |c|, |k ln2|
 * and the result. */
FSM_INLINE double log_scaled(double a, double k, double c) {
    const int e = exponent_of(a), half = e / 2;
    double f = a * exp2i(-half) * exp2i(half - e); /* [1, 2) */
    k += e;
    if (f > SQRT2) {
        f *= 0.5;
        k += 1;
    }
    return c + fma(k, f64_LN2_HI, fma(k, f64_LN2_LO, two_atanh((f - 1) / (f + 1))));
}

/* log(1 + q) for q >= 0; relative error 2 ulp. */
FSM_INLINE double log1p_ratio(double q) {
    if (q <= SQRT2 - 1) return two_atanh(q / (2 + q));
    return log_scaled(1 + q, 0, 0);
}

#endif
