/* log for the constants of a row: double, plain C, no libm, the same bits on every ISA. */
#ifndef FSM_LOG_H
#define FSM_LOG_H

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

#define LOG_P0 0x1.5555555555592p-1
#define LOG_P1 0x1.999999997ff1fp-2
#define LOG_P2 0x1.24924941e1655p-2
#define LOG_P3 0x1.c71c5213b88e6p-3
#define LOG_P4 0x1.74663d2e55f63p-3
#define LOG_P5 0x1.39a1dea6f7488p-3
#define LOG_P6 0x1.2f04450c1b0aep-3

/* log((1 + u) / (1 - u)) = 2 atanh(u) = 2u + u^3 P(u^2) for |u| <= 3 - 2 sqrt(2); derive_exp.py, relative error 2^-59.4. */
FSM_INLINE double two_atanh(double u) {
    const double v = u * u;
    double p = LOG_P6;
    p = fma(p, v, LOG_P5);
    p = fma(p, v, LOG_P4);
    p = fma(p, v, LOG_P3);
    p = fma(p, v, LOG_P2);
    p = fma(p, v, LOG_P1);
    p = fma(p, v, LOG_P0);
    return fma(u * v, p, 2 * u);
}

#define LOG_LN2_HI 0x1.62e42fefa39efp-1
#define LOG_LN2_LO 0x1.abc9e3b39803fp-56
#define LOG_SQRT2 0x1.6a09e667f3bcdp+0

/* c + log(a 2^k) for a finite a > 0 and an integer k; error: 1 ulp of the largest of |c|, |k ln2| and the result. */
FSM_INLINE double log_scaled(double a, double k, double c) {
    const int e = exponent_of(a), half = e / 2;
    double f = a * exp2i(-half) * exp2i(half - e); /* [1, 2) */
    k += e;
    if (f > LOG_SQRT2) {
        f *= 0.5;
        k += 1;
    }
    return c + fma(k, LOG_LN2_HI, fma(k, LOG_LN2_LO, two_atanh((f - 1) / (f + 1))));
}

/* log(1 + q) for q >= 0; relative error 2 ulp. */
FSM_INLINE double log1p_ratio(double q) {
    if (q <= LOG_SQRT2 - 1) return two_atanh(q / (2 + q));
    return log_scaled(1 + q, 0, 0);
}

#endif
