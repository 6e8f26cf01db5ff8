/* Vector operations in portable C, one lane; their meaning is in vec.h. fma is the one function
 * taken from libm: C11 7.12.13.1 defines its result to the bit, so it cannot vary by platform. */
#ifndef FSM_VEC_SCALAR_H
#define FSM_VEC_SCALAR_H

#include "vec.h"

enum { f32_VL = 1, f64_VL = 1, ACC_ROWS = 4, REGISTERS = 16 };
enum { f32_HOLE = -160, f64_HOLE = -1100 }; /* exp2 is 0 there */
typedef float f32_vec;
typedef int32_t f32_ivec;
typedef double f64_vec;
typedef int64_t f64_ivec;

/* Both types have the same thirty lines but for the type, its bits, and the name of fma. Sums of
 * integers wrap by design: unsigned. */
#define FSM_SCALAR_OPS(T, REAL, INT, UINT, FMA, FABS, MAGIC)                              \
    FSM_INLINE REAL T##_set1(REAL a) { return a; }                                        \
    FSM_INLINE REAL T##_load(const void *p) {                                             \
        REAL a;                                                                           \
        memcpy(&a, p, sizeof a);                                                          \
        return a;                                                                         \
    }                                                                                     \
    FSM_INLINE void T##_store(void *p, REAL a) { memcpy(p, &a, sizeof a); }               \
    FSM_INLINE void T##_store_nt(void *p, REAL a) { T##_store(p, a); }                    \
    FSM_INLINE REAL T##_load_n(const void *p, ptrdiff_t n, REAL fill) {                   \
        return n ? T##_load(p) : fill;                                                    \
    }                                                                                     \
    FSM_INLINE void T##_store_n(void *p, REAL a, ptrdiff_t n) {                           \
        if (n) T##_store(p, a);                                                           \
    }                                                                                     \
    FSM_INLINE REAL T##_add(REAL a, REAL b) { return a + b; }                             \
    FSM_INLINE REAL T##_add_m(REAL a, REAL b) { return a + b; }                           \
    FSM_INLINE REAL T##_rint(REAL a) { return (a + MAGIC) - MAGIC; }                      \
    FSM_INLINE REAL T##_sub(REAL a, REAL b) { return a - b; }                             \
    FSM_INLINE REAL T##_mul(REAL a, REAL b) { return a * b; }                             \
    FSM_INLINE REAL T##_div(REAL a, REAL b) { return a / b; }                             \
    FSM_INLINE REAL T##_fma(REAL a, REAL b, REAL c) { return FMA(a, b, c); }              \
    FSM_INLINE REAL T##_fms(REAL a, REAL b, REAL c) { return FMA(a, b, -c); }             \
    FSM_INLINE REAL T##_fnma(REAL a, REAL b, REAL c) { return FMA(-a, b, c); }            \
    FSM_INLINE REAL T##_max(REAL a, REAL b) { return a > b ? a : b; }                     \
    FSM_INLINE REAL T##_min(REAL a, REAL b) { return a < b ? a : b; }                     \
    FSM_INLINE REAL T##_abs(REAL a) { return FABS(a); }                                   \
    FSM_INLINE REAL T##_unless(REAL a, REAL k, REAL b) { return a != k ? b : 0; }         \
    FSM_INLINE REAL T##_if_less(REAL a, REAL b, REAL c, REAL d) { return a < b ? c : d; } \
    FSM_INLINE int T##_any_less(REAL a, REAL b) { return a < b; }                         \
    FSM_INLINE REAL T##_canon(REAL a) { return a == a ? a : NAN; }                        \
    FSM_INLINE REAL T##_hmax(REAL a) { return a; }                                        \
    FSM_INLINE REAL T##_hsum(REAL a) { return a; }                                        \
    FSM_INLINE INT T##_bits(REAL a) {                                                     \
        INT i;                                                                            \
        memcpy(&i, &a, sizeof i);                                                         \
        return i;                                                                         \
    }                                                                                     \
    FSM_INLINE REAL T##_from_bits(UINT u) {                                               \
        REAL a;                                                                           \
        memcpy(&a, &u, sizeof a);                                                         \
        return a;                                                                         \
    }                                                                                     \
    FSM_INLINE INT T##_set1_int(INT a) { return a; }                                      \
    FSM_INLINE INT T##_add_int(INT a, INT b) { return (INT)((UINT)a + (UINT)b); }         \
    FSM_INLINE INT T##_sub_int(INT a, INT b) { return (INT)((UINT)a - (UINT)b); }         \
    FSM_INLINE void T##_store_int(void *p, INT a) { memcpy(p, &a, sizeof a); }            \
    FSM_INLINE int64_t T##_sum_int(INT a) { return a; }                                   \
    FSM_INLINE void T##_transpose(REAL r[1]) { (void)r; }

FSM_SCALAR_OPS(f32, float, int32_t, uint32_t, fmaf, fabsf, 0x1.8p23f)
FSM_SCALAR_OPS(f64, double, int64_t, uint64_t, fma, fabs, 0x1.8p52)

/* 1.5 * 2^23 + n has n in its low bits. With the bias of the exponent, and 64 more so that it stays
 * positive for every n allowed, they become the exponent field; the product with 2^-64 rounds
 * once. */
FSM_INLINE float f32_exp2(float n) {
    return f32_from_bits((uint32_t)f32_bits(n + (0x1.8p23f + 127 + 64)) << 23) * 0x1p-64f;
}
FSM_INLINE double f64_load_int(const int64_t *p) { return (double)*p; }
FSM_INLINE double f64_load_i32(const int32_t *p) { return *p; }
FSM_INLINE double f64_load_f32(const float *p) { return *p; }
FSM_INLINE void f64_store_f32(float *p, double a) { *p = (float)a; }
FSM_INLINE void store_fence(void) {}
FSM_INLINE double f64_exp2(double n) {
    return f64_from_bits((uint64_t)f64_bits(n + (0x1.8p52 + 1023 + 768)) << 52) * 0x1p-768;
}
FSM_INLINE float f32_exp2_normal(float n) { return f32_exp2(n); }
FSM_INLINE double f64_exp2_normal(double n) { return f64_exp2(n); }
FSM_INLINE float f32_exp2_hole(float n) { return f32_exp2(n); }
FSM_INLINE double f64_exp2_hole(double n) { return f64_exp2(n); }

/* Halves. */
FSM_INLINE float f16_load(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    /* 2^112 makes up for the difference of the exponents' biases; subnormals come out right because
     * the product is exact. */
    float f = f32_from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) f = f32_from_bits(0x7f800000u | (uint32_t)(h & 0x3ff) << 13);
    return h & 0x8000 ? -f : f;
}
FSM_INLINE void f16_store(void *p, float a) {
    uint32_t u = (uint32_t)f32_bits(a), sign = u >> 16 & 0x8000, m = u & 0x7fffffff;
    uint16_t h;
    if (m > 0x7f800000) h = 0x7e00;
    else if (m >= 0x477ff000) h = 0x7c00; /* 65520 and more round to infinity */
    else if (m < 0x38800000)
        h = (uint16_t)(f32_bits(f32_from_bits(m) + 0.5f) -
                       f32_bits(0.5f)); /* ulp(0.5f) is the smallest f16 */
    else h = (uint16_t)((m + 0xfff + (m >> 13 & 1) - 0x38000000) >> 13);
    h = (uint16_t)(h | sign);
    memcpy(p, &h, 2);
}
FSM_INLINE float bf16_load(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return bf16_to_f32(h);
}
FSM_INLINE void bf16_store(void *p, float a) {
    uint16_t h = f32_to_bf16(a);
    memcpy(p, &h, 2);
}
FSM_INLINE float f16_load_n(const void *p, ptrdiff_t n, float fill) {
    return n ? f16_load(p) : fill;
}
FSM_INLINE float bf16_load_n(const void *p, ptrdiff_t n, float fill) {
    return n ? bf16_load(p) : fill;
}
FSM_INLINE void f16_store_n(void *p, float a, ptrdiff_t n) {
    if (n) f16_store(p, a);
}
FSM_INLINE void bf16_store_n(void *p, float a, ptrdiff_t n) {
    if (n) bf16_store(p, a);
}

#endif
