/* Vector operations with AVX-512 (F, BW, DQ, VL); their meaning is in vec.h. */
#ifndef FSM_VEC_AVX512_H
#define FSM_VEC_AVX512_H

#include "vec.h"

#include <immintrin.h>

enum { f32_VL = 16, f64_VL = 8, ACC_ROWS = 8, REGISTERS = 32 };
enum { f32_HOLE = -160, f64_HOLE = -1100 }; /* exp2 is 0 there */
typedef __m512 f32_vec;
typedef __m512i f32_ivec;
typedef __m512d f64_vec;
typedef __m512i f64_ivec;

FSM_INLINE __mmask16 f32_first(ptrdiff_t n) { return (__mmask16)((1u << n) - 1); }
FSM_INLINE __mmask8 f64_first(ptrdiff_t n) { return (__mmask8)((1u << n) - 1); }

FSM_INLINE f32_vec f32_set1(float a) { return _mm512_set1_ps(a); }
FSM_INLINE f32_vec f32_load(const void *p) { return _mm512_loadu_ps(p); }
FSM_INLINE void f32_store(void *p, f32_vec a) { _mm512_storeu_ps(p, a); }
FSM_INLINE void f32_store_nt(void *p, f32_vec a) { _mm512_stream_ps(p, a); }
FSM_INLINE f32_vec f32_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return _mm512_mask_loadu_ps(fill, f32_first(n), p);
}
FSM_INLINE void f32_store_n(void *p, f32_vec a, ptrdiff_t n) {
    _mm512_mask_storeu_ps(p, f32_first(n), a);
}
FSM_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return _mm512_add_ps(a, b); }
FSM_INLINE f32_vec f32_add_m(f32_vec a, f32_vec b) {
    return _mm512_fmadd_ps(a, _mm512_set1_ps(1), b);
}
FSM_INLINE f32_vec f32_rint(f32_vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FSM_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return _mm512_sub_ps(a, b); }
FSM_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return _mm512_mul_ps(a, b); }
FSM_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return _mm512_div_ps(a, b); }
FSM_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return _mm512_fmadd_ps(a, b, c); }
FSM_INLINE f32_vec f32_fms(f32_vec a, f32_vec b, f32_vec c) { return _mm512_fmsub_ps(a, b, c); }
FSM_INLINE f32_vec f32_fnma(f32_vec a, f32_vec b, f32_vec c) { return _mm512_fnmadd_ps(a, b, c); }
FSM_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return _mm512_max_ps(a, b); }
FSM_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return _mm512_min_ps(a, b); }
FSM_INLINE f32_vec f32_abs(f32_vec a) { return _mm512_abs_ps(a); }
FSM_INLINE f32_vec f32_exp2_normal(f32_vec n) { return _mm512_scalef_ps(_mm512_set1_ps(1), n); }
FSM_INLINE f32_vec f32_exp2(f32_vec n) {
    const __mmask16 some = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-150), _CMP_NLE_UQ);
    return _mm512_maskz_scalef_ps(some, _mm512_set1_ps(1), n);
}
FSM_INLINE f32_vec f32_exp2_hole(f32_vec n) { return f32_exp2(n); }
FSM_INLINE f32_vec f32_unless(f32_vec a, f32_vec k, f32_vec b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, k, _CMP_NEQ_UQ), b);
}
FSM_INLINE f32_vec f32_if_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return _mm512_mask_mov_ps(d, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), c);
}
FSM_INLINE int f32_any_less(f32_vec a, f32_vec b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0;
}
FSM_INLINE f32_vec f32_canon(f32_vec a) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(NAN), _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a);
}
FSM_INLINE float f32_hmax(f32_vec a) { return _mm512_reduce_max_ps(a); }
FSM_INLINE float f32_hsum(f32_vec a) { return _mm512_reduce_add_ps(a); }
FSM_INLINE f32_ivec f32_bits(f32_vec a) { return _mm512_castps_si512(a); }
FSM_INLINE f32_vec f32_from_bits(f32_ivec a) { return _mm512_castsi512_ps(a); }
FSM_INLINE f32_ivec f32_set1_int(int32_t a) { return _mm512_set1_epi32(a); }
FSM_INLINE f32_ivec f32_add_int(f32_ivec a, f32_ivec b) { return _mm512_add_epi32(a, b); }
FSM_INLINE f32_ivec f32_sub_int(f32_ivec a, f32_ivec b) { return _mm512_sub_epi32(a, b); }
FSM_INLINE void f32_store_int(void *p, f32_ivec a) { _mm512_storeu_si512(p, a); }
/* Additions of vectors to the end: they wrap, where the last one of _mm512_reduce_add_epi64 is C's. */
FSM_INLINE int64_t f64_sum_int(f64_ivec a) {
    __m256i b = _mm256_add_epi64(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i c = _mm_add_epi64(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(c, _mm_unpackhi_epi64(c, c)));
}
FSM_INLINE int64_t f32_sum_int(f32_ivec a) {
    return f64_sum_int(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(a)),
                                        _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(a, 1))));
}

FSM_INLINE f64_vec f64_set1(double a) { return _mm512_set1_pd(a); }
FSM_INLINE f64_vec f64_load(const void *p) { return _mm512_loadu_pd(p); }
FSM_INLINE void f64_store(void *p, f64_vec a) { _mm512_storeu_pd(p, a); }
FSM_INLINE void f64_store_nt(void *p, f64_vec a) { _mm512_stream_pd(p, a); }
FSM_INLINE void store_fence(void) { _mm_sfence(); }
FSM_INLINE f64_vec f64_load_n(const void *p, ptrdiff_t n, f64_vec fill) {
    return _mm512_mask_loadu_pd(fill, f64_first(n), p);
}
FSM_INLINE void f64_store_n(void *p, f64_vec a, ptrdiff_t n) {
    _mm512_mask_storeu_pd(p, f64_first(n), a);
}
FSM_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return _mm512_add_pd(a, b); }
FSM_INLINE f64_vec f64_add_m(f64_vec a, f64_vec b) {
    return _mm512_fmadd_pd(a, _mm512_set1_pd(1), b);
}
FSM_INLINE f64_vec f64_rint(f64_vec a) {
    return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FSM_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return _mm512_sub_pd(a, b); }
FSM_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return _mm512_mul_pd(a, b); }
FSM_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return _mm512_div_pd(a, b); }
FSM_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return _mm512_fmadd_pd(a, b, c); }
FSM_INLINE f64_vec f64_fms(f64_vec a, f64_vec b, f64_vec c) { return _mm512_fmsub_pd(a, b, c); }
FSM_INLINE f64_vec f64_fnma(f64_vec a, f64_vec b, f64_vec c) { return _mm512_fnmadd_pd(a, b, c); }
FSM_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return _mm512_max_pd(a, b); }
FSM_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return _mm512_min_pd(a, b); }
FSM_INLINE f64_vec f64_abs(f64_vec a) { return _mm512_abs_pd(a); }
FSM_INLINE f64_vec f64_load_int(const int64_t *p) {
    return _mm512_cvtepi64_pd(_mm512_loadu_si512(p));
}
FSM_INLINE f64_vec f64_load_i32(const int32_t *p) {
    return _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i *)p));
}
FSM_INLINE f64_vec f64_load_f32(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
FSM_INLINE void f64_store_f32(float *p, f64_vec a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
FSM_INLINE f64_vec f64_exp2_normal(f64_vec n) { return _mm512_scalef_pd(_mm512_set1_pd(1), n); }
FSM_INLINE f64_vec f64_exp2(f64_vec n) {
    const __mmask8 some = _mm512_cmp_pd_mask(n, _mm512_set1_pd(-1075), _CMP_NLE_UQ);
    return _mm512_maskz_scalef_pd(some, _mm512_set1_pd(1), n);
}
FSM_INLINE f64_vec f64_exp2_hole(f64_vec n) { return f64_exp2(n); }
FSM_INLINE f64_vec f64_unless(f64_vec a, f64_vec k, f64_vec b) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, k, _CMP_NEQ_UQ), b);
}
FSM_INLINE f64_vec f64_if_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return _mm512_mask_mov_pd(d, _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), c);
}
FSM_INLINE int f64_any_less(f64_vec a, f64_vec b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ) != 0;
}
FSM_INLINE f64_vec f64_canon(f64_vec a) {
    return _mm512_mask_mov_pd(_mm512_set1_pd(NAN), _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q), a);
}
FSM_INLINE double f64_hmax(f64_vec a) { return _mm512_reduce_max_pd(a); }
FSM_INLINE double f64_hsum(f64_vec a) { return _mm512_reduce_add_pd(a); }
FSM_INLINE f64_ivec f64_bits(f64_vec a) { return _mm512_castpd_si512(a); }
FSM_INLINE f64_vec f64_from_bits(f64_ivec a) { return _mm512_castsi512_pd(a); }
FSM_INLINE f64_ivec f64_set1_int(int64_t a) { return _mm512_set1_epi64(a); }
FSM_INLINE f64_ivec f64_add_int(f64_ivec a, f64_ivec b) { return _mm512_add_epi64(a, b); }
FSM_INLINE f64_ivec f64_sub_int(f64_ivec a, f64_ivec b) { return _mm512_sub_epi64(a, b); }
FSM_INLINE void f64_store_int(void *p, f64_ivec a) { _mm512_storeu_si512(p, a); }

/* Halves, as float32 vectors. */
FSM_INLINE f32_vec f16_load(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
FSM_INLINE f32_vec f16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return _mm512_mask_cvtph_ps(fill, f32_first(n), _mm256_maskz_loadu_epi16(f32_first(n), p));
}
FSM_INLINE void f16_store(void *p, f32_vec a) {
    _mm256_storeu_si256(p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FSM_INLINE void f16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, f32_first(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FSM_INLINE f32_vec bf16_widen(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
FSM_INLINE __m256i
bf16_narrow(f32_vec a) { /* not vcvtneps2bf16, which flushes subnormals; see f32_to_bf16 */
    __m512i u = _mm512_castps_si512(a),
            odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(
        _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16));
}
FSM_INLINE f32_vec bf16_load(const void *p) { return bf16_widen(_mm256_loadu_si256(p)); }
FSM_INLINE f32_vec bf16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return _mm512_mask_mov_ps(fill, f32_first(n),
                              bf16_widen(_mm256_maskz_loadu_epi16(f32_first(n), p)));
}
FSM_INLINE void bf16_store(void *p, f32_vec a) { _mm256_storeu_si256(p, bf16_narrow(a)); }
FSM_INLINE void bf16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    _mm256_mask_storeu_epi16(p, f32_first(n), bf16_narrow(a));
}

FSM_INLINE void f32_transpose(f32_vec r[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 4) { /* 4x4 blocks inside each 128-bit lane */
        __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
        __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]),
               d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i + 0] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) { /* then the lanes themselves */
        __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
               b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
        __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88),
               d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

FSM_INLINE void f64_transpose(f64_vec r[8]) {
    __m512d t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        __m512d a = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88),
                b = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
        __m512d c = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88),
                d = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
        r[i] = _mm512_shuffle_f64x2(a, c, 0x88);
        r[i + 4] = _mm512_shuffle_f64x2(a, c, 0xdd);
        r[i + 2] = _mm512_shuffle_f64x2(b, d, 0x88);
        r[i + 6] = _mm512_shuffle_f64x2(b, d, 0xdd);
    }
}

#endif
