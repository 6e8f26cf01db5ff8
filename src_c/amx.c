/* The matrix products of attention in the tiles of AMX, for bfloat16 (kernels.h, fsm_products; Intel
 * SDM vol. 1, chapter 18).
 *
 * TDPBF16PS adds to a tile of 16 x 16 numbers of float32 the product of 16 x 32 and 32 x 16 numbers of
 * bfloat16; of the second factor rows 2t and 2t + 1 lie side by side, as pairs. Lanes are queries
 * (attention.inc.h), so the second factor is Q^T, or the weights, and the first one K as it is, or V^T.
 * All are filled up to whole tiles, with zeros.
 *
 * Error. Products are exact and added up in float32, those of even and of odd places apart. A weight is
 * the sum of two numbers of bfloat16, which have 16 bits: it is off by 2^-17 of itself at the most.
 * Subnormal numbers count as 0, as factors and as sums. */
#include "kernels.h"
#include "parallel.h"

#include <immintrin.h>
#include <string.h>

enum {
    SIDE = FSM_LANE_QUANTUM, /* of a tile of sums; the factors are twice as long */
    GROUP = 3 * SIDE,
    KEYS = FSM_ATTEND_KEYS,
    PIECES = 2, /* of a weight */
    TILES = 4   /* of sums at a time, of the first factor's rows */
};

/* What a unit of attention.inc.h keeps in its scratch. */
typedef struct {
    const fsm_attend *a;
    ptrdiff_t depth, columns, first, n; /* depth and columns of whole tiles; the keys of a block */
    uint16_t *k, *v;                    /* [key][depth], [column][key] */
    uint32_t *q[FSM_ATTEND_GROUPS], *weights[PIECES]; /* pairs, [depth / 2][GROUP], [key / 2][GROUP] */
    int has_k, has_v, poisoned;
    uint8_t before[64]; /* the caller's configuration of tiles */
} tiles;

static ptrdiff_t layout(char *at, ptrdiff_t depth, ptrdiff_t v_depth, tiles *t) {
    ptrdiff_t used = up_to_multiple(sizeof *t, FSM_ALIGN);
#define TAKE(member, type, count)                            \
    t->member = (type *)(void *)((uintptr_t)at + (uintptr_t)used); \
    used += up_to_multiple((ptrdiff_t)sizeof(type) * (count), FSM_ALIGN)
    t->depth = up_to_multiple(depth, 2 * SIDE);
    t->columns = up_to_multiple(v_depth, SIDE);
    TAKE(k, uint16_t, KEYS * t->depth);
    TAKE(v, uint16_t, t->columns * KEYS);
    for (int i = 0; i < PIECES; i++) { TAKE(weights[i], uint32_t, KEYS / 2 * GROUP); }
    for (int g = 0; g < FSM_ATTEND_GROUPS; g++) { TAKE(q[g], uint32_t, t->depth / 2 * GROUP); }
#undef TAKE
    return used;
}

static ptrdiff_t scratch_bytes(ptrdiff_t depth, ptrdiff_t v_depth) {
    tiles t;
    return layout(NULL, depth, v_depth, &t);
}

/* ---- factors ---- */

/* The upper halves of a and b, as pairs. */
static inline __m512i pairs_of(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

/* What is left of x without its upper half, which bfloat16 holds. */
static inline __m512i rest_of(__m512i x) {
    const __m512i upper = _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000));
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(upper)));
}

/* Row i of n, [n][GROUP], 0 beyond; the lanes of vector v. */
static inline __m512i lanes_of(const float *x, ptrdiff_t i, ptrdiff_t n, int v) {
    return i < n ? _mm512_loadu_si512(x + i * GROUP + v * SIDE) : _mm512_setzero_si512();
}

static void take_queries(void *state, int group, int vectors, const void *q) {
    tiles *t = state;
    for (ptrdiff_t i = 0; i < t->depth; i += 2)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_si512(t->q[group] + i / 2 * GROUP + v * SIDE,
                                pairs_of(lanes_of(q, i, t->a->depth, v),
                                         lanes_of(q, i + 1, t->a->depth, v)));
}

/* To 16 bits, the nearest; half of the last one always up. A NaN stays one, for none has all bits set:
 * those of scores are of bfloat16, or canonical. */
static inline __m512i round_weight(__m512i p) {
    return _mm512_and_si512(_mm512_add_epi32(p, _mm512_set1_epi32(0x80)),
                            _mm512_set1_epi32((int)0xffffff00));
}

/* Of 32 keys from j on, of one vector of lanes. */
static inline void take_weights(tiles *t, const float *p, ptrdiff_t j, int v) {
    for (ptrdiff_t i = j; i < j + 2 * SIDE; i += 2) {
        const __m512i a = round_weight(lanes_of(p, i, t->n, v)),
                      b = round_weight(lanes_of(p, i + 1, t->n, v));
        const ptrdiff_t at = i / 2 * GROUP + v * SIDE;
        _mm512_storeu_si512(t->weights[0] + at, pairs_of(a, b));
        _mm512_storeu_si512(t->weights[1] + at, pairs_of(rest_of(a), rest_of(b)));
    }
}

/* `columns` numbers of a row, 0 in those up to `width` and where there is no row. */
static void take_row(uint16_t *to, ptrdiff_t width, const char *from, ptrdiff_t step,
                     ptrdiff_t columns) {
    if (!from) columns = 0;
    else if (step == 2) memcpy(to, from, (size_t)columns * 2);
    else
        for (ptrdiff_t d = 0; d < columns; d++) memcpy(to + d, from + d * step, 2);
    memset(to + columns, 0, (size_t)(width - columns) * 2);
}

static void take_keys(tiles *t) {
    const fsm_matrix *k = &t->a->k;
    for (ptrdiff_t j = 0; j < up_to_multiple(t->n, SIDE); j++)
        take_row(t->k + j * t->depth, t->depth, j < t->n ? k->at + (t->first + j) * k->row : NULL,
                 k->column, t->a->depth);
    t->has_k = 1;
}

static void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]),
                      b = _mm512_unpackhi_epi32(r[i], r[i + 1]),
                      c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]),
                      d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88),
                      b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd),
                      c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88),
                      d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* 16 columns of row j of the block's values from d on, as numbers of 32 bits. */
static inline __m512i value_of(const tiles *t, ptrdiff_t j, ptrdiff_t d) {
    const fsm_matrix *v = &t->a->v;
    const ptrdiff_t k = t->a->v_depth - d < SIDE ? t->a->v_depth - d : SIDE;
    const char *from = v->at + (t->first + j) * v->row + d * v->column;
    if (j >= t->n) return _mm512_setzero_si512();
    if (v->column != 2) {
        uint16_t row[SIDE];
        take_row(row, SIDE, from, v->column, k);
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)row));
    }
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << k) - 1), from));
}

/* V^T; values that are not finite are left out. */
static void take_values(tiles *t) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    t->poisoned = 0;
    for (ptrdiff_t j = 0; j < up_to_multiple(t->n, 2 * SIDE); j += 2 * SIDE)
        for (ptrdiff_t d = 0; d < t->columns; d += SIDE) {
            __m512i r[SIDE];
            for (int i = 0; i < SIDE; i++) {
                const __m512i pairs = _mm512_or_si512(
                    value_of(t, j + 2 * i, d), _mm512_slli_epi32(value_of(t, j + 2 * i + 1, d), 16));
                const __mmask32 poison = _mm512_cmpeq_epi16_mask(
                    _mm512_and_si512(pairs, exponent), exponent);
                t->poisoned |= poison != 0;
                r[i] = _mm512_maskz_mov_epi16(~poison, pairs);
            }
            transpose(r);
            for (int i = 0; i < SIDE; i++)
                _mm512_storeu_si512(t->v + (d + i) * KEYS + j, r[i]);
        }
    t->has_v = 1;
}

/* ---- products ---- */

/* Adds the product of `count` tiles of rows, one under the other from `a` on, and the one or two of lanes
 * at b and c, which share the reading of a. */
#define STEP(i, tile)                                                 \
    if (count > i) {                                                  \
        _tile_loadd(tile, a + (ptrdiff_t)i * SIDE * width, 2 * width); \
        _tile_dpbf16ps(i, tile, 4);                                   \
        if (c) _tile_dpbf16ps(i, tile, 5);                            \
    }
static inline void multiply(int count, const uint16_t *a, ptrdiff_t width, const uint32_t *b,
                            const uint32_t *c) {
    _tile_loadd(4, b, GROUP * 4);
    if (c) _tile_loadd(5, c, GROUP * 4);
    STEP(0, 6)
    STEP(1, 7)
    STEP(2, 6)
    STEP(3, 7)
}
#undef STEP

static inline void sums_zero(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
static inline void sums_load(int count, const float *s) {
    _tile_loadd(0, s, GROUP * 4);
    if (count > 1) _tile_loadd(1, s + 1 * SIDE * GROUP, GROUP * 4);
    if (count > 2) _tile_loadd(2, s + 2 * SIDE * GROUP, GROUP * 4);
    if (count > 3) _tile_loadd(3, s + 3 * SIDE * GROUP, GROUP * 4);
}
static inline void sums_store(int count, float *s) {
    _tile_stored(0, s, GROUP * 4);
    if (count > 1) _tile_stored(1, s + 1 * SIDE * GROUP, GROUP * 4);
    if (count > 2) _tile_stored(2, s + 2 * SIDE * GROUP, GROUP * 4);
    if (count > 3) _tile_stored(3, s + 3 * SIDE * GROUP, GROUP * 4);
}

static void scores(void *state, int group, int vectors, void *s) {
    tiles *t = state;
    if (!t->has_k) take_keys(t);
    const int count = (int)((t->n + SIDE - 1) / SIDE);
    for (int v = 0; v < vectors; v++) {
        sums_zero();
        for (ptrdiff_t d = 0; d < t->depth; d += 2 * SIDE)
            multiply(count, t->k + d, t->depth, t->q[group] + d / 2 * GROUP + v * SIDE, NULL);
        sums_store(count, (float *)s + v * SIDE);
    }
}

static int values(void *state, int vectors, const void *p, const void *alpha, void *o) {
    tiles *t = state;
    if (!t->has_v) take_values(t);
    const ptrdiff_t steps = (t->n + 2 * SIDE - 1) / (2 * SIDE), all = steps * vectors;
    for (ptrdiff_t i = 0; i <= all; i++) {
        if (i < all) take_weights(t, p, i % steps * 2 * SIDE, (int)(i / steps));
        if (i == 0) continue;
        const ptrdiff_t j = (i - 1) % steps * 2 * SIDE;
        const int v = (int)((i - 1) / steps);
        float *at = (float *)o + v * SIDE;
        const __m512 factor = _mm512_loadu_ps((const float *)alpha + v * SIDE);
        if (j == 0 && _mm512_cmp_ps_mask(factor, _mm512_set1_ps(1), _CMP_NEQ_UQ))
            for (ptrdiff_t d = 0; d < t->columns; d++)
                _mm512_storeu_ps(at + d * GROUP, _mm512_mul_ps(_mm512_loadu_ps(at + d * GROUP), factor));
        if (t->columns <= TILES * SIDE) {
            const int count = (int)(t->columns / SIDE);
            if (j == 0) sums_load(count, at);
            multiply(count, t->v + j, KEYS, t->weights[0] + j / 2 * GROUP + v * SIDE,
                     t->weights[1] + j / 2 * GROUP + v * SIDE);
            if ((i - 1) % steps == steps - 1) sums_store(count, at);
            continue;
        }
        for (ptrdiff_t d = 0; d < t->columns; d += TILES * SIDE) {
            const int count = (int)least((t->columns - d) / SIDE, TILES);
            sums_load(count, at + d * GROUP);
            multiply(count, t->v + d * KEYS + j, KEYS,
                         t->weights[0] + j / 2 * GROUP + v * SIDE,
                         t->weights[1] + j / 2 * GROUP + v * SIDE);
            sums_store(count, at + d * GROUP);
        }
    }
    return t->poisoned;
}

/* ---- a unit ---- */

/* Constant also because GCC 12 takes LDTILECFG to read the first 8 of the 64 bytes only. */
#define EIGHT(x) {x, x, x, x, x, x, x, x}
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} WHOLE_TILES = {.palette = 1, .bytes = EIGHT(4 * SIDE), .rows = EIGHT(SIDE)};
#undef EIGHT

static void *begin(char *scratch, const fsm_attend *a) {
    tiles *t = (tiles *)(void *)scratch;
    t->a = a;
    layout(scratch, a->depth, a->v_depth, t);
    _tile_storeconfig(t->before);
    _tile_loadconfig(&WHOLE_TILES);
    return t;
}

static void begin_block(void *state, ptrdiff_t first, ptrdiff_t n) {
    tiles *t = state;
    t->first = first;
    t->n = n;
    t->has_k = t->has_v = 0;
}

static void end(void *state) {
    tiles *t = state;
    _tile_loadconfig(t->before);
}

const fsm_products fsm_amx = {scratch_bytes, begin, take_queries, begin_block, scores, values, end};
