/* AVX-512 on CPUs without it: its intrinsics are those of SIMDe, and the few that SIMDe lacks (0.7.4)
 * or rounds otherwise are below. With -mavx2 -mfma -mf16c the rest, fma above all, is done by
 * instructions on halves of the vectors. For `make emulate` only. */
#ifndef AVX512_EMULATED_H
#define AVX512_EMULATED_H

#include <immintrin.h> /* before its types and functions get other names */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define EMULATED static inline __attribute__((always_inline))

typedef union {
    __m512 ps;
    __m512d pd;
    __m512i epi;
    __m256 half_ps[2];
    __m256i half_epi[2];
    __m128i quarter[4];
    float f32[16];
    double f64[8];
    int32_t i32[16];
    int64_t i64[8];
} lanes;

/* ---- masked moves: the memory of a lane that is not set is not touched ---- */

EMULATED void move(void *to, const void *from, uint32_t set, int count, size_t size) {
    for (int i = 0; i < count; i++)
        if (set >> i & 1) memcpy((char *)to + i * size, (const char *)from + i * size, size);
}

EMULATED __m512 load_ps(__m512 from, __mmask16 set, const void *p) {
    move(&from, p, set, 16, 4);
    return from;
}
EMULATED __m512d load_pd(__m512d from, __mmask8 set, const void *p) {
    move(&from, p, set, 8, 8);
    return from;
}
EMULATED __m256i load_epi16(__mmask16 set, const void *p) {
    __m256i a = _mm256_setzero_si256();
    move(&a, p, set, 16, 2);
    return a;
}
EMULATED void store_ps(void *p, __mmask16 set, __m512 a) { move(p, &a, set, 16, 4); }
EMULATED void store_pd(void *p, __mmask8 set, __m512d a) { move(p, &a, set, 8, 8); }
EMULATED void store_epi16(void *p, __mmask16 set, __m256i a) { move(p, &a, set, 16, 2); }

/* Past the caches only where the CPU would not fault. */
EMULATED void stream_512(void *p, const void *a) {
    if ((uintptr_t)p % 64) abort();
    memcpy(p, a, 64);
}
EMULATED void stream_ps(void *p, __m512 a) { stream_512(p, &a); }
EMULATED void stream_pd(void *p, __m512d a) { stream_512(p, &a); }

#undef _mm512_stream_ps
#undef _mm512_stream_pd
#define _mm512_stream_ps stream_ps
#define _mm512_stream_pd stream_pd
#undef _mm512_mask_loadu_ps
#undef _mm512_mask_loadu_pd
#undef _mm256_maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_pd
#undef _mm256_mask_storeu_epi16
#define _mm512_mask_loadu_ps load_ps
#define _mm512_mask_loadu_pd load_pd
#define _mm256_maskz_loadu_epi16 load_epi16
#define _mm512_mask_storeu_ps store_ps
#define _mm512_mask_storeu_pd store_pd
#define _mm256_mask_storeu_epi16 store_epi16

/* ---- conversions ---- */

EMULATED __m512d cvtepi64_pd(__m512i a) {
    lanes from = {.epi = a}, to;
    for (int i = 0; i < 8; i++) to.f64[i] = (double)from.i64[i];
    return to.pd;
}
EMULATED __m512d cvtps_pd(__m256 a) {
    lanes from = {.half_ps = {a}}, to;
    for (int i = 0; i < 8; i++) to.f64[i] = from.f32[i];
    return to.pd;
}
EMULATED __m256 cvtpd_ps(__m512d a) {
    lanes from = {.pd = a}, to;
    for (int i = 0; i < 8; i++) to.f32[i] = (float)from.f64[i];
    return to.half_ps[0];
}
EMULATED __m512d cvtepi32_pd(__m256i a) {
    lanes from = {.half_epi = {a}}, to;
    for (int i = 0; i < 8; i++) to.f64[i] = from.i32[i];
    return to.pd;
}
#undef _mm512_cvtepi32_pd
#undef _mm512_cvtepi64_pd
#undef _mm512_cvtps_pd
#undef _mm512_cvtpd_ps
#define _mm512_cvtepi32_pd cvtepi32_pd
#define _mm512_cvtepi64_pd cvtepi64_pd
#define _mm512_cvtps_pd cvtps_pd
#define _mm512_cvtpd_ps cvtpd_ps

EMULATED __m512 ph_to_ps(__m256i h) {
    lanes r = {.half_ps = {_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                           _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))}};
    return r.ps;
}
EMULATED __m512 mask_ph_to_ps(__m512 from, __mmask16 set, __m256i h) {
    return _mm512_mask_mov_ps(from, set, ph_to_ps(h));
}
#define PS_TO_PH(a, rounding)                                               \
    _mm256_setr_m128i(_mm256_cvtps_ph(_mm512_castps512_ps256(a), rounding), \
                      _mm256_cvtps_ph((lanes){.ps = a}.half_ps[1], rounding))
EMULATED __m512i epu16_to_epi32(__m256i h) {
    lanes r = {.half_epi = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1))}};
    return r.epi;
}
EMULATED __m512i epi32_to_epi64(__m256i a) {
    lanes r = {.half_epi = {_mm256_cvtepi32_epi64(_mm256_castsi256_si128(a)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1))}};
    return r.epi;
}
EMULATED __m256i epi32_to_epi16(__m512i a) { /* cuts off */
    const lanes from = {.epi = a};
    uint16_t h[16];
    for (int i = 0; i < 16; i++) h[i] = (uint16_t)from.i32[i];
    return _mm256_loadu_si256((const __m256i *)h);
}

#undef _mm512_cvtph_ps
#undef _mm512_mask_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi64
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtph_ps ph_to_ps
#define _mm512_mask_cvtph_ps mask_ph_to_ps
#define _mm512_cvtps_ph PS_TO_PH
#define _mm512_cvtepu16_epi32 epu16_to_epi32
#define _mm512_cvtepi32_epi64 epi32_to_epi64
#define _mm512_cvtepi32_epi16 epi32_to_epi16

/* ---- shuffles of quarters ---- */

EMULATED lanes shuffle_quarters(lanes a, lanes b, int order) {
    return (lanes){.quarter = {a.quarter[order & 3], a.quarter[order >> 2 & 3],
                               b.quarter[order >> 4 & 3], b.quarter[order >> 6 & 3]}};
}
EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b, int order) {
    return shuffle_quarters((lanes){.ps = a}, (lanes){.ps = b}, order).ps;
}
EMULATED __m512d shuffle_f64x2(__m512d a, __m512d b, int order) {
    return shuffle_quarters((lanes){.pd = a}, (lanes){.pd = b}, order).pd;
}

#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f32x4 shuffle_f32x4
#define _mm512_shuffle_f64x2 shuffle_f64x2

/* ---- arithmetic ---- */

/* a * 2^floor(b), rounded once: Intel SDM vol. 2C, VSCALEFPS; not for infinite b. SIMDe multiplies
 * by 2^b, which may overflow or be subnormal itself, and flushes. */
#define SCALEF(PART, VECTOR, LANE, COUNT, LDEXP, FLOOR)                                            \
    EMULATED VECTOR scalef_##PART(VECTOR a, VECTOR b) {                                            \
        lanes r = {.PART = a};                                                                     \
        const lanes by = {.PART = b};                                                              \
        for (int i = 0; i < COUNT; i++)                                                            \
            r.LANE[i] = by.LANE[i] != by.LANE[i] ? NAN : LDEXP(r.LANE[i], (int)FLOOR(by.LANE[i])); \
        return r.PART;                                                                             \
    }
SCALEF(ps, __m512, f32, 16, ldexpf, floorf)
SCALEF(pd, __m512d, f64, 8, ldexp, floor)

/* Halves first, as compilers do it. */
#define REDUCE(NAME, TYPE, VECTOR, PART, LANE, COUNT, COMBINED) \
    EMULATED TYPE NAME(VECTOR v) {                              \
        lanes r = {.PART = v};                                  \
        for (int n = COUNT / 2; n; n /= 2)                      \
            for (int i = 0; i < n; i++) {                       \
                const TYPE a = r.LANE[n + i], b = r.LANE[i];    \
                r.LANE[i] = COMBINED;                           \
            }                                                   \
        return r.LANE[0];                                       \
    }
REDUCE(reduce_add_ps, float, __m512, ps, f32, 16, a + b)
REDUCE(reduce_add_pd, double, __m512d, pd, f64, 8, a + b)
REDUCE(reduce_max_ps, float, __m512, ps, f32, 16, a > b ? a : b)
REDUCE(reduce_max_pd, double, __m512d, pd, f64, 8, a > b ? a : b)

#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
#undef _mm512_maskz_scalef_ps
#undef _mm512_maskz_scalef_pd
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_add_pd
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_max_pd
#define _mm512_scalef_ps scalef_ps
#define _mm512_scalef_pd scalef_pd
#define _mm512_maskz_scalef_ps(k, a, b) _mm512_maskz_mov_ps(k, scalef_ps(a, b))
#define _mm512_maskz_scalef_pd(k, a, b) _mm512_maskz_mov_pd(k, scalef_pd(a, b))
#define _mm512_reduce_add_ps reduce_add_ps
#define _mm512_reduce_add_pd reduce_add_pd
#define _mm512_reduce_max_ps reduce_max_ps
#define _mm512_reduce_max_pd reduce_max_pd

EMULATED __mmask32 cmpeq_epi16_mask(__m512i a, __m512i b) {
    uint16_t x[32], y[32];
    __mmask32 equal = 0;
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 32; i++) equal |= (__mmask32)(x[i] == y[i]) << i;
    return equal;
}
#undef _mm512_cmpeq_epi16_mask
#define _mm512_cmpeq_epi16_mask cmpeq_epi16_mask

#endif
