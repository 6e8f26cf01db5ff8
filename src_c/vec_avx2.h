/* Vector operations with AVX2, FMA and F16C; their meaning is in vec.h. */
#ifndef FSM_VEC_AVX2_H
#define FSM_VEC_AVX2_H

#include "vec.h"

#include <immintrin.h>

enum { f32_VL = 8, f64_VL = 4, ACC_ROWS = 4, REGISTERS = 16 };
enum { f32_HOLE = -127, f64_HOLE = -1023 }; /* the bits of exp2_normal are 0 there */
typedef __m256 f32_vec;
typedef __m256i f32_ivec;
typedef __m256d f64_vec;
typedef __m256i f64_ivec;

/* The first n lanes set. vmaskmov does not touch the memory of the others. */
FSM_INLINE __m256i f32_first(ptrdiff_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FSM_INLINE __m256i f64_first(ptrdiff_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

FSM_INLINE f32_vec f32_set1(float a) { return _mm256_set1_ps(a); }
FSM_INLINE f32_vec f32_load(const void *p) { return _mm256_loadu_ps(p); }
FSM_INLINE void f32_store(void *p, f32_vec a) { _mm256_storeu_ps(p, a); }
FSM_INLINE void f32_store_nt(void *p, f32_vec a) { _mm256_stream_ps(p, a); }
FSM_INLINE f32_vec f32_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    __m256i m = f32_first(n);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
FSM_INLINE void f32_store_n(void *p, f32_vec a, ptrdiff_t n) {
    _mm256_maskstore_ps(p, f32_first(n), a);
}
FSM_INLINE f32_vec f32_add(f32_vec a, f32_vec b) { return _mm256_add_ps(a, b); }
FSM_INLINE f32_vec f32_add_m(f32_vec a, f32_vec b) {
    return _mm256_fmadd_ps(a, _mm256_set1_ps(1), b);
}
FSM_INLINE f32_vec f32_rint(f32_vec a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FSM_INLINE f32_vec f32_sub(f32_vec a, f32_vec b) { return _mm256_sub_ps(a, b); }
FSM_INLINE f32_vec f32_mul(f32_vec a, f32_vec b) { return _mm256_mul_ps(a, b); }
FSM_INLINE f32_vec f32_div(f32_vec a, f32_vec b) { return _mm256_div_ps(a, b); }
FSM_INLINE f32_vec f32_fma(f32_vec a, f32_vec b, f32_vec c) { return _mm256_fmadd_ps(a, b, c); }
FSM_INLINE f32_vec f32_fms(f32_vec a, f32_vec b, f32_vec c) { return _mm256_fmsub_ps(a, b, c); }
FSM_INLINE f32_vec f32_fnma(f32_vec a, f32_vec b, f32_vec c) { return _mm256_fnmadd_ps(a, b, c); }
FSM_INLINE f32_vec f32_max(f32_vec a, f32_vec b) { return _mm256_max_ps(a, b); }
FSM_INLINE f32_vec f32_min(f32_vec a, f32_vec b) { return _mm256_min_ps(a, b); }
FSM_INLINE f32_vec f32_abs(f32_vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FSM_INLINE f32_vec f32_exp2(f32_vec n) { /* see vec_scalar.h; an exponent field of 0 is 0 */
    const __m256i zero = _mm256_castps_si256(_mm256_set1_ps(0x1.8p23f)),
                  w = _mm256_castps_si256(_mm256_add_ps(n, _mm256_set1_ps(0x1.8p23f + 150)));
    const __m256i power = _mm256_slli_epi32(_mm256_max_epi32(w, zero), 23);
    return _mm256_mul_ps(_mm256_castsi256_ps(power), _mm256_set1_ps(0x1p-23f));
}
FSM_INLINE f32_vec f32_exp2_normal(f32_vec n) {
    const __m256i w = _mm256_castps_si256(_mm256_add_ps(n, _mm256_set1_ps(0x1.8p23f + 127)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 23));
}
FSM_INLINE f32_vec f32_exp2_hole(f32_vec n) { return f32_exp2_normal(n); }
FSM_INLINE f32_vec f32_unless(f32_vec a, f32_vec k, f32_vec b) {
    return _mm256_and_ps(_mm256_cmp_ps(a, k, _CMP_NEQ_UQ), b);
}
FSM_INLINE f32_vec f32_if_less(f32_vec a, f32_vec b, f32_vec c, f32_vec d) {
    return _mm256_blendv_ps(d, c, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FSM_INLINE int f32_any_less(f32_vec a, f32_vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0;
}
FSM_INLINE f32_vec f32_canon(f32_vec a) {
    return _mm256_blendv_ps(a, _mm256_set1_ps(NAN), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
FSM_INLINE float f32_hmax(f32_vec a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
FSM_INLINE float f32_hsum(f32_vec a) {
    __m128 m = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_add_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
FSM_INLINE f32_ivec f32_bits(f32_vec a) { return _mm256_castps_si256(a); }
FSM_INLINE f32_vec f32_from_bits(f32_ivec a) { return _mm256_castsi256_ps(a); }
FSM_INLINE f32_ivec f32_set1_int(int32_t a) { return _mm256_set1_epi32(a); }
FSM_INLINE f32_ivec f32_add_int(f32_ivec a, f32_ivec b) { return _mm256_add_epi32(a, b); }
FSM_INLINE f32_ivec f32_sub_int(f32_ivec a, f32_ivec b) { return _mm256_sub_epi32(a, b); }
FSM_INLINE void f32_store_int(void *p, f32_ivec a) { _mm256_storeu_si256(p, a); }
FSM_INLINE int64_t f64_sum_int(f64_ivec a) {
    __m128i s = _mm_add_epi64(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s)));
}
FSM_INLINE int64_t f32_sum_int(f32_ivec a) {
    return f64_sum_int(_mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(a)),
                                        _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1))));
}

FSM_INLINE f64_vec f64_set1(double a) { return _mm256_set1_pd(a); }
FSM_INLINE f64_vec f64_load(const void *p) { return _mm256_loadu_pd(p); }
FSM_INLINE void f64_store(void *p, f64_vec a) { _mm256_storeu_pd(p, a); }
FSM_INLINE void f64_store_nt(void *p, f64_vec a) { _mm256_stream_pd(p, a); }
FSM_INLINE void store_fence(void) { _mm_sfence(); }
FSM_INLINE f64_vec f64_load_n(const void *p, ptrdiff_t n, f64_vec fill) {
    __m256i m = f64_first(n);
    return _mm256_blendv_pd(fill, _mm256_maskload_pd(p, m), _mm256_castsi256_pd(m));
}
FSM_INLINE void f64_store_n(void *p, f64_vec a, ptrdiff_t n) {
    _mm256_maskstore_pd(p, f64_first(n), a);
}
FSM_INLINE f64_vec f64_add(f64_vec a, f64_vec b) { return _mm256_add_pd(a, b); }
FSM_INLINE f64_vec f64_add_m(f64_vec a, f64_vec b) {
    return _mm256_fmadd_pd(a, _mm256_set1_pd(1), b);
}
FSM_INLINE f64_vec f64_rint(f64_vec a) {
    return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FSM_INLINE f64_vec f64_sub(f64_vec a, f64_vec b) { return _mm256_sub_pd(a, b); }
FSM_INLINE f64_vec f64_mul(f64_vec a, f64_vec b) { return _mm256_mul_pd(a, b); }
FSM_INLINE f64_vec f64_div(f64_vec a, f64_vec b) { return _mm256_div_pd(a, b); }
FSM_INLINE f64_vec f64_fma(f64_vec a, f64_vec b, f64_vec c) { return _mm256_fmadd_pd(a, b, c); }
FSM_INLINE f64_vec f64_fms(f64_vec a, f64_vec b, f64_vec c) { return _mm256_fmsub_pd(a, b, c); }
FSM_INLINE f64_vec f64_fnma(f64_vec a, f64_vec b, f64_vec c) { return _mm256_fnmadd_pd(a, b, c); }
FSM_INLINE f64_vec f64_max(f64_vec a, f64_vec b) { return _mm256_max_pd(a, b); }
FSM_INLINE f64_vec f64_min(f64_vec a, f64_vec b) { return _mm256_min_pd(a, b); }
FSM_INLINE f64_vec f64_abs(f64_vec a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
FSM_INLINE f64_vec f64_load_int(const int64_t *p) { /* the bits of 1.5 * 2^52 + p */
    const __m256d magic = _mm256_set1_pd(0x1.8p52);
    const __m256i a = _mm256_loadu_si256((const __m256i *)p);
    return _mm256_sub_pd(_mm256_castsi256_pd(_mm256_add_epi64(a, _mm256_castpd_si256(magic))),
                         magic);
}
FSM_INLINE f64_vec f64_load_i32(const int32_t *p) {
    return _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)p));
}
FSM_INLINE f64_vec f64_load_f32(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
FSM_INLINE void f64_store_f32(float *p, f64_vec a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
FSM_INLINE f64_vec f64_exp2(f64_vec n) {
    const __m256i w = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(0x1.8p52 + 1023 + 768)));
    const __m256d some = _mm256_cmp_pd(n, _mm256_set1_pd(-1075), _CMP_NLE_UQ),
                  power = _mm256_and_pd(_mm256_castsi256_pd(_mm256_slli_epi64(w, 52)), some);
    return _mm256_mul_pd(power, _mm256_set1_pd(0x1p-768));
}
FSM_INLINE f64_vec f64_exp2_normal(f64_vec n) {
    const __m256i w = _mm256_castpd_si256(_mm256_add_pd(n, _mm256_set1_pd(0x1.8p52 + 1023)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(w, 52));
}
FSM_INLINE f64_vec f64_exp2_hole(f64_vec n) { return f64_exp2_normal(n); }
FSM_INLINE f64_vec f64_unless(f64_vec a, f64_vec k, f64_vec b) {
    return _mm256_and_pd(_mm256_cmp_pd(a, k, _CMP_NEQ_UQ), b);
}
FSM_INLINE f64_vec f64_if_less(f64_vec a, f64_vec b, f64_vec c, f64_vec d) {
    return _mm256_blendv_pd(d, c, _mm256_cmp_pd(a, b, _CMP_LT_OQ));
}
FSM_INLINE int f64_any_less(f64_vec a, f64_vec b) {
    return _mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_LT_OQ)) != 0;
}
FSM_INLINE f64_vec f64_canon(f64_vec a) {
    return _mm256_blendv_pd(a, _mm256_set1_pd(NAN), _mm256_cmp_pd(a, a, _CMP_UNORD_Q));
}
FSM_INLINE double f64_hmax(f64_vec a) {
    __m128d m = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}
FSM_INLINE double f64_hsum(f64_vec a) {
    __m128d m = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(m, _mm_unpackhi_pd(m, m)));
}
FSM_INLINE f64_ivec f64_bits(f64_vec a) { return _mm256_castpd_si256(a); }
FSM_INLINE f64_vec f64_from_bits(f64_ivec a) { return _mm256_castsi256_pd(a); }
FSM_INLINE f64_ivec f64_set1_int(int64_t a) { return _mm256_set1_epi64x(a); }
FSM_INLINE f64_ivec f64_add_int(f64_ivec a, f64_ivec b) { return _mm256_add_epi64(a, b); }
FSM_INLINE f64_ivec f64_sub_int(f64_ivec a, f64_ivec b) { return _mm256_sub_epi64(a, b); }
FSM_INLINE void f64_store_int(void *p, f64_ivec a) { _mm256_storeu_si256(p, a); }

/* Halves, as float32 vectors. There is no masked move of 16-bit elements: the first n go through a
 * buffer. */
FSM_INLINE __m128i half_first(const void *p, ptrdiff_t n) {
    uint16_t h[8] = {0};
    for (ptrdiff_t i = 0; i < n; i++) memcpy(h + i, (const char *)p + 2 * i, 2);
    return _mm_loadu_si128((const __m128i *)h);
}
FSM_INLINE void half_store_first(void *p, __m128i a, ptrdiff_t n) {
    uint16_t h[8];
    _mm_storeu_si128((__m128i *)h, a);
    for (ptrdiff_t i = 0; i < n; i++) memcpy((char *)p + 2 * i, h + i, 2);
}
FSM_INLINE f32_vec f32_blend_first(f32_vec a, ptrdiff_t n, f32_vec fill) {
    return _mm256_blendv_ps(fill, a, _mm256_castsi256_ps(f32_first(n)));
}
FSM_INLINE f32_vec f16_load(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
FSM_INLINE f32_vec f16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return f32_blend_first(_mm256_cvtph_ps(half_first(p, n)), n, fill);
}
FSM_INLINE void f16_store(void *p, f32_vec a) {
    _mm_storeu_si128(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
FSM_INLINE void f16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    half_store_first(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT), n);
}
FSM_INLINE f32_vec bf16_widen(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FSM_INLINE __m128i bf16_narrow(f32_vec a) { /* see f32_to_bf16 */
    __m256i u = _mm256_castps_si256(a),
            odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd),
                          16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
FSM_INLINE f32_vec bf16_load(const void *p) { return bf16_widen(_mm_loadu_si128(p)); }
FSM_INLINE f32_vec bf16_load_n(const void *p, ptrdiff_t n, f32_vec fill) {
    return f32_blend_first(bf16_widen(half_first(p, n)), n, fill);
}
FSM_INLINE void bf16_store(void *p, f32_vec a) { _mm_storeu_si128(p, bf16_narrow(a)); }
FSM_INLINE void bf16_store_n(void *p, f32_vec a, ptrdiff_t n) {
    half_store_first(p, bf16_narrow(a), n);
}

FSM_INLINE void f32_transpose(f32_vec r[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) { /* 4x4 blocks inside each 128-bit lane */
        __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]),
               d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        t[i + 0] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

FSM_INLINE void f64_transpose(f64_vec r[4]) {
    __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

#endif
