/* Attention of many queries, for FSM_TYPE. Lanes are queries: scores and outputs lie transposed,
 * [key][row] and [column][row], so that maximum, exp and sum are vertical operations and one row
 * never meets another.
 *
 * A group is GROUP rows, three vectors, or less. For each block of KEYS keys, at multiples of KEYS,
 * less the padding at its ends,
 *
 *     S = K Q^T             a tile of ACC_ROWS keys x 3 vectors in registers, one fma after the
 *                           other along the depth
 *     z = score(S)          score.inc.h; in place
 *     M' = max(M, max z);   a = 2^((M - M') c);   P = 2^((z - M') c), in place
 *     l = l a + sum P;      O = O a + V^T P       the same tile, along the keys of the block
 *
 * and O / l at the end: an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022). Where nothing
 * moved the maximum a is exactly 1, and a key that is not seen adds exactly 0 (but for the sign of a
 * zero; zeros of the result are made positive), so the bits of a row do not depend on which blocks
 * its neighbours made it visit.
 *
 * Error. P has 2 ulp, relative (difference, product with c, 2^t), and what the dot products
 * bring, each D rounded operations. A sum over n keys goes through KEYS additions in its block and,
 * in the worst case, 4 roundings (a, a l, +) in each of the n / KEYS blocks: all terms have one sign
 * or are bounded by sums that have, so numerator and denominator are each off by at most
 * KEYS + 4 n / KEYS + 8 units of 2^-24, relative to sum w |v|. c_K is twice that. */

#define GROUP FSM_NAME(GROUP)
#define group_state FSM_NAME(group_state)
#define block_state FSM_NAME(block_state)
#define lane_view FSM_NAME(lane_view)
#define block_view FSM_NAME(block_view)
#define unit_scratch FSM_NAME(unit_scratch)
#define attend_bytes FSM_NAME(attend_bytes)
#define attend_layout FSM_NAME(attend_layout)
#define multiply_add FSM_NAME(multiply_add)
#define tile_product FSM_NAME(tile_product)
#define group_scores FSM_NAME(group_scores)
#define group_scores_n FSM_NAME(group_scores_n)
#define group_values FSM_NAME(group_values)
#define group_values_n FSM_NAME(group_values_n)
#define view_lanes FSM_NAME(view_lanes)
#define view_block FSM_NAME(view_block)
#define group_rule FSM_NAME(group_rule)
#define group_rule_as FSM_NAME(group_rule_as)
#define group_weights FSM_NAME(group_weights)
#define group_begin FSM_NAME(group_begin)
#define group_end FSM_NAME(group_end)
#define group_block FSM_NAME(group_block)
#define group_mix FSM_NAME(group_mix)
#define group_additive FSM_NAME(group_additive)
#define evenly_apart FSM_NAME(evenly_apart)
#define fetch_group FSM_NAME(fetch_group)
#define group_queries FSM_NAME(group_queries)
#define add_poison FSM_NAME(add_poison)
#define to_lanes FSM_NAME(to_lanes)
#define from_lanes FSM_NAME(from_lanes)
#define begin_block FSM_NAME(begin_block)
#define store_weights FSM_NAME(store_weights)
#define attend_unit FSM_NAME(attend_unit)
#define KEYS FSM_ATTEND_KEYS

enum { GROUP = 3 * VL };

typedef struct {
    int rows, vectors;
    row_view view[GROUP];
    ptrdiff_t lo_least, lo_most, hi_least, hi_most; /* of the rows */
    real max[GROUP], sum[GROUP], slope[GROUP], alpha[GROUP];
    real *q, *o; /* [depth][GROUP], [v_depth][GROUP]; o: up to whole tiles of fsm_products */
} group_state;

/* What the groups share at a block of keys. k and v are fetched when the first group needs them. */
typedef struct {
    ptrdiff_t first, n;
    real *additive;      /* along the keys, the same for all rows; or NULL */
    int hides;           /* additive has a -inf */
    rows_of k, v, clean; /* clean: v without poison, if it has any */
    int poisoned;        /* -1: not looked yet */
} block_state;

/* Of VL rows. */
typedef struct {
    vec lo, hi, position, slope;
} lane_view;

/* What a group sees of a block. */
typedef struct {
    int hides, ranged;    /* some row does not see all: by bias or mask, by its position */
    const real *additive; /* [key][row], or NULL, and then that of the block */
} block_view;

typedef struct {
    group_state *groups;
    real *s, *additive, *along, *rows, *k, *v, *clean;
    void *products; /* of a->products */
} unit_scratch;

/* Where everything lies in the scratch of a thread; returns its size in bytes. */
static ptrdiff_t attend_layout(char *at, ptrdiff_t depth, ptrdiff_t v_depth, unit_scratch *u) {
    ptrdiff_t used = 0;
    const ptrdiff_t widest = depth > v_depth ? depth : v_depth;
    u->groups = FSM_TAKE(group_state, FSM_ATTEND_GROUPS);
    u->s = FSM_TAKE(real, KEYS * GROUP);
    u->additive = FSM_TAKE(real, KEYS * GROUP);
    u->along = FSM_TAKE(real, KEYS);
    u->rows = FSM_TAKE(real, GROUP * (widest > KEYS ? widest : KEYS));
    u->k = FSM_TAKE(real, KEYS * depth);
    u->v = FSM_TAKE(real, KEYS * v_depth);
    u->clean = FSM_TAKE(real, KEYS * v_depth);
    for (int g = 0; g < FSM_ATTEND_GROUPS; g++) {
        real *q = FSM_TAKE(real, depth * GROUP);
        real *o = FSM_TAKE(real, up_to_multiple(v_depth, FSM_LANE_QUANTUM) * GROUP);
        if (at) {
            u->groups[g].q = q;
            u->groups[g].o = o;
        }
    }
    return used;
}

static ptrdiff_t attend_bytes(ptrdiff_t depth, ptrdiff_t v_depth) {
    unit_scratch u;
    return attend_layout(NULL, depth, v_depth, &u);
}

/* ---- transposition: [row][n] <-> [n][GROUP] ---- */

static void to_lanes(real *to, const real *rows, ptrdiff_t n) {
    transpose_in_as(REAL_DTYPE, to, GROUP, (const char *)rows, n * (ptrdiff_t)sizeof(real), GROUP,
                    n);
}

static void from_lanes(real *rows, const real *from, ptrdiff_t n) {
    transpose_out_as(REAL_DTYPE, from, GROUP, (char *)rows, n * (ptrdiff_t)sizeof(real), GROUP, n);
}

/* ---- matrix products ---- */

/* acc[i][v] = sum over t of a[i * row + t * step] * b[t * width + v]. All loops over i and v
 * unroll. */
FSM_INLINE void tile_product(int rows, int vectors, const real *a, ptrdiff_t row, ptrdiff_t step,
                             const real *b, ptrdiff_t width, ptrdiff_t n, vec acc[8][3]) {
    FSM_UNROLL(8)
    for (int i = 0; i < rows; i++) FSM_UNROLL(3)
    for (int v = 0; v < vectors; v++) acc[i][v] = v_set1(0);
    for (ptrdiff_t t = 0; t < n; t++) {
        vec lane[3];
        FSM_UNROLL(3)
        for (int v = 0; v < vectors; v++) lane[v] = v_load(b + t * width + v * VL);
        FSM_UNROLL(8)
        for (int i = 0; i < rows; i++) {
            const vec one = v_set1(a[i * row + t * step]);
            FSM_UNROLL(3)
            for (int v = 0; v < vectors; v++) acc[i][v] = v_fma(one, lane[v], acc[i][v]);
        }
    }
}

/* What no matrix product can beat: the FMAs of `count` steps of tile_product, with nothing read. How
 * many operations they were, an FMA being two. The compiler must not know that `one` is 1, or that two
 * sums are equal: it would do less. */
static double multiply_add(ptrdiff_t count) {
    vec acc[ACC_ROWS][3], sum = v_set1(0);
    const vec one = v_set1((real)(count > 0)), least = v_set1(ULP2);
    for (int i = 0; i < ACC_ROWS; i++)
        for (int v = 0; v < 3; v++) acc[i][v] = v_set1((real)(3 * i + v));
    for (ptrdiff_t t = 0; t < count; t++)
        for (int i = 0; i < ACC_ROWS; i++)
            for (int v = 0; v < 3; v++) acc[i][v] = v_fma(acc[i][v], one, least);
    for (int i = 0; i < ACC_ROWS; i++)
        for (int v = 0; v < 3; v++) sum = v_add(sum, acc[i][v]);
    const int used = v_hsum(sum) >= 0; /* always */
    return 2.0 * used * VL * ACC_ROWS * 3 * (double)count;
}

/* Calls TILE(rows) for tiles of `most` rows, 4 or 8, and of fewer at the end: ACC_ROWS, but of a single
 * vector 8 in any case, for in the time of one fma two pipes begin so many. */
#undef IN_TILES
#define IN_TILES(i, n, most, TILE)          \
    if (most == 8)                          \
        for (; i + 8 <= n; i += 8) TILE(8); \
    for (; i + 4 <= n; i += 4) TILE(4);     \
    if (n - i >= 2) {                       \
        TILE(2);                            \
        i += 2;                             \
    }                                       \
    if (n - i >= 1) TILE(1)

FSM_INLINE void group_scores_n(int vectors, real *s, const rows_of *k, ptrdiff_t keys,
                               const real *q, ptrdiff_t depth) {
    ptrdiff_t j = 0;
#define TILE(ROWS)                                                                              \
    {                                                                                           \
        vec acc[8][3];                                                                          \
        tile_product(ROWS, vectors, k->at + j * k->stride, k->stride, 1, q, GROUP, depth, acc); \
        FSM_UNROLL(8)                                                                           \
        for (int i = 0; i < ROWS; i++) FSM_UNROLL(3)                                            \
        for (int v = 0; v < vectors; v++) v_store(s + (j + i) * GROUP + v * VL, acc[i][v]);     \
    }
    IN_TILES(j, keys, (vectors == 1 ? 8 : ACC_ROWS), TILE)
#undef TILE
}

static void group_scores(int vectors, real *s, const rows_of *k, ptrdiff_t keys, const real *q,
                         ptrdiff_t depth) {
    if (vectors == 3) group_scores_n(3, s, k, keys, q, depth);
    else if (vectors == 2) group_scores_n(2, s, k, keys, q, depth);
    else group_scores_n(1, s, k, keys, q, depth);
}

FSM_INLINE void group_values_n(int vectors, real *o, const real *alpha, const rows_of *v_rows,
                               ptrdiff_t keys, const real *p, ptrdiff_t v_depth) {
    ptrdiff_t d = 0;
#define TILE(ROWS)                                                                           \
    {                                                                                        \
        vec acc[8][3];                                                                       \
        tile_product(ROWS, vectors, v_rows->at + d, 1, v_rows->stride, p, GROUP, keys, acc); \
        FSM_UNROLL(8)                                                                        \
        for (int i = 0; i < ROWS; i++) FSM_UNROLL(3)                                         \
        for (int v = 0; v < vectors; v++) {                                                  \
            real *at = o + (d + i) * GROUP + v * VL;                                         \
            v_store(at, v_fma(v_load(at), v_load(alpha + v * VL), acc[i][v]));               \
        }                                                                                    \
    }
    IN_TILES(d, v_depth, (vectors == 1 ? 8 : ACC_ROWS), TILE)
#undef TILE
}

static void group_values(int vectors, real *o, const real *alpha, const rows_of *v, ptrdiff_t keys,
                         const real *p, ptrdiff_t v_depth) {
    if (vectors == 3) group_values_n(3, o, alpha, v, keys, p, v_depth);
    else if (vectors == 2) group_values_n(2, o, alpha, v, keys, p, v_depth);
    else group_values_n(1, o, alpha, v, keys, p, v_depth);
}

/* ---- one group ---- */

/* The group that begins with row `first` of those up to `end`. 4 vectors are 2 and 2, not 3 and 1: a
 * tile of one is bound by what it reads (AVX2: 8 queries at 0.58 of the rate of FMA, 16 at 0.76, 24 at
 * 0.78). */
static void group_begin(const fsm_attend *a, group_state *g, ptrdiff_t first, ptrdiff_t end) {
    const ptrdiff_t vectors = (end - first + VL - 1) / VL, groups = (vectors + 2) / 3,
                    even = (vectors + groups - 1) / groups * VL;
    const int rows = (int)(end - first < even ? end - first : even);
    g->rows = rows;
    g->vectors = (rows + VL - 1) / VL;
    g->lo_least = a->keys;
    g->lo_most = 0;
    g->hi_least = a->keys;
    g->hi_most = -1;
    for (int l = 0; l < GROUP; l++) {
        row_view *view = &g->view[l];
        g->max[l] = -INFINITY;
        g->sum[l] = 0;
        g->slope[l] = 0;
        g->alpha[l] = 0;
        *view = (row_view){.hi = a->keys}; /* not a row: sees all, makes no block partial */
        if (l >= rows) continue;
        *view = view_of(a, first + l);
        if (view->lo < g->lo_least) g->lo_least = view->lo;
        if (view->lo > g->lo_most) g->lo_most = view->lo;
        if (view->hi < g->hi_least) g->hi_least = view->hi;
        if (view->hi > g->hi_most) g->hi_most = view->hi;
        if (a->slopes.at) memcpy(&g->slope[l], element(&a->slopes, view->head, 0, 0), sizeof(real));
        const real sink = sink_of(a, view->head); /* as if a key with this score had been seen */
        if (sink - sink == 0) g->max[l] = sink;
        g->sum[l] = sink == -INFINITY ? 0 : sink - sink + 1; /* NaN for NaN and inf */
    }
    memset(g->o, 0, (size_t)(up_to_multiple(a->v_depth, FSM_LANE_QUANTUM) * GROUP) * sizeof(real));
}

/* Whether the rows of a matrix can be transposed where they lie: of one head, or evenly apart
 * anyway. */
static int evenly_apart(const group_state *g, const fsm_matrix *m, fsm_dtype dtype) {
    const int native =
        dtype == REAL_DTYPE || (FSM_BITS == 32 && (dtype == FSM_F16 || dtype == FSM_BF16));
    const char *first = at_row(m, &g->view[0], 0), *last = at_row(m, &g->view[g->rows - 1], 0);
    return native && m->column == float_size(dtype) && last - first == (g->rows - 1) * m->row;
}

/* The rows of q, or of another matrix of its type; zeros where there are none. */
static void fetch_group(const fsm_attend *a, const group_state *g, const fsm_matrix *m,
                        ptrdiff_t columns, real *rows) {
    for (int l = 0; l < g->rows; l++)
        fetch_rows(rows + l * columns, at_row(m, &g->view[l], 0), 0, m->column, a->dtype, 1,
                   columns);
    memset(rows + g->rows * columns, 0, (size_t)((GROUP - g->rows) * columns) * sizeof(real));
}

static void group_queries(const fsm_attend *a, const score_rule *rule, group_state *g,
                          real *staging) {
    if (evenly_apart(g, &a->q, a->dtype))
        transpose_in(a->dtype, g->q, GROUP, at_row(&a->q, &g->view[0], 0), a->q.row, g->rows,
                     a->depth);
    else {
        fetch_group(a, g, &a->q, a->depth, staging);
        to_lanes(g->q, staging, a->depth);
    }
    for (ptrdiff_t i = 0; rule->negate && i < a->depth * GROUP; i++) g->q[i] = -g->q[i];
}

/* The rows' bias and mask at a block, transposed. Returns 0 if no row sees any of it; *hides: some
 * row does not see all. */
static int group_additive(const fsm_attend *a, const group_state *g, const block_state *b,
                          unit_scratch *u, int *hides) {
    if (a->bias.at && !a->mask.at && evenly_apart(g, &a->bias, a->bias_dtype))
        transpose_in(a->bias_dtype, u->additive, GROUP, g->view[0].bias + b->first * a->bias.column,
                     a->bias.row, g->rows, b->n);
    else {
        for (int l = 0; l < GROUP; l++) {
            real *row = u->rows + l * b->n;
            if (l < g->rows) load_additive(a, &g->view[l], b->first, b->n, row);
            else memset(row, 0, (size_t)b->n * sizeof(real));
        }
        to_lanes(u->additive, u->rows, b->n);
    }
    const vec zero = v_set1(0), one = v_set1(1), lowest = v_set1(LEAST), none = v_set1(-INFINITY);
    vec least = zero, seen = zero;
    for (ptrdiff_t i = 0; i < b->n * GROUP; i += VL) least = v_min(v_load(u->additive + i), least);
    *hides = v_any_less(least, lowest);
    if (!*hides) return 1;
    for (int v = 0; v < g->vectors; v++) {
        const ptrdiff_t k = g->rows - v * VL < VL ? g->rows - v * VL : VL;
        for (ptrdiff_t j = 0; j < b->n; j++) {
            const vec x = load_as(REAL_DTYPE, u->additive + j * GROUP, v * VL, k, none);
            seen = v_max(seen, v_if_less(x, lowest, zero, one));
        }
    }
    return v_any_less(zero, seen);
}

/* The views of VL rows, relative to where the block begins, with its padding: small, so exact, but for
 * positions 2^24 keys away or more (2^53), which only slopes ask for, and of which a distance is rounded
 * twice. */
FSM_INLINE lane_view view_lanes(const group_state *g, const block_state *b, int v) {
    real low[VL], high[VL], at[VL];
    for (int l = 0; l < VL; l++) {
        const row_view *view = &g->view[v * VL + l];
        const ptrdiff_t from = b->first / KEYS * KEYS, below = view->lo - from,
                        above = view->hi - from;
        low[l] = (real)(below < 0 ? 0 : below > KEYS ? KEYS : below);
        high[l] = (real)(above < 0 ? -1 : above > KEYS ? KEYS : above);
        at[l] = (real)(view->position - from);
    }
    return (lane_view){v_load(low), v_load(high), v_load(at), v_load(g->slope + v * VL)};
}

/* Dot products into scores, in place, -inf where a key is not seen; gathers the largest of each
 * row. What the rule has not costs nothing: a loop for all of it took 20 cycles a vector, an eighth
 * of the time with a bias. natural: as in the rule; shaped: with softcap or slopes; partial: with
 * keys not seen. */
FSM_INLINE void group_rule_as(const score_rule *rule, const group_state *g, const block_state *b,
                              const block_view *seen, real *s, int natural, int shaped, int partial,
                              vec top[3]) {
    const vec least = v_set1(LEAST), none = v_set1(-INFINITY), scale = v_set1(rule->scale);
    for (int v = 0; v < g->vectors; v++) {
        const lane_view view = view_lanes(g, b, v);
        vec most = none;
        FSM_UNROLL(2)
        for (ptrdiff_t j = 0; j < b->n; j++) {
            real *at = s + j * GROUP + v * VL;
            const vec key = v_set1((real)(b->first % KEYS + j));
            const vec add = seen->additive ? v_load(seen->additive + j * GROUP + v * VL)
                                           : v_set1(b->additive ? b->additive[j] : 0);
            vec x = v_load(at);
            if (shaped) x = rule_score(rule, x, add, view.slope, v_abs(v_sub(view.position, key)));
            else if (natural) x = v_fma(x, scale, add);
            if (partial) {
                x = v_if_less(add, least, none, x);
                x = v_if_less(key, view.lo, none, x);
                x = v_if_less(view.hi, key, none, x);
            }
            v_store(at, x);
            most = v_max(x, most);
        }
        top[v] = most;
    }
}

static void group_rule(const fsm_attend *a, const score_rule *rule, const group_state *g,
                       const block_state *b, const block_view *seen, real *s, vec top[3]) {
    const int partial = seen->hides || seen->ranged;
    if (!rule->natural) group_rule_as(rule, g, b, seen, s, 0, 0, 1, top);
    else if (!partial && rule->cap == 0 && !a->slopes.at)
        group_rule_as(rule, g, b, seen, s, 1, 0, 0, top);
    else group_rule_as(rule, g, b, seen, s, 1, 1, 1, top);
}

/* Scores into weights, in place; the state of the rows takes them in. */
static void group_weights(const score_rule *rule, group_state *g, ptrdiff_t keys, real *s,
                          const vec top[3]) {
    const vec c = v_set1(rule->c);
    for (int v = 0; v < g->vectors; v++) {
        const vec before = v_load(g->max + v * VL), max = v_max(top[v], before);
        /* -inf: nothing seen yet; any number does for what will be 0 */
        const vec ref = v_if_less(max, v_set1(LEAST), v_set1(0), max);
        const vec alpha = pow2(v_mul(v_sub(before, ref), c));
        vec sum = v_set1(0);
        FSM_UNROLL(4)
        for (ptrdiff_t j = 0; j < keys; j++) {
            real *at = s + j * GROUP + v * VL;
            const vec p = pow2(v_mul(v_sub(v_load(at), ref), c));
            v_store(at, p);
            sum = v_add(sum, p);
        }
        v_store(g->max + v * VL, max);
        v_store(g->alpha + v * VL, alpha);
        v_store(g->sum + v * VL, v_fma(v_load(g->sum + v * VL), alpha, sum));
    }
}

/* Values that are not finite, of rows of v or k, to the queries that do see them. */
static void add_poison(const fsm_attend *a, group_state *g, const block_state *b, rows_of values,
                       ptrdiff_t columns, const real *p) {
    for (ptrdiff_t j = 0; j < b->n; j++) {
        const rows_of row = {values.at + j * values.stride, values.stride};
        real seen[GROUP] = {0};
        if (all_finite(row, 1, columns)) continue;
        for (int l = 0; l < g->rows; l++) seen[l] = (real)sees(a, &g->view[l], b->first + j);
        for (ptrdiff_t d = 0; d < columns; d++) {
            if (row.at[d] - row.at[d] == 0) continue;
            for (int v = 0; v < g->vectors * VL; v += VL) {
                const vec o = v_load(g->o + d * GROUP + v),
                          sum = v_fma(v_load(p + j * GROUP + v), v_set1(row.at[d]), o);
                v_store(g->o + d * GROUP + v, v_if_less(v_set1(0), v_load(seen + v), sum, o));
            }
        }
    }
}

/* What the group sees of a block; returns 0 if that is nothing. */
static int view_block(const fsm_attend *a, const group_state *g, const block_state *b,
                      unit_scratch *u, block_view *seen) {
    const ptrdiff_t last = b->first + b->n - 1;
    if (b->first > g->hi_most || last < g->lo_least) return 0;
    const int own = (a->mask.at || a->bias.at) && !b->additive;
    *seen = (block_view){.hides = b->hides,
                         .ranged = b->first < g->lo_most || last > g->hi_least,
                         .additive = own ? u->additive : NULL};
    return !own || group_additive(a, g, b, u, &seen->hides);
}

/* Scores of a block, and whether the group sees any of it. *partial: some row does not see all. */
static int group_block(const fsm_attend *a, const score_rule *rule, group_state *g, block_state *b,
                       unit_scratch *u, vec top[3], int *partial) {
    block_view seen;
    if (!view_block(a, g, b, u, &seen)) return 0;
    if (a->products) a->products->scores(u->products, (int)(g - u->groups), g->vectors, u->s);
    else {
        if (!b->k.at) b->k = fetch(&a->k, a->dtype, b->first, b->n, a->depth, u->k);
        group_scores(g->vectors, u->s, &b->k, b->n, g->q, a->depth);
    }
    if (rule->natural || seen.hides || seen.ranged) group_rule(a, rule, g, b, &seen, u->s, top);
    else
        for (int v = 0; v < g->vectors; v++) {
            top[v] = v_set1(-INFINITY);
            FSM_UNROLL(4)
            for (ptrdiff_t j = 0; j < b->n; j++)
                top[v] = v_max(v_load(u->s + j * GROUP + v * VL), top[v]);
        }
    *partial = seen.hides || seen.ranged;
    return 1;
}

/* Adds the weighted values to o. Returns whether some that are not finite were left out. */
static int group_mix(const fsm_attend *a, group_state *g, block_state *b, unit_scratch *u,
                     int partial) {
    if (a->products && !a->products->mix(u->products, g->vectors, u->s, g->alpha, g->o)) return 0;
    if (!b->v.at) b->v = fetch(&a->v, a->dtype, b->first, b->n, a->v_depth, u->v);
    if (a->products) return 1;
    if (partial && b->poisoned < 0) {
        b->poisoned = !all_finite(b->v, b->n, a->v_depth);
        if (b->poisoned) b->clean = without_poison(b->v, b->n, a->v_depth, u->clean);
    }
    const int clean = partial && b->poisoned;
    group_values(g->vectors, g->o, g->alpha, clean ? &b->clean : &b->v, b->n, u->s, a->v_depth);
    return clean;
}

static void group_end(const fsm_attend *a, const score_rule *rule, group_state *g, real *staging) {
    for (int l = 0; l < g->rows; l++) {
        const row_view *view = &g->view[l];
        const real lse = end_sum(a, rule, view, g->max[l], &g->sum[l]);
        if (a->lse.at) memcpy(at_row(&a->lse, view, 0), &lse, sizeof lse);
    }
    for (ptrdiff_t d = 0; d < a->v_depth; d++)
        for (int v = 0; v < g->vectors; v++) {
            real *at = g->o + d * GROUP + v * VL;
            const vec mean = v_div(v_load(at), v_load(g->sum + v * VL));
            v_store(at, v_canon(v_add(mean, v_set1(0)))); /* no -0 */
        }
    if (evenly_apart(g, &a->out, a->dtype)) {
        transpose_out(a->dtype, g->o, GROUP, at_row(&a->out, &g->view[0], 0), a->out.row, g->rows,
                      a->v_depth);
        return;
    }
    from_lanes(staging, g->o, a->v_depth);
    for (int l = 0; l < g->rows; l++)
        store_run(at_row(&a->out, &g->view[l], 0), a->out.column, a->dtype,
                  staging + l * a->v_depth, a->v_depth);
}

/* ---- a unit: some groups, and all keys that they see ---- */

static void begin_block(const fsm_attend *a, const row_view *any, block_state *b, ptrdiff_t first,
                        ptrdiff_t end, unit_scratch *u) {
    *b =
        (block_state){.first = first, .n = end - first < KEYS ? end - first : KEYS, .poisoned = -1};
    /* The same for every row, as a padding mask is: read once. */
    const int varies = (a->mask.at && (a->mask.row || (a->heads > 1 && a->mask.head))) ||
                       (a->bias.at && (a->bias.row || (a->heads > 1 && a->bias.head)));
    if (!varies && (a->mask.at || a->bias.at)) {
        b->additive = u->along;
        load_additive(a, any, first, b->n, u->along);
        /* Padding, at either end, is left out. */
        while (b->n && b->additive[b->n - 1] == -INFINITY) b->n--;
        /* In front by whole steps of the products: the order in which keys are added stays. */
        const ptrdiff_t step = a->products ? FSM_PRODUCT_KEYS : 1;
        ptrdiff_t padding = 0;
        while (padding < b->n && b->additive[padding] == -INFINITY) padding++;
        padding -= padding % step;
        b->additive += padding, b->first += padding, b->n -= padding;
        for (ptrdiff_t j = 0; j < b->n; j++) b->hides += b->additive[j] == -INFINITY;
    }
    if (a->products) a->products->block(u->products, b->first, b->n);
}

/* Once the state of the rows is final: their weights, computed again, block by block. */
static void store_weights(const fsm_attend *a, const score_rule *rule, group_state *g,
                          unit_scratch *u) {
    for (ptrdiff_t first = 0; first < a->keys; first += KEYS) {
        block_state b;
        vec top[3];
        int partial;
        begin_block(a, &g->view[0], &b, first, a->keys, u);
        if (group_block(a, rule, g, &b, u, top, &partial))
            for (int v = 0; v < g->vectors; v++) {
                const vec max = v_load(g->max + v * VL), sum = v_load(g->sum + v * VL);
                const vec ref = v_if_less(max, v_set1(LEAST), v_set1(0), max);
                for (ptrdiff_t j = 0; j < b.n; j++) {
                    real *at = u->s + j * GROUP + v * VL;
                    const vec p = pow2(v_mul(v_sub(v_load(at), ref), v_set1(rule->c)));
                    v_store(at, v_div(p, sum));
                }
            }
        else memset(u->s, 0, sizeof(real) * KEYS * GROUP);
        from_lanes(u->rows, u->s, b.n);
        for (int l = 0; l < g->rows; l++) {
            real row[KEYS] = {0}, *at = row + (b.first - first);
            memcpy(at, u->rows + l * b.n, (size_t)b.n * sizeof(real));
            if (g->sum[l] != g->sum[l])
                for (ptrdiff_t j = 0; j < b.n; j++)
                    at[j] = sees(a, &g->view[l], b.first + j) ? (real)NAN : 0;
            store_run(at_row(&a->weights, &g->view[l], first), a->weights.column, a->dtype, row,
                      a->keys - first < KEYS ? a->keys - first : KEYS);
        }
    }
}

static void attend_unit(const fsm_attend *a) {
    unit_scratch u;
    attend_layout(a->scratch, a->depth, a->v_depth, &u);
    if (a->products)
        u.products = a->products->begin(a->scratch + attend_bytes(a->depth, a->v_depth), a);
    const score_rule rule = make_rule(a);
    ptrdiff_t from = a->keys, to = 0; /* the keys that some row sees */
    int groups = 0;
    for (ptrdiff_t r = a->begin; r < a->end; r += u.groups[groups++].rows) {
        group_state *g = &u.groups[groups];
        group_begin(a, g, r, a->end);
        group_queries(a, &rule, g, u.rows);
        if (a->products) a->products->queries(u.products, groups, g->vectors, g->q);
        if (g->lo_least < from) from = g->lo_least;
        if (g->hi_most + 1 > to) to = g->hi_most + 1;
    }
    for (ptrdiff_t first = from / KEYS * KEYS; first < to; first += KEYS) {
        block_state b;
        begin_block(a, &u.groups[0].view[0], &b, first, to, &u);
        if (b.n == 0) continue;
        for (int i = 0; i < groups; i++) {
            group_state *g = &u.groups[i];
            vec top[3];
            int partial;
            if (!group_block(a, &rule, g, &b, &u, top, &partial)) continue;
            group_weights(&rule, g, b.n, u.s, top);
            if (group_mix(a, g, &b, &u, partial)) add_poison(a, g, &b, b.v, a->v_depth, u.s);
        }
    }
    for (int i = 0; i < groups; i++) {
        group_end(a, &rule, &u.groups[i], u.rows);
        if (a->weights.at) store_weights(a, &rule, &u.groups[i], &u);
    }
    if (a->products) a->products->end(u.products);
}
