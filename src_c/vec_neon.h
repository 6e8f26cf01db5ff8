/* Vector operations with NEON (the Advanced SIMD of AArch64); their meaning is in vec.h. Memory is
 * reached by memcpy, here a plain load or store, which assumes no alignment. */
#ifndef FSM_VEC_NEON_H
#define FSM_VEC_NEON_H

#include "vec.h"

#include <arm_neon.h>

enum { f32_VL = 4, f64_VL = 2, ACC_ROWS = 8, REGISTERS = 32 };
enum { f32_HOLE = -127, f64_HOLE = -1023 }; /* the bits of exp2_normal are 0 there */
typedef float32x4_t f32_vec;
typedef int32x4_t f32_ivec;
typedef float64x2_t f64_vec;
typedef int64x2_t f64_ivec;

/* There are no masks: the first n <= most elements go one by one. (most is there to be unrolled; a
 * loop to n becomes a call of memcpy.) */
FSM_INLINE void copy_first(void *to, const void *from, ptrdiff_t n, int most, ptrdiff_t size) {
    for (int i = 0; i < most; i++)
        if (i < n) memcpy((char *)to + i * size, (const char *)from + i * size, (size_t)size);
}

FSM_INLINE f32_vec f32_set1(float a) { return vdupq_n_f32(a); }
FSM_INLINE f32_vec f32_load(const void *p) {
    f32_vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
FSM_INLINE void f32_store(void *p, f32_vec a) { memcpy(p, &a, sizeof a); }
FSM_INLINE void f32_store_nt(void *p, f32_vec a) { f32_store(p, a); }
FSM_INLINE f32_vec f32_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    copy_first(&fill, p, n, 3, 4);
    return fill;
}
FSM_INLINE void f32_store_n(void *p, f32_vec a, ptrdiff_t n) { copy_first(p, &a, n, 3, 4); }
FSM_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return vaddq_f32(a, b); }
FSM_INLINE f32_vec f32_add_m(f32_vec a, f32_vec b) { return vaddq_f32(a, b); } /* the same pipes */
FSM_INLINE f32_vec f32_rint(f32_vec a) { return vrndnq_f32(a); }
FSM_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return vsubq_f32(a, b); }
FSM_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return vmulq_f32(a, b); }
FSM_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return vdivq_f32(a, b); }
FSM_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return vfmaq_f32(c, a, b); }
FSM_INLINE f32_vec f32_fms(f32_vec a, f32_vec b, f32_vec c) {
    return vfmaq_f32(vnegq_f32(c), a, b); /* -(c - a * b) would be -0 where they are equal */
}
FSM_INLINE f32_vec f32_fnma(f32_vec a, f32_vec b, f32_vec c) { return vfmsq_f32(c, a, b); }
FSM_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { /* vmaxq is NaN where either is */
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
FSM_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
FSM_INLINE f32_vec f32_abs(f32_vec a) { return vabsq_f32(a); }
FSM_INLINE f32_vec f32_exp2(f32_vec n) { /* see vec_scalar.h */
    uint32x4_t w = vreinterpretq_u32_f32(vaddq_f32(n, vdupq_n_f32(0x1.8p23f + 127 + 64)));
    return vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32(w, 23)), vdupq_n_f32(0x1p-64f));
}
FSM_INLINE f32_vec f32_exp2_normal(f32_vec n) {
    uint32x4_t w = vreinterpretq_u32_f32(vaddq_f32(n, vdupq_n_f32(0x1.8p23f + 127)));
    return vreinterpretq_f32_u32(vshlq_n_u32(w, 23));
}
FSM_INLINE f32_vec f32_exp2_hole(f32_vec n) { return f32_exp2_normal(n); }
FSM_INLINE f32_vec f32_unless(f32_vec a, f32_vec k, f32_vec b) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(b), vceqq_f32(a, k)));
}
FSM_INLINE f32_vec f32_if_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return vbslq_f32(vcltq_f32(a, b), c, d);
}
FSM_INLINE int f32_any_less(f32_vec a, f32_vec b) { return vmaxvq_u32(vcltq_f32(a, b)) != 0; }
FSM_INLINE f32_vec f32_canon(f32_vec a) { return vbslq_f32(vceqq_f32(a, a), a, vdupq_n_f32(NAN)); }
FSM_INLINE float f32_hmax(f32_vec a) { return vmaxvq_f32(a); }
FSM_INLINE float f32_hsum(f32_vec a) { return vaddvq_f32(a); }
FSM_INLINE f32_ivec f32_bits(f32_vec a) { return vreinterpretq_s32_f32(a); }
FSM_INLINE f32_vec f32_from_bits(f32_ivec a) { return vreinterpretq_f32_s32(a); }
FSM_INLINE f32_ivec f32_set1_int(int32_t a) { return vdupq_n_s32(a); }
FSM_INLINE f32_ivec f32_add_int(f32_ivec a, f32_ivec b) { return vaddq_s32(a, b); }
FSM_INLINE f32_ivec f32_sub_int(f32_ivec a, f32_ivec b) { return vsubq_s32(a, b); }
FSM_INLINE void f32_store_int(void *p, f32_ivec a) { memcpy(p, &a, sizeof a); }
FSM_INLINE int64_t f32_sum_int(f32_ivec a) { return vaddlvq_s32(a); }

FSM_INLINE f64_vec f64_set1(double a) { return vdupq_n_f64(a); }
FSM_INLINE f64_vec f64_load(const void *p) {
    f64_vec a;
    memcpy(&a, p, sizeof a);
    return a;
}
FSM_INLINE void f64_store(void *p, f64_vec a) { memcpy(p, &a, sizeof a); }
FSM_INLINE void f64_store_nt(void *p, f64_vec a) { f64_store(p, a); }
FSM_INLINE void store_fence(void) {}
FSM_INLINE f64_vec f64_load_n(const void *p, ptrdiff_t n, f64_vec fill) {
    copy_first(&fill, p, n, 1, 8);
    return fill;
}
FSM_INLINE void f64_store_n(void *p, f64_vec a, ptrdiff_t n) { copy_first(p, &a, n, 1, 8); }
FSM_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return vaddq_f64(a, b); }
FSM_INLINE f64_vec f64_add_m(f64_vec a, f64_vec b) { return vaddq_f64(a, b); }
FSM_INLINE f64_vec f64_rint(f64_vec a) { return vrndnq_f64(a); }
FSM_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return vsubq_f64(a, b); }
FSM_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return vmulq_f64(a, b); }
FSM_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return vdivq_f64(a, b); }
FSM_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return vfmaq_f64(c, a, b); }
FSM_INLINE f64_vec f64_fms(f64_vec a, f64_vec b, f64_vec c) {
    return vfmaq_f64(vnegq_f64(c), a, b);
}
FSM_INLINE f64_vec f64_fnma(f64_vec a, f64_vec b, f64_vec c) { return vfmsq_f64(c, a, b); }
FSM_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
FSM_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return vbslq_f64(vcltq_f64(a, b), a, b); }
FSM_INLINE f64_vec f64_abs(f64_vec a) { return vabsq_f64(a); }
FSM_INLINE f64_vec f64_load_int(const int64_t *p) { return vcvtq_f64_s64(vld1q_s64(p)); }
FSM_INLINE f64_vec f64_load_i32(const int32_t *p) { return vcvtq_f64_s64(vmovl_s32(vld1_s32(p))); }
FSM_INLINE f64_vec f64_load_f32(const float *p) { return vcvt_f64_f32(vld1_f32(p)); }
FSM_INLINE void f64_store_f32(float *p, f64_vec a) { vst1_f32(p, vcvt_f32_f64(a)); }
FSM_INLINE f64_vec f64_exp2(f64_vec n) {
    uint64x2_t w = vreinterpretq_u64_f64(vaddq_f64(n, vdupq_n_f64(0x1.8p52 + 1023 + 768)));
    return vmulq_f64(vreinterpretq_f64_u64(vshlq_n_u64(w, 52)), vdupq_n_f64(0x1p-768));
}
FSM_INLINE f64_vec f64_exp2_normal(f64_vec n) {
    uint64x2_t w = vreinterpretq_u64_f64(vaddq_f64(n, vdupq_n_f64(0x1.8p52 + 1023)));
    return vreinterpretq_f64_u64(vshlq_n_u64(w, 52));
}
FSM_INLINE f64_vec f64_exp2_hole(f64_vec n) { return f64_exp2_normal(n); }
FSM_INLINE f64_vec f64_unless(f64_vec a, f64_vec k, f64_vec b) {
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(b), vceqq_f64(a, k)));
}
FSM_INLINE f64_vec f64_if_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return vbslq_f64(vcltq_f64(a, b), c, d);
}
FSM_INLINE int f64_any_less(f64_vec a, f64_vec b) {
    return vmaxvq_u32(vreinterpretq_u32_u64(vcltq_f64(a, b))) != 0;
}
FSM_INLINE f64_vec f64_canon(f64_vec a) { return vbslq_f64(vceqq_f64(a, a), a, vdupq_n_f64(NAN)); }
FSM_INLINE double f64_hmax(f64_vec a) { return vmaxvq_f64(a); }
FSM_INLINE double f64_hsum(f64_vec a) { return vaddvq_f64(a); }
FSM_INLINE f64_ivec f64_bits(f64_vec a) { return vreinterpretq_s64_f64(a); }
FSM_INLINE f64_vec f64_from_bits(f64_ivec a) { return vreinterpretq_f64_s64(a); }
FSM_INLINE f64_ivec f64_set1_int(int64_t a) { return vdupq_n_s64(a); }
FSM_INLINE f64_ivec f64_add_int(f64_ivec a, f64_ivec b) { return vaddq_s64(a, b); }
FSM_INLINE f64_ivec f64_sub_int(f64_ivec a, f64_ivec b) { return vsubq_s64(a, b); }
FSM_INLINE void f64_store_int(void *p, f64_ivec a) { memcpy(p, &a, sizeof a); }
FSM_INLINE int64_t f64_sum_int(f64_ivec a) { return vaddvq_s64(a); }

/* Halves, as float32 vectors. The conversions of float16 are in every ARMv8-A and flush nothing;
 * those of bfloat16 are not, and flush. */
FSM_INLINE uint16x4_t half_load(const void *p) {
    uint16x4_t h;
    memcpy(&h, p, sizeof h);
    return h;
}
FSM_INLINE uint16x4_t half_first(const void *p, ptrdiff_t n) {
    uint16x4_t h = vdup_n_u16(0);
    copy_first(&h, p, n, 3, 2);
    return h;
}
FSM_INLINE f32_vec f32_blend_first(f32_vec a, ptrdiff_t n, f32_vec fill) {
    static const int32_t lane[4] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_s32(vld1q_s32(lane), vdupq_n_s32((int32_t)n)), a, fill);
}
FSM_INLINE f32_vec f16_widen(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
FSM_INLINE uint16x4_t f16_narrow(f32_vec a) { return vreinterpret_u16_f16(vcvt_f16_f32(a)); }
FSM_INLINE f32_vec f16_load(const void *p) { return f16_widen(half_load(p)); }
FSM_INLINE f32_vec f16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return f32_blend_first(f16_widen(half_first(p, n)), n, fill);
}
FSM_INLINE void f16_store(void *p, f32_vec a) {
    uint16x4_t h = f16_narrow(a);
    memcpy(p, &h, sizeof h);
}
FSM_INLINE void f16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    uint16x4_t h = f16_narrow(a);
    copy_first(p, &h, n, 3, 2);
}
FSM_INLINE f32_vec bf16_widen(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
FSM_INLINE uint16x4_t bf16_narrow(f32_vec a) { /* see f32_to_bf16 */
    uint32x4_t u = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
}
FSM_INLINE f32_vec bf16_load(const void *p) { return bf16_widen(half_load(p)); }
FSM_INLINE f32_vec bf16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return f32_blend_first(bf16_widen(half_first(p, n)), n, fill);
}
FSM_INLINE void bf16_store(void *p, f32_vec a) {
    uint16x4_t h = bf16_narrow(a);
    memcpy(p, &h, sizeof h);
}
FSM_INLINE void bf16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    uint16x4_t h = bf16_narrow(a);
    copy_first(p, &h, n, 3, 2);
}

FSM_INLINE void f64_transpose(f64_vec r[2]) {
    f64_vec a = vtrn1q_f64(r[0], r[1]), b = vtrn2q_f64(r[0], r[1]);
    r[0] = a;
    r[1] = b;
}

FSM_INLINE void f32_transpose(f32_vec r[4]) {
    f64_vec even[2], odd[2]; /* pairs of floats: columns 0 and 2, 1 and 3 */
    for (int i = 0; i < 2; i++) {
        even[i] = vreinterpretq_f64_f32(vtrn1q_f32(r[2 * i], r[2 * i + 1]));
        odd[i] = vreinterpretq_f64_f32(vtrn2q_f32(r[2 * i], r[2 * i + 1]));
    }
    f64_transpose(even);
    f64_transpose(odd);
    for (int i = 0; i < 2; i++) {
        r[2 * i] = vreinterpretq_f32_f64(even[i]);
        r[2 * i + 1] = vreinterpretq_f32_f64(odd[i]);
    }
}

#endif
