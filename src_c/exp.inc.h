/* exp and the exact sum, the mathematics under every kernel, for FSM_TYPE (vec.h). No libm; every
 * fma is written out.
 *
 * exp(x - m) without rounding x - m
 * ---------------------------------
 * The error of the other libraries comes from rounding x - m, m the row's maximum, before exp. Here
 *
 *     e = exp(x - m) = 2^n exp(r),    n = rint(x log2 e - m log2 e),    r = x - m - n ln2,
 *
 * |r| <= 0.34664, and r is put together from parts that are exact (Cody & Waite's reduction, shared
 * between x and m): with q = m log2 e rounded to a multiple of 1/64
 *
 *     r = s + low,    s = x - (n + q) LN2_HI,    low = -n LN2_LO - (m - q LN2_HI)
 *
 * The bracket, at most 0.0055, is a constant of the row. LN2_HI has 17 bits (float64: 33), so it
 * and s are multiples of a number so coarse that they are exact; only in x below 1/4 there may be
 * finer bits, and a rounding of 2^-26 (2^-55). low is small, and its rounding smaller than 2^-32
 * (2^-61). For |m| >= EXP_BIG the plain difference x - m takes the place of x and 0 that of m: it
 * is exact wherever the result is not 0 (Sterbenz: x is within a factor of 2 of m). One code serves
 * both: d = x - c with c = 0 or m. d is clamped at EXP_RANGE below the maximum, where e is 0, so
 * that -inf needs no branch.
 *
 * p = 1 + (s + (r^2 q(r) + low)) is a minimax polynomial (derive_exp.py), added up so that next to
 * the rounding of e itself there is one of 2^-26 (2^-55) only, and, where |x| < 1/4 and m is not 0,
 * that of s. Relative to exp(x - m), in units of 2^-24 (2^-53), at the bottom of p's range, 0.707,
 * where all weigh most: 0.707 for e, 0.354 for each of the others, 0.05 for the polynomial. e is within
 * 1.5; 1.25 where m is 0 (tests/test_exp.py), 1.47 is the worst that was found (tests/test_accuracy.py,
 * test_the_worst_exp_of_a_row). At the maximum r = 0 and e = 1, exactly. e = fma(p - 1, 2^n, 2^n) is
 * rounded once, and once more if it is subnormal; nothing is flushed.
 *
 * A sum that has no order
 * -----------------------
 * e lies in [0, 1] and is split exactly, by two additions to constants whose ulp is the grain
 * wanted:
 *
 *     t = e + 2                     a multiple of ULP2 = ulp(2) = 2^-22 (2^-51)
 *     u = e - (t - (2 + 3 ULP2))    what is left, + 3 ULP2, to a multiple of 2^-44 (2^-102)
 *
 * The bits of t, less those of 2, count the multiples, and so do those of u, less those of 3 ULP2.
 *
 * Integer addition is associative: vector width, blocking, threads and order of the elements cannot
 * change a bit of the sum. What is dropped is at most 2^-45 (2^-103) per element. Float32 rows
 * longer than EXACT_COARSE take a third level, 2^-66, so that the sum, at least 1, is always good
 * to 2^-28. Terms of either sign, |e| < 1, use 3 in the place of 2. */

#define LOG2E FSM_NAME(LOG2E)
#define LN2_HI FSM_NAME(LN2_HI)
#define LN2_LO FSM_NAME(LN2_LO)
#define EXP2 FSM_NAME(EXP2)
#define EXP3 FSM_NAME(EXP3)
#define EXP4 FSM_NAME(EXP4)
#define EXP5 FSM_NAME(EXP5)
#define EXP6 FSM_NAME(EXP6)
#define POW1 FSM_NAME(POW1)
#define POW2 FSM_NAME(POW2)
#define POW3 FSM_NAME(POW3)
#define POW4 FSM_NAME(POW4)
#define POW5 FSM_NAME(POW5)
#define POW_LEAST FSM_NAME(POW_LEAST)
#define GRID_MAGIC FSM_NAME(GRID_MAGIC)
#define ULP2 FSM_NAME(ULP2)
#define EXP_BIG FSM_NAME(EXP_BIG)
#define EXP_RANGE FSM_NAME(EXP_RANGE)
#define EXP_NORMAL FSM_NAME(EXP_NORMAL)
#define LEAST_EXPONENT FSM_NAME(LEAST_EXPONENT)
#define UNIT_EXPONENT FSM_NAME(UNIT_EXPONENT)
#define UNITS FSM_NAME(UNITS)
#define LEAST_NORMAL FSM_NAME(LEAST_NORMAL)
#define FAR_BELOW FSM_NAME(FAR_BELOW)
#define LEAST_REST FSM_NAME(LEAST_REST)
#define LIFT FSM_NAME(LIFT)
#define LIFTED_UNIT FSM_NAME(LIFTED_UNIT)
#define WEIGHTED_RANGE FSM_NAME(WEIGHTED_RANGE)
#define EXACT_COARSE FSM_NAME(EXACT_COARSE)

#define real_fma FSM_NAME(real_fma)
#define exp_ref FSM_NAME(exp_ref)
#define exp_vref FSM_NAME(exp_vref)
#define exp_reference FSM_NAME(exp_reference)
#define exp_broadcast FSM_NAME(exp_broadcast)
#define exp_mid FSM_NAME(exp_mid)
#define exp_power FSM_NAME(exp_power)
#define exp_split FSM_NAME(exp_split)
#define exp_begin FSM_NAME(exp_begin)
#define exp_less_one FSM_NAME(exp_less_one)
#define from_units FSM_NAME(from_units)
#define to_units FSM_NAME(to_units)
#define exp_end FSM_NAME(exp_end)
#define exp_vec FSM_NAME(exp_vec)
#define pow2 FSM_NAME(pow2)
#define pair FSM_NAME(pair)
#define vsum FSM_NAME(vsum)
#define vsum_zero FSM_NAME(vsum_zero)
#define vsum_add FSM_NAME(vsum_add)
#define vsum_int FSM_NAME(vsum_int)
#define sum_fold FSM_NAME(sum_fold)
#define sum_value FSM_NAME(sum_value)
#define sum_less_one FSM_NAME(sum_less_one)

/* The constants of a row: what is subtracted first, the clamp, (m - c) log2 e, q, and q LN2_HI - (m
 * - c). */
typedef struct {
    real c, lo, ml, q, rest;
} exp_ref;
typedef struct {
    vec c, lo, ml, q, rest;
} exp_vref;

/* The fma is exact: q LN2_HI and m - c differ by less than 0.0055, and neither has bits below
 * 2^-23 (float64: 2^-39) or the last one of m. */
FSM_INLINE exp_ref exp_reference(real m, real range) {
    const real c = (m < 0 ? -m : m) >= EXP_BIG ? m : 0, d = m - c, ml = d * LOG2E;
    const real q = (ml + GRID_MAGIC) - GRID_MAGIC;
    return (exp_ref){c, d - range, ml, q, real_fma(q, LN2_HI, -d)};
}

FSM_INLINE exp_vref exp_broadcast(exp_ref r) {
    return (exp_vref){v_set1(r.c), v_set1(r.lo), v_set1(r.ml), v_set1(r.q), v_set1(r.rest)};
}

/* exp in two halves, x -> (s, low, r, n) -> e. A loop that begins one vector while it ends the one
 * before has chains half as long, which a processor overlaps better (softmax.inc.h). NaN is read as
 * the clamp: rows that have one are finished elsewhere. What is known of a row saves operations:
 * shift == 0 that c is 0, normal == 1 that x is within EXP_NORMAL of the maximum, so that neither e
 * nor what becomes of it is subnormal (but e times the small part of 1/sum may be where the sum is
 * beyond 2^6, which costs time on Intel and changes no bit); HOLES: but for those x that are -inf, as masks leave them. The
 * clamp is then at HOLE_RANGE, where 2^n is 0 (v_exp2_hole), and with it e. */
#undef HOLES
#undef HOLE_RANGE
#define HOLES 2
#define HOLE_RANGE ((real)(-0.6931471805599453 * FSM_NAME(HOLE)))

typedef struct {
    vec s, low, r, n;
} exp_mid;

FSM_INLINE vec exp_power(vec d, exp_vref ref) { return v_rint(v_fms(d, v_set1(LOG2E), ref.ml)); }

FSM_INLINE exp_mid exp_split(vec d, vec n, exp_vref ref) {
    const vec s = v_fnma(v_add(n, ref.q), v_set1(LN2_HI), d),
              low = v_fnma(n, v_set1(LN2_LO), ref.rest);
    return (exp_mid){s, low, v_add(s, low), n};
}

FSM_INLINE exp_mid exp_begin(vec x, exp_vref ref, int shift, int normal) {
    const vec moved = shift ? v_sub(x, ref.c) : x, d = normal == 1 ? moved : v_max(moved, ref.lo);
    return exp_split(d, exp_power(d, ref), ref);
}

/* exp(r) - 1 = s + (r^2 q(r) + low): the rounding of r does not get in at first order. q by
 * Estrin's scheme. */
FSM_INLINE vec exp_less_one(exp_mid m) {
    const vec r = m.r, r2 = v_mul(r, r);
    const vec q01 = v_fma(r, v_set1(EXP3), v_set1(EXP2)),
              q23 = v_fma(r, v_set1(EXP5), v_set1(EXP4));
#if FSM_BITS == 32
    const vec q = v_fma(v_fma(r2, v_set1(EXP6), q23), r2, q01);
#else
    const vec q45 = v_fma(r, v_set1(f64_EXP7), v_set1(EXP6)),
              q67 = v_fma(r, v_set1(f64_EXP9), v_set1(f64_EXP8));
    const vec q89 = v_fma(r, v_set1(f64_EXP11), v_set1(f64_EXP10)), r4 = v_mul(r2, r2);
    const vec q = v_fma(v_fma(r4, q89, v_fma(r2, q67, q45)), r4, v_fma(r2, q23, q01));
#endif
    return v_add(m.s, v_fma(r2, q, m.low));
}

/* A multiplication that meets a subnormal number is done by microcode on Intel, 150 cycles for the
 * vector; an addition is not. So subnormal numbers are made and read as integers: their bits count
 * units of 2^-149 (2^-1074).
 *
 * y of v = y / unit, v < 2^24 (2^53), rounded to whole units: below 2^23 (2^52) by adding that; above,
 * where y is normal, its bits are those of 2 v less 24 (53) in the exponent, which is the same. */
FSM_INLINE vec from_units(vec v) {
    const vec one = v_set1(UNITS), w = v_add(v, v_max(v, one));
    return v_from_bits(v_sub_int(v_bits(w), v_bits(one)));
}

/* v of y < 2^-126 (2^-1022), exact. */
FSM_INLINE vec to_units(vec y) {
    const vec one = v_set1(UNITS);
    return v_sub(v_from_bits(v_add_int(v_bits(y), v_bits(one))), one);
}

FSM_INLINE vec exp_end(exp_mid m, int normal) {
    const vec p = exp_less_one(m), least = v_set1(LEAST_EXPONENT), in_units = v_set1(UNIT_EXPONENT);
    const vec n = normal ? m.n : v_if_less(m.n, least, v_add(m.n, in_units), m.n);
    const vec scale = normal == HOLES ? v_exp2_hole(n) : v_exp2_normal(n),
              e = v_fma(p, scale, scale);
    return normal ? e : v_if_less(m.n, least, from_units(e), e);
}

/* 2^t for t <= 0, or above by roundings; exactly 1 at 0; NaN stays NaN. t - rint(t) is exact, so the error is that of the
 * polynomial and of rounding it: 1 * 2^-24 (2^-53), relative. For attention, whose scores carry the
 * rounding of a dot product anyway. */
FSM_INLINE vec pow2(vec t) {
    t = v_max(v_set1(POW_LEAST), t);
    const vec n = v_rint(t), r = v_sub(t, n);
#if FSM_BITS == 32
    vec p = v_set1(f32_POW6);
#else
    vec p = v_set1(f64_POW11);
    p = v_fma(p, r, v_set1(f64_POW10));
    p = v_fma(p, r, v_set1(f64_POW9));
    p = v_fma(p, r, v_set1(f64_POW8));
    p = v_fma(p, r, v_set1(f64_POW7));
    p = v_fma(p, r, v_set1(f64_POW6));
#endif
    p = v_fma(p, r, v_set1(POW5));
    p = v_fma(p, r, v_set1(POW4));
    p = v_fma(p, r, v_set1(POW3));
    p = v_fma(p, r, v_set1(POW2));
    p = v_fma(p, r, v_set1(POW1));
    p = v_fma(p, r, v_set1(1));
    return v_mul(p, v_exp2(n));
}

FSM_INLINE vec exp_vec(vec x, exp_vref ref, int shift, int normal) {
    return exp_end(exp_begin(x, ref, shift, normal), normal);
}

/* ---- the exact sum ---- */

#undef FOLD_EVERY
#define FOLD_EVERY \
    256 /* additions to a vsum, at the most, before its lanes could overflow: 256 * 2^22 < 2^31 */

typedef struct {
    ivec part[3];
} vsum;

FSM_INLINE vsum vsum_zero(void) { return (vsum){{v_set1_int(0), v_set1_int(0), v_set1_int(0)}}; }

/* base: 2 for e in [0, 1], 3 for |e| < 1. normal: that no e is subnormal, of which multipliers make
 * an exception, and adders not (exp_end). fine: the third level. */
FSM_INLINE void vsum_add(vsum *s, vec e, real base, int normal, int fine) {
    vec t = normal ? v_add_m(e, v_set1(base)) : v_add(e, v_set1(base));
    vec u = v_sub(e, v_sub(t, v_set1(base + 3 * ULP2)));
    s->part[0] = v_add_int(s->part[0], v_bits(t));
    s->part[1] = v_add_int(s->part[1], v_bits(u));
    if (fine) { /* what u dropped, exact, + 3 ulp(u) */
        vec left = v_sub(v_sub(e, v_sub(t, v_set1(base))), v_sub(u, v_set1(3 * ULP2)));
        s->part[2] = v_add_int(s->part[2], v_bits(v_add(left, v_set1(3 * ULP2 * ULP2))));
    }
}

/* The counts of one part after `adds` additions, the bits of the constants taken off; modulo the
 * width of a lane, as they were added. */
FSM_INLINE ivec vsum_int(const vsum *s, int part, ptrdiff_t adds, real base) {
    const real zero[3] = {base, 3 * ULP2, 3 * ULP2 * ULP2};
    bits_t bits;
    memcpy(&bits, &zero[part], sizeof bits);
    return v_sub_int(s->part[part], v_set1_int((bits_t)((uint64_t)bits * (uint64_t)adds)));
}

/* Into 64 bits (float32), or a pair of 32 low bits and the rest, so that 2^31 folds fit
 * (float64). */
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
} pair;

/* The sum as hi + lo; lo matters for float64 only. */
FSM_INLINE pair sum_value(const fsm_exact_sum *sum, int lane) {
#if FSM_BITS == 32
    double s = (double)sum->parts[2][lane] * 0x1p-44 + (double)sum->parts[4][lane] * 0x1p-66;
    return (pair){(double)sum->parts[0][lane] * 0x1p-22 + s, 0};
#else
    int64_t low = sum->parts[0][lane], high = sum->parts[1][lane] + (low >> 32);
    double a = (double)high * 0x1p-19, b = (double)(low & 0xffffffff) * 0x1p-51, s = a + b;
    double rest = (b - (s - a)) +
                  ((double)sum->parts[3][lane] * 0x1p-70 + (double)sum->parts[2][lane] * 0x1p-102);
    double hi = s + rest;
    return (pair){hi, rest - (hi - s)};
#endif
}

/* Takes the largest term, which is 1, off the sum, and returns what is left: exact, so nothing
 * cancels when the others are small. */
FSM_INLINE double sum_less_one(fsm_exact_sum *sum, int lane) {
    sum_fold(sum, lane, 0, FSM_BITS == 32 ? -((int64_t)1 << 22) : -((int64_t)1 << 51));
    return sum_value(sum, lane).hi;
}
