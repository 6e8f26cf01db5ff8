/* The names under which the templates (*.inc.h) use vectors and constants. FSM_TYPE, f32 or f64, is
 * set around each inclusion of a template, and v_add there means f32_add or f64_add of the vec_*.h
 * that the isa_*.c has chosen. Each vec_*.h defines all of these, for both types:
 *
 *     vec, ivec          a vector of FSM_TYPE, and of integers of the same width; VL lanes
 *     v_load, v_store    contiguous, any alignment; _n: the first n < VL lanes only, the others are
 *                        read as `fill` and no byte of them is touched
 *     v_store_nt         v_store past the caches, to where p is a multiple of the vector; after the
 *                        last one store_fence(), before another thread may look
 *     v_fma(a, b, c)     a * b + c; v_fms: a * b - c; v_fnma: c - a * b; each rounded once
 *     v_add_m(a, b)      a + b, done by the multipliers where these and the adders are apart (AMD
 *                        Zen): balances a loop full of additions
 *     v_rint(a)          the nearest integer, ties to even; |a| < 2^22 (float64: 2^51)
 *     v_max(a, b)        a > b ? a : b, so b where either is NaN
 *     v_min(a, b)        a < b ? a : b
 *     v_exp2(n)          2^n, rounded to even below the smallest subnormal: 0, and on x86 got
 *                        without meeting one (exp_end); n an integer in [-190, 62] (float64:
 *                        [-1600, 254])
 *     v_exp2_normal(n)   the same for a normal 2^n
 *     v_exp2_hole(n)     the same, and 0 at n = HOLE, a constant of each vec_*.h
 *     v_unless(a, k, b)  a != k ? b : 0
 *     v_if_less(a, b, c, d)  a < b ? c : d, so d where a or b is NaN
 *     v_any_less(a, b)   whether a < b in some lane
 *     v_canon(a)         a, its NaNs made the canonical one
 *     v_sum_int          the sum of the lanes of an ivec, as signed integers, in 64 bits
 *     f64_load_int       f64_VL integers of 64 bits, of less than 2^51, as float64
 *     f64_load_i32       the same of 32 bits
 *     f64_load_f32, f64_store_f32   f64_VL elements of float32, widened and rounded
 *     v_transpose        VL vectors as a square matrix
 *     ACC_ROWS           times 3 vectors, and 4 more, fit the registers: the tile of a matrix product
 *     REGISTERS          of vectors that there are
 */
#ifndef FSM_VEC_H
#define FSM_VEC_H

#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(_MSC_VER)
#define FSM_INLINE static __forceinline
#define FSM_APART static __declspec(noinline)
#else
#define FSM_INLINE static inline __attribute__((always_inline))
/* A loop that wants all registers to itself, and is there once. */
#if defined(__clang__)
#define FSM_APART static __attribute__((noinline))
#else
#define FSM_APART static __attribute__((noinline, noclone))
#endif
#endif

#if defined(__GNUC__)
#define FSM_PRAGMA(text) _Pragma(#text)
#define FSM_UNROLL(n) FSM_PRAGMA(GCC unroll n)
#define FSM_PREFETCH(p) __builtin_prefetch(p, 0, 2) /* to read, into the second-level cache */
#define FSM_NONNULL __attribute__((nonnull))        /* so that loops need not look */
#else
#define FSM_UNROLL(n)
#define FSM_PREFETCH(p) (void)(p)
#define FSM_NONNULL
#endif

#define FSM_PASTE_(a, b) a##_##b
#define FSM_PASTE(a, b) FSM_PASTE_(a, b)
#define FSM_NAME(name) FSM_PASTE(FSM_TYPE, name)

#define real FSM_NAME(real)
#define bits_t FSM_NAME(bits_t)
#define vec FSM_NAME(vec)
#define ivec FSM_NAME(ivec)
#define VL FSM_NAME(VL)

#define v_set1 FSM_NAME(set1)
#define v_load FSM_NAME(load)
#define v_store FSM_NAME(store)
#define v_store_nt FSM_NAME(store_nt)
#define v_load_n FSM_NAME(load_n)
#define v_store_n FSM_NAME(store_n)
#define v_add FSM_NAME(add)
#define v_add_m FSM_NAME(add_m)
#define v_sub FSM_NAME(sub)
#define v_mul FSM_NAME(mul)
#define v_div FSM_NAME(div)
#define v_fma FSM_NAME(fma)
#define v_fms FSM_NAME(fms)
#define v_fnma FSM_NAME(fnma)
#define v_max FSM_NAME(max)
#define v_min FSM_NAME(min)
#define v_abs FSM_NAME(abs)
#define v_rint FSM_NAME(rint)
#define v_exp2 FSM_NAME(exp2)
#define v_exp2_normal FSM_NAME(exp2_normal)
#define v_exp2_hole FSM_NAME(exp2_hole)
#define v_unless FSM_NAME(unless)
#define v_if_less FSM_NAME(if_less)
#define v_any_less FSM_NAME(any_less)
#define v_canon FSM_NAME(canon)
#define v_hmax FSM_NAME(hmax)
#define v_hsum FSM_NAME(hsum)
#define v_transpose FSM_NAME(transpose)
#define v_bits FSM_NAME(bits)
#define v_from_bits FSM_NAME(from_bits)
#define v_add_int FSM_NAME(add_int)
#define v_sub_int FSM_NAME(sub_int)
#define v_set1_int FSM_NAME(set1_int)
#define v_store_int FSM_NAME(store_int)
#define v_sum_int FSM_NAME(sum_int)

typedef float f32_real;
typedef int32_t f32_bits_t;
typedef double f64_real;
typedef int64_t f64_bits_t;

FSM_INLINE float f32_real_fma(float a, float b, float c) { return fmaf(a, b, c); }
FSM_INLINE double f64_real_fma(double a, double b, double c) { return fma(a, b, c); }

/* Scalar conversions, the same on every ISA. Half to float is exact; float to half rounds to
 * nearest even. */

FSM_INLINE float bf16_to_f32(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* The NaNs that come here are canonical (0x7fc00000): the rounding increment cannot carry out of
 * them. */
FSM_INLINE uint16_t f32_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* Rounds to odd, so that a second rounding to a half gives what one rounding would have given
 * (Boldo & Melquiond 2008). */
FSM_INLINE float f64_to_f32_odd(double d) {
    float f = (float)d;
    uint32_t u;
    if ((double)f == d || d != d) return f;
    memcpy(&u, &f, sizeof u);
    if ((u & 1) == 0) {
        u += fabs((double)f) > fabs(d)
                 ? -1
                 : +1; /* the odd neighbour, on d's side; |f| = inf steps back to the largest */
        memcpy(&f, &u, sizeof f);
    }
    return f;
}

#endif
