/* The matrix products of attention in the tiles of AMX, for bfloat16 (fsm_products of kernels.h; Intel
 * SDM vol. 1, chapter 18).
 *
 * TDPBF16PS adds to a tile of 16 x 16 numbers of float32 the product of 16 x 32 and 32 x 16 numbers of
 * bfloat16; of the second factor rows 2t and 2t + 1 lie side by side, as pairs. Lanes are queries
 * (attention.inc.h), so the second factor is Q^T, or the weights, and the first one K as it is, or V^T.
 * All are filled up to whole tiles, with zeros.
 *
 * Error. Products are exact and are added up in float32, those of even and of odd places apart. A weight
 * is the sum of two numbers of bfloat16, and has their 16 bits: it is off by 2^-17 of itself at the
 * most, a 256th of what rounding the result may be off by. Subnormal numbers count as 0, as factors and
 * as sums. */
#include "vec_avx512.h"

enum {
    SIDE = FSM_LANE_QUANTUM, /* of a tile of sums */
    DEPTH = 2 * SIDE,        /* of factors */
    GROUP = 3 * SIDE,
    KEYS = FSM_ATTEND_KEYS,
    TILES = 4 /* of sums, of one vector of lanes, at a time */
};

/* What a unit of attention.inc.h keeps in its scratch. */
typedef struct {
    const fsm_attend *a;
    ptrdiff_t depth, columns; /* of q and k, and of v: of whole tiles */
    ptrdiff_t first, n;       /* the keys of the block */
    int has_k, has_v;         /* those of the block are here */
    int poisoned;             /* v has values that are not finite */
    uint16_t *k, *v;          /* [key][depth], [column][key] */
    uint32_t *q[FSM_ATTEND_GROUPS], *upper,
        *lower;         /* pairs, [depth / 2][GROUP]; of the weights, two
                                                     * numbers each, [key / 2][GROUP] */
    uint8_t before[64]; /* the caller's configuration of tiles */
} tiles;

static ptrdiff_t layout(char *at, ptrdiff_t depth, ptrdiff_t v_depth, tiles *t) {
    ptrdiff_t used = up_to_multiple(sizeof *t, FSM_ALIGN);
    t->depth = up_to_multiple(depth, DEPTH);
    t->columns = up_to_multiple(v_depth, SIDE);
    t->k = FSM_TAKE(uint16_t, KEYS * t->depth);
    t->v = FSM_TAKE(uint16_t, t->columns * KEYS);
    t->upper = FSM_TAKE(uint32_t, KEYS / 2 * GROUP);
    t->lower = FSM_TAKE(uint32_t, KEYS / 2 * GROUP);
    for (int g = 0; g < FSM_ATTEND_GROUPS; g++) t->q[g] = FSM_TAKE(uint32_t, t->depth / 2 * GROUP);
    return used;
}

static ptrdiff_t scratch_bytes(ptrdiff_t depth, ptrdiff_t v_depth) {
    tiles t;
    return layout(NULL, depth, v_depth, &t);
}

/* ---- factors of lanes ---- */

/* The upper halves of a and b, as pairs. */
static inline __m512i pairs_of(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

/* Row i of [n][GROUP], of one vector; 0 beyond. */
static inline __m512i lanes_of(const float *x, ptrdiff_t i, ptrdiff_t n, int v) {
    return i < n ? _mm512_loadu_si512(x + i * GROUP + v * SIDE) : _mm512_setzero_si512();
}

static void take_queries(void *state, int group, int vectors, const void *q) {
    const tiles *t = state;
    const ptrdiff_t n = t->a->depth;
    for (ptrdiff_t i = 0; i < t->depth; i += 2)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_si512(t->q[group] + i / 2 * GROUP + v * SIDE,
                                pairs_of(lanes_of(q, i, n, v), lanes_of(q, i + 1, n, v)));
}

/* The nearest number of 16 bits, half of the last one up. NaN stays NaN: no score has one with all bits
 * set, for it would come from bfloat16 or be made by an operation. */
static inline __m512i rounded(__m512i p) {
    return _mm512_and_si512(_mm512_add_epi32(p, _mm512_set1_epi32(0x80)),
                            _mm512_set1_epi32((int)0xffffff00));
}

/* What is left of x without its upper half; exact. */
static inline __m512i rest_of(__m512i x) {
    const __m512i upper = _mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000));
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(upper)));
}

/* The weights of keys [j, j + DEPTH), of one vector. With the first ones the sums that they will be added
 * to are asked for, which the other groups have driven out of the nearest cache: 6 % of all. */
static void take_weights(const tiles *t, const float *p, ptrdiff_t j, int v, const float *o) {
    const ptrdiff_t asked = j == 0 ? t->columns / SIDE : 0;
    for (ptrdiff_t i = j; i < j + DEPTH; i += 2) {
        for (ptrdiff_t d = i / 2 * asked; d < (i / 2 + 1) * asked; d++)
            __builtin_prefetch(o + d * GROUP + v * SIDE, 1, 3);
        const __m512i a = rounded(lanes_of(p, i, t->n, v)),
                      b = rounded(lanes_of(p, i + 1, t->n, v));
        const ptrdiff_t at = i / 2 * GROUP + v * SIDE;
        _mm512_storeu_si512(t->upper + at, pairs_of(a, b));
        _mm512_storeu_si512(t->lower + at, pairs_of(rest_of(a), rest_of(b)));
    }
}

/* ---- factors of rows ---- */

/* `columns` numbers of a row, and zeros up to `width`. */
static void take_row(uint16_t *to, ptrdiff_t width, const char *from, ptrdiff_t column,
                     ptrdiff_t columns) {
    if (column == 2) memcpy(to, from, (size_t)columns * 2);
    else
        for (ptrdiff_t d = 0; d < columns; d++) memcpy(to + d, from + d * column, 2);
    memset(to + columns, 0, (size_t)(width - columns) * 2);
}

static void take_keys(tiles *t) {
    const fsm_matrix *k = &t->a->k;
    for (ptrdiff_t j = 0; j < t->n; j++)
        take_row(t->k + j * t->depth, t->depth, k->at + (t->first + j) * k->row, k->column,
                 t->a->depth);
    memset(t->k + t->n * t->depth, 0, (size_t)((up_to_multiple(t->n, SIDE) - t->n) * t->depth) * 2);
    t->has_k = 1;
}

/* SIDE columns from d on, each in 32 bits, of row j of the block of values. */
static inline __m512i value_of(const tiles *t, ptrdiff_t j, ptrdiff_t d) {
    const fsm_matrix *v = &t->a->v;
    if (j >= t->n) return _mm512_setzero_si512();
    const char *at = v->at + (t->first + j) * v->row + d * v->column;
    const ptrdiff_t left = t->a->v_depth - d, columns = left < SIDE ? left : SIDE;
    uint16_t row[SIDE];
    if (v->column == 2)
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(f32_first(columns), at));
    take_row(row, SIDE, at, v->column, columns);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)row));
}

/* Values that are not finite are left out: also the lower part of a weight would be multiplied by them,
 * which may be 0. */
static void take_values(tiles *t) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    t->poisoned = 0;
    for (ptrdiff_t j = 0; j < t->n; j += DEPTH)
        for (ptrdiff_t d = 0; d < t->columns; d += SIDE) {
            f32_vec square[SIDE];
            for (int i = 0; i < SIDE; i++) {
                const __m512i pairs =
                    _mm512_or_si512(value_of(t, j + 2 * i, d),
                                    _mm512_slli_epi32(value_of(t, j + 2 * i + 1, d), 16));
                const __mmask32 poison =
                    _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
                t->poisoned |= poison != 0;
                square[i] = _mm512_castsi512_ps(_mm512_maskz_mov_epi16(~poison, pairs));
            }
            f32_transpose(square);
            for (int i = 0; i < SIDE; i++) f32_store(t->v + (d + i) * KEYS + j, square[i]);
        }
    t->has_v = 1;
}

/* ---- products ---- */

/* DO(tile of sums, tile of a factor) for the first `count` tiles of sums. */
#define EACH(count, DO)      \
    DO(0, 6);                \
    if (count > 1) DO(1, 7); \
    if (count > 2) DO(2, 6); \
    if (count > 3) DO(3, 7)

/* GCC (12) does not know that TILELOADD reads memory: what is stored before it must not come after, nor
 * what is stored after it before. */
#define READ(tile, from, stride)           \
    {                                      \
        __asm__ volatile("" ::: "memory"); \
        _tile_loadd(tile, from, stride);   \
        __asm__ volatile("" ::: "memory"); \
    }
#define ZERO(i, factor) _tile_zero(i)
#define LOAD(i, factor) READ(i, sums + i * SIDE * GROUP, GROUP * sizeof(float))
#define STORE(i, factor) _tile_stored(i, sums + i * SIDE * GROUP, GROUP * sizeof(float))
#define MULTIPLY(i, factor)                               \
    {                                                     \
        READ(factor, rows + i * SIDE * width, 2 * width); \
        _tile_dpbf16ps(i, factor, 4);                     \
        if (lower) _tile_dpbf16ps(i, factor, 5);          \
    }

/* Adds to the sums the product of tiles of `rows`, each `width` long, with one of lanes, or with the two
 * that its numbers are the sums of. */
static inline void multiply(int count, const uint16_t *rows, ptrdiff_t width, const uint32_t *upper,
                            const uint32_t *lower) {
    READ(4, upper, GROUP * sizeof *upper);
    if (lower) READ(5, lower, GROUP * sizeof *lower);
    EACH(count, MULTIPLY);
}

static void scores(void *state, int group, int vectors, void *s) {
    tiles *t = state;
    if (!t->has_k) take_keys(t);
    const int count = (int)((t->n + SIDE - 1) / SIDE);
    for (int v = 0; v < vectors; v++) {
        float *sums = (float *)s + v * SIDE;
        EACH(TILES, ZERO);
        for (ptrdiff_t d = 0; d < t->depth; d += DEPTH)
            multiply(count, t->k + d, t->depth, t->q[group] + d / 2 * GROUP + v * SIDE, NULL);
        EACH(count, STORE);
    }
}

static void scale_sums(float *sums, ptrdiff_t n, f32_vec alpha) {
    if (_mm512_cmp_ps_mask(alpha, f32_set1(1), _CMP_NEQ_UQ) == 0) return;
    for (ptrdiff_t d = 0; d < n; d++, sums += GROUP)
        f32_store(sums, f32_mul(f32_load(sums), alpha));
}

/* The weights of each step are taken while the tiles do the one before, for they are slow to come and do
 * not wait: 5 % of all. */
static int mix(void *state, int vectors, const void *p, const void *alpha, void *o) {
    tiles *t = state;
    if (!t->has_v) take_values(t);
    take_weights(t, p, 0, 0, o);
    for (int v = 0; v < vectors; v++) {
        float *sums = (float *)o + v * SIDE;
        scale_sums(sums, t->columns, f32_load((const float *)alpha + v * SIDE));
        for (ptrdiff_t d = 0; d < t->columns; d += TILES * SIDE, sums += TILES * SIDE * GROUP) {
            const ptrdiff_t left = (t->columns - d) / SIDE;
            const int count = left < TILES ? (int)left : TILES;
            EACH(count, LOAD);
            for (ptrdiff_t j = 0; j < t->n; j += DEPTH) {
                const ptrdiff_t at = j / 2 * GROUP + v * SIDE;
                if (d == 0 && j + DEPTH < t->n) take_weights(t, p, j + DEPTH, v, o);
                else if (d == 0 && v + 1 < vectors) take_weights(t, p, 0, v + 1, o);
                multiply(count, t->v + d * KEYS + j, KEYS, t->upper + at, t->lower + at);
            }
            EACH(count, STORE);
        }
    }
    return t->poisoned;
}

/* ---- a unit ---- */

/* A constant also because GCC 12 takes LDTILECFG to read the first 8 bytes of these 64. */
#define EIGHT(x) {x, x, x, x, x, x, x, x}
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} WHOLE_TILES = {.palette = 1, .bytes = EIGHT(4 * SIDE), .rows = EIGHT(SIDE)};

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

/* Others in this thread may rely on the configuration that they have loaded. */
static void end(void *state) { _tile_loadconfig(((tiles *)state)->before); }

const fsm_products fsm_products_amx = {scratch_bytes, begin, take_queries, begin_block,
                                       scores,        mix,   end};
