/* exp, the exact sum, and log: the mathematics under every kernel, for FSM_TYPE (vec.h). No libm; every fma is written out.
 *
 * exp(x - m) without rounding x - m
 * ---------------------------------
 * The error of the other libraries comes from rounding x - m before exp. Here the row's maximum enters as an integer: with
 * k = rint(x log2 e) and M = rint(m log2 e),
 *
 *     e = exp(x) / 2^M = 2^(k - M) exp(r),    r = x - k ln2 in [-ln2/2, ln2/2]
 *
 * which is exp(x - m) times exp(m)/2^M, a factor in [0.70, 1.42] common to the row that the normalisation cancels. r is Cody & Waite's
 * reduction: fma(-k, LN2_HI, x) is exact, because both terms are multiples of ulp(x) or of ulp(LN2_HI) and their difference is less
 * than one; the second fma rounds once, by 2^-26 at most (float64: 2^-55). That holds while k is an integer of a few bits. For |m| >= EXP_BIG
 * the plain difference d = x - m takes the place of x: it is exact wherever the result is not 0 (Sterbenz: x is within a factor of 2 of m),
 * and then M = 0. One code serves both: d = x - c with c = 0 or m.
 *
 * p(r) = 1 + r + r^2 q(r) is a minimax polynomial (derive_exp.py prints the coefficients and their error: 2^-28.2 and 2^-57.9 relative). With
 * the roundings of r, of p's last two steps and of the result, e is within EXP_ULP units of 2^-24 (2^-53), relative: tests/test_exp.py.
 * e is rounded once into the subnormals, not flushed. d is clamped at EXP_RANGE below the maximum, where e is 0, so that -inf needs no branch.
 *
 * A sum that has no order
 * -----------------------
 * e lies in [0, 1.42] and is split exactly, by two additions to constants whose ulp is the grain wanted:
 *
 *     t = e + 2                     a multiple of ULP2 = ulp(2) = 2^-22 (2^-51): its bits, less those of 2, count them
 *     u = e - (t - (2 + 3 ULP2))    what is left, + 3 ULP2: its bits, less those of 3 ULP2, count multiples of 2^-44 (2^-102)
 *
 * Integer addition is associative: vector width, blocking, threads and order of the elements cannot change a bit of the sum. What is
 * dropped is at most 2^-45 (2^-103) per element. Float32 rows longer than EXACT_COARSE take a third level, 2^-66, so that the sum, 0.7 at
 * least, is always good to 2^-27. Terms of either sign, |e| < 1, use 3 in the place of 2.
 */

#define exp_ref FSM_NAME(exp_ref)
#define exp_vref FSM_NAME(exp_vref)
#define exp_reference FSM_NAME(exp_reference)
#define exp_broadcast FSM_NAME(exp_broadcast)
#define exp_parts FSM_NAME(exp_parts)
#define exp_vec FSM_NAME(exp_vec)
#define vsum FSM_NAME(vsum)
#define vsum_zero FSM_NAME(vsum_zero)
#define vsum_add FSM_NAME(vsum_add)
#define vsum_int FSM_NAME(vsum_int)
#define sum_fold FSM_NAME(sum_fold)
#define sum_value FSM_NAME(sum_value)
#define sum_without FSM_NAME(sum_without)

#undef ROUND_MAGIC
#undef ULP2
#undef LOG2E
#undef LN2_HI
#undef LN2_LO
#undef EXP_BIG
#undef EXP_RANGE
#undef EXP_RANGE_WEIGHTED
#undef EXACT_COARSE
#undef EXP2
#undef EXP3
#undef EXP4
#undef EXP5
#undef EXP6
#undef EXP7
#undef EXP8
#undef EXP9
#undef EXP10
#undef EXP11

#if FSM_BITS == 32
#define ROUND_MAGIC 0x1.8p23f /* a + ROUND_MAGIC - ROUND_MAGIC = rint(a) for |a| < 2^22 */
#define ULP2 0x1p-22f
#define LOG2E 0x1.715476p+0f
#define LN2_HI 0x1.62e43p-1f
#define LN2_LO -0x1.05c61p-29f
#define EXP_BIG 1024.0f
#define EXP_RANGE 104.0f           /* exp(-104) < 2^-150: 0 */
#define EXP_RANGE_WEIGHTED 300.0f  /* weights span 2^277 = exp(192): 104 + 192 */
#define EXACT_COARSE ((ptrdiff_t)1 << 17)
#define EXP2 0x1.fffffcp-2f
#define EXP3 0x1.555492p-3f
#define EXP4 0x1.5558aap-5f
#define EXP5 0x1.123972p-7f
#define EXP6 0x1.6a52eap-10f
#else
#define ROUND_MAGIC 0x1.8p52
#define ULP2 0x1p-51
#define LOG2E 0x1.71547652b82fep+0
#define LN2_HI 0x1.62e42fefa39efp-1
#define LN2_LO 0x1.abc9e3b39803fp-56
#define EXP_BIG 8192.0
#define EXP_RANGE 746.0            /* exp(-746) < 2^-1075 */
#define EXP_RANGE_WEIGHTED 2200.0  /* weights span 2^2098 = exp(1454) */
#define EXACT_COARSE PTRDIFF_MAX   /* 2^-103 n is small enough for any n */
#define EXP2 0x1.000000000000ap-1
#define EXP3 0x1.555555555550dp-3
#define EXP4 0x1.55555555507bap-5
#define EXP5 0x1.1111111124537p-7
#define EXP6 0x1.6c16c18431a2bp-10
#define EXP7 0x1.a01a013854a76p-13
#define EXP8 0x1.a0199a2196553p-16
#define EXP9 0x1.71df0cb567f7bp-19
#define EXP10 0x1.28ad4c5e434aap-22
#define EXP11 0x1.ad9f075717daap-26
#endif

/* The constants of a row: what is subtracted, the clamp, and ROUND_MAGIC + M. */
typedef struct {
    real c, lo, m2;
} exp_ref;
typedef struct {
    vec c, lo, m2;
} exp_vref;

FSM_INLINE exp_ref exp_reference(real m, real range) {
    real c = (m < 0 ? -m : m) >= EXP_BIG ? m : 0, d = m - c;
    return (exp_ref){c, d - range, d * LOG2E + ROUND_MAGIC};
}

FSM_INLINE exp_vref exp_broadcast(exp_ref r) { return (exp_vref){v_set1(r.c), v_set1(r.lo), v_set1(r.m2)}; }

/* Returns p in [0.70, 1.42], and n: exp(x - c) / 2^M = p 2^n. NaN is read as the clamp: rows that have one are finished elsewhere. */
FSM_INLINE vec exp_parts(vec x, exp_vref ref, vec *n) {
    vec d = v_max(v_sub(x, ref.c), ref.lo);
    vec t = v_fma(d, v_set1(LOG2E), v_set1(ROUND_MAGIC));
    vec k = v_sub(t, v_set1(ROUND_MAGIC));
    vec r = v_fnma(k, v_set1(LN2_LO), v_fnma(k, v_set1(LN2_HI), d));
    *n = v_sub(t, ref.m2);
#if FSM_BITS == 32
    vec p = v_set1(EXP6);
    p = v_fma(p, r, v_set1(EXP5));
#else
    vec p = v_set1(EXP11);
    p = v_fma(p, r, v_set1(EXP10));
    p = v_fma(p, r, v_set1(EXP9));
    p = v_fma(p, r, v_set1(EXP8));
    p = v_fma(p, r, v_set1(EXP7));
    p = v_fma(p, r, v_set1(EXP6));
    p = v_fma(p, r, v_set1(EXP5));
#endif
    p = v_fma(p, r, v_set1(EXP4));
    p = v_fma(p, r, v_set1(EXP3));
    p = v_fma(p, r, v_set1(EXP2));
    p = v_fma(p, r, v_set1(1));
    return v_fma(p, r, v_set1(1));
}

FSM_INLINE vec exp_vec(vec x, exp_vref ref) {
    vec n, p = exp_parts(x, ref, &n);
    return v_scalb(p, n);
}

/* ---- the exact sum ---- */

#undef FOLD_EVERY
#define FOLD_EVERY 256 /* additions to a vsum before its lanes could overflow: 256 * 1.42 * 2^22 < 2^31 */

typedef struct {
    ivec part[3];
} vsum;

FSM_INLINE vsum vsum_zero(void) { return (vsum){{v_set1_int(0), v_set1_int(0), v_set1_int(0)}}; }

/* base: 2 for e in [0, 1.42], 3 for |e| < 1. fine: the third level. */
FSM_INLINE void vsum_add(vsum *s, vec e, real base, int fine) {
    vec t = v_add(e, v_set1(base));
    vec u = v_sub(e, v_sub(t, v_set1(base + 3 * ULP2)));
    s->part[0] = v_add_int(s->part[0], v_bits(t));
    s->part[1] = v_add_int(s->part[1], v_bits(u));
    if (fine) { /* what u dropped, exact, + 3 ulp(u) */
        vec left = v_sub(v_sub(e, v_sub(t, v_set1(base))), v_sub(u, v_set1(3 * ULP2)));
        s->part[2] = v_add_int(s->part[2], v_bits(v_add(left, v_set1(3 * ULP2 * ULP2))));
    }
}

/* The counts of one part after `adds` additions, the bits of the constants taken off. */
FSM_INLINE ivec vsum_int(const vsum *s, int part, ptrdiff_t adds, real base) {
    static const real zero[3] = {0, 3 * ULP2, 3 * ULP2 * ULP2};
    real z = part ? zero[part] : base;
    bits_t b;
    memcpy(&b, &z, sizeof b);
#if FSM_BITS == 32
    return v_sub_int(s->part[part], v_set1_int((int32_t)((uint32_t)b * (uint32_t)adds)));
#else
    return v_sub_int(s->part[part], v_set1_int((int64_t)((uint64_t)b * (uint64_t)adds)));
#endif
}

/* Into 64 bits (float32), or a pair of 32 low bits and the rest, so that 2^31 rows of folds fit (float64). */
FSM_INLINE void sum_fold(fsm_exact_sum *sum, int lane, int part, int64_t count) {
#if FSM_BITS == 32
    sum->parts[2 * part][lane] += count;
#else
    sum->parts[2 * part][lane] += count & 0xffffffff;
    sum->parts[2 * part + 1][lane] += count >> 32;
#endif
}

typedef struct {
    double hi, lo;
} FSM_NAME(pair);

/* The sum as hi + lo; lo matters for float64 only. */
FSM_INLINE FSM_NAME(pair) sum_value(const fsm_exact_sum *sum, int lane) {
#if FSM_BITS == 32
    double s = (double)sum->parts[2][lane] * 0x1p-44 + (double)sum->parts[4][lane] * 0x1p-66;
    return (f32_pair){(double)sum->parts[0][lane] * 0x1p-22 + s, 0};
#else
    int64_t low = sum->parts[0][lane], high = sum->parts[1][lane] + (low >> 32);
    double a = (double)high * 0x1p-19, b = (double)(low & 0xffffffff) * 0x1p-51, s = a + b;
    double rest = (b - (s - a)) + ((double)sum->parts[3][lane] * 0x1p-70 + (double)sum->parts[2][lane] * 0x1p-102);
    double hi = s + rest;
    return (f64_pair){hi, rest - (hi - s)};
#endif
}

/* Takes one e off the sum, exactly: what remains when it is, say, the largest. */
FSM_INLINE void sum_without(fsm_exact_sum *sum, int lane, real e, int fine) {
    real t = e + 2, u = e - (t - (2 + 3 * ULP2)), w = ((e - (t - 2)) - (u - 3 * ULP2)) + 3 * ULP2 * ULP2;
    real part[3] = {t, u, w}, zero[3] = {2, 3 * ULP2, 3 * ULP2 * ULP2};
    for (int j = 0; j < (fine ? 3 : 2); j++) {
        bits_t a, b;
        memcpy(&a, &part[j], sizeof a);
        memcpy(&b, &zero[j], sizeof b);
        sum_fold(sum, lane, j, (int64_t)b - (int64_t)a);
    }
}
