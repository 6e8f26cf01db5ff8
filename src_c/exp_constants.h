/* The constants of exp and log, printed and proved by derive_exp.py, and those that the float
 * format gives. Unused ones are meant to be. */
#ifndef FSM_EXP_CONSTANTS_H
#define FSM_EXP_CONSTANTS_H

/* float32: exp(r), |r| <= 0.34664, degree 6, relative error <= 2^-28.2 = 0.0524 * 2^-24 */
static const float f32_LOG2E = 0x1.715476p+0f;
static const float f32_LN2_HI = 0x1.62e4p-1f;
static const float f32_LN2_LO = 0x1.7f7d1cp-20f;
static const float f32_EXP2 = 0x1.fffffcp-2f;
static const float f32_EXP3 = 0x1.555492p-3f;
static const float f32_EXP4 = 0x1.5558acp-5f;
static const float f32_EXP5 = 0x1.12397cp-7f;
static const float f32_EXP6 = 0x1.6a5124p-10f;
/* 2^r, |r| <= 1/2, degree 6, relative error <= 2^-28.319 = 0.05009 * 2^-24 */
static const float f32_POW1 = 0x1.62e43p-1f;
static const float f32_POW2 = 0x1.ebfbdcp-3f;
static const float f32_POW3 = 0x1.c6af7ap-5f;
static const float f32_POW4 = 0x1.3b2ddp-7f;
static const float f32_POW5 = 0x1.5f0956p-10f;
static const float f32_POW6 = 0x1.417dbap-13f;
static const float f32_GRID_MAGIC =
    0x1.8p17f;                             /* a + GRID_MAGIC - GRID_MAGIC: a to multiples of 1/64 */
static const float f32_ULP2 = 0x1p-22f;    /* ulp(2) */
static const float f32_EXP_BIG = 1024.0f;  /* above it x - m is exact where it matters */
static const float f32_EXP_RANGE = 104.0f; /* exp(-104) < 2^-150: 0 */
static const float f32_EXP_NORMAL = 60.0f; /* exp(-60) > FAR_BELOW */
static const float f32_FAR_BELOW = 0x1p-87f;  /* such an e, times b, may be subnormal (map_far) */
static const float f32_LEAST_REST = 0x1p-33f; /* of b, in 1/sum: 0.002 ulp of a result */
static const float f32_LEAST_NORMAL = 0x1p-126f;
static const float f32_LEAST_EXPONENT = -125.0f; /* 0.7 * 2^-125 is normal, 0.7 * 2^-126 is not */
static const float f32_UNIT_EXPONENT = 149.0f;   /* 2^-149 is the unit of subnormal numbers */
static const float f32_UNITS = 0x1p23f;          /* so many are the smallest normal number */
static const float f32_LIFT = 0x1p100f;        /* times e and times e b: normal, and no overflow */
static const float f32_LIFTED_UNIT = 0x1p-49f; /* 2^-149 LIFT */
static const float f32_POW_LEAST = -160.0f;    /* 2^-160 < 2^-150: 0 */
static const float f32_LEAST = -0x1.fffffep127f; /* only -inf is less */
static const float f32_WEIGHTED_RANGE = 300.0f;  /* weights span 2^277 = exp(192): 104 + 192 */
static const ptrdiff_t f32_EXACT_COARSE =
    1 << 17; /* elements that two levels of the sum are good for: 2^-45 * 2^17 = 2^-28 */

/* float64: exp(r), |r| <= 0.34664, degree 11, relative error <= 2^-57.9 = 0.0332 * 2^-53 */
static const double f64_LOG2E = 0x1.71547652b82fep+0;
static const double f64_LN2_HI = 0x1.62e42ffp-1;
static const double f64_LN2_LO = -0x1.718432a1b0e26p-35;
static const double f64_EXP2 = 0x1.000000000000ap-1;
static const double f64_EXP3 = 0x1.555555555550cp-3;
static const double f64_EXP4 = 0x1.55555555507a5p-5;
static const double f64_EXP5 = 0x1.111111112481ap-7;
static const double f64_EXP6 = 0x1.6c16c18438186p-10;
static const double f64_EXP7 = 0x1.a01a013799fd8p-13;
static const double f64_EXP8 = 0x1.a0199a0d6e189p-16;
static const double f64_EXP9 = 0x1.71df0deeeaf88p-19;
static const double f64_EXP10 = 0x1.28ad608068a2p-22;
static const double f64_EXP11 = 0x1.ad9d97efd59dbp-26;
/* 2^r, |r| <= 1/2, degree 11, relative error <= 2^-57.767 = 0.03672 * 2^-53 */
static const double f64_POW1 = 0x1.62e42fefa39efp-1;
static const double f64_POW2 = 0x1.ebfbdff82c59cp-3;
static const double f64_POW3 = 0x1.c6b08d704a0d5p-5;
static const double f64_POW4 = 0x1.3b2ab6fba11f5p-7;
static const double f64_POW5 = 0x1.5d87fe78b38c7p-10;
static const double f64_POW6 = 0x1.4309130c011adp-13;
static const double f64_POW7 = 0x1.ffcbfbf9801bap-17;
static const double f64_POW8 = 0x1.62bfcddeadffcp-20;
static const double f64_POW9 = 0x1.b5260c5bbdf53p-24;
static const double f64_POW10 = 0x1.e6119fa310f39p-28;
static const double f64_POW11 = 0x1.e81085efbc36p-32;
static const double f64_GRID_MAGIC = 0x1.8p46;
static const double f64_ULP2 = 0x1p-51;
static const double f64_EXP_BIG = 8192.0;
static const double f64_EXP_RANGE = 746.0; /* exp(-746) < 2^-1075 */
static const double f64_EXP_NORMAL = 651.0;
static const double f64_FAR_BELOW = 0x1p-940;
static const double f64_LEAST_REST = 0x1p-65;
static const double f64_LEAST_NORMAL = 0x1p-1022;
static const double f64_LEAST_EXPONENT = -1021.0;
static const double f64_UNIT_EXPONENT = 1074.0;
static const double f64_UNITS = 0x1p52;
static const double f64_LIFT = 0x1p1000;
static const double f64_LIFTED_UNIT = 0x1p-74;
static const double f64_POW_LEAST = -1100.0; /* 2^-1100 < 2^-1075 */
static const double f64_LEAST = -0x1.fffffffffffffp1023;
static const double f64_WEIGHTED_RANGE = 2200.0;       /* weights span 2^2098 = exp(1454) */
static const ptrdiff_t f64_EXACT_COARSE = PTRDIFF_MAX; /* 2^-103 n is small for any n in memory */

/* log f = 2u + u^3 P(u^2), u = (f-1)/(f+1), |u| <= 0.1716, relative error <= 2^-59.4 */
static const double f64_LOG_P0 = 0x1.5555555555592p-1;
static const double f64_LOG_P1 = 0x1.999999997ff1fp-2;
static const double f64_LOG_P2 = 0x1.24924941e1655p-2;
static const double f64_LOG_P3 = 0x1.c71c5213b88e6p-3;
static const double f64_LOG_P4 = 0x1.74663d2e55f63p-3;
static const double f64_LOG_P5 = 0x1.39a1dea6f7488p-3;
static const double f64_LOG_P6 = 0x1.2f04450c1b0aep-3;

#endif
