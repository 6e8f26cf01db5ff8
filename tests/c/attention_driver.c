/* As driver.c, for attention.
 *
 *     attention_driver [ISA...]        by default every ISA that this CPU can run
 *
 * A `test` says what an attention problem looks like and how its arrays lie in memory; draw() makes
 * up the numbers. check() runs it on every ISA and holds the results against
 *
 *     the same ISA     given the queries of each head alone, in two pieces, contiguous, on one thread,
 *                      before anything was poisoned: bit for bit, but where poison is seen
 *     long double      a plain evaluation, within the bound that attention.inc.h derives
 *     guards           around the arrays and in their gaps nothing may be written, nor read
 */
#include "harness.h"

/* ---- what a test is ---- */

/* Of the dimensions b, c (leading), h (head), r (row: query or key) and i (column). */
enum { B, C, H, R, I, DIMS };
static const char dims[] = "bchri";
static const layout layouts[] = {
    {"contiguous", "bchri", 1, 0, 0, 0},
    {"heads inside", "bcrhi", 1, 0, 0, 0},
    {"transposed", "bchir", 1, 0, 0, 0},
    {"unaligned", "bchri", 1, 0, 0, 1},
    {"padded", "bchri", 1, 5, 0, 0},
    {"every third", "bchri", 3, 0, 0, 0},
    {"inside out", "irhcb", 1, 0, 0, 0},
    {"heads inside, unaligned", "bcrhi", 1, 3, 0, 1},
    {"rows reversed", "bchri", 1, 0, 1 << R, 0},
    {"columns reversed", "cbhri", 1, 1, 1 << I, 1},
    {"all reversed", "bcrhi", 2, 1, 31, 0},
};
enum { CONTIGUOUS };
enum { OPERANDS = FSM_ATTN_WEIGHTS + 1, RESULTS = OPERANDS - FSM_ATTN_OUT };

typedef struct {
    fsm_dtype type, bias_type;
    ptrdiff_t lead[2], kv_heads, share; /* share: heads of a KV head */
    ptrdiff_t queries, keys, depth, v_depth;
    double scale, softcap, offset;
    int causal;
    ptrdiff_t left, right;
    int has[OPERANDS], layout[OPERANDS];
    int still[OPERANDS]; /* bits of the dimensions with a stride of 0 */
    int poison;          /* 1: what nobody sees is NaN or inf, 2: and some of what is seen */
    int threads, upward; /* upward: the caller rounds so, which must change nothing */
    uint64_t seed;
} test;

static const char *const names[] = {"q",       "k",     "v",      "mask", "bias", "offset",
                                    "lengths", "sinks", "slopes", "out",  "lse",  "weights"};

static fsm_dtype compute_of(const test *t) { return t->type == FSM_F64 ? FSM_F64 : FSM_F32; }

static fsm_dtype type_of(const test *t, int o) {
    switch (o) {
    case FSM_ATTN_MASK: return FSM_U8;
    case FSM_ATTN_BIAS: return t->bias_type;
    case FSM_ATTN_OFFSET:
    case FSM_ATTN_LENGTHS: return FSM_I64;
    case FSM_ATTN_SINKS:
    case FSM_ATTN_SLOPES:
    case FSM_ATTN_LSE: return compute_of(t);
    default: return t->type;
    }
}

/* Elements along each dimension; STILL where the operand has none. */
static void extents(const test *t, int o, ptrdiff_t extent[DIMS]) {
    static const char *const has[] = {"bchri", "bchri", "bchri", "bchri", "bchri", "bc",
                                      "bc",    "h",     "h",     "bchri", "bchr",  "bchri"};
    const int of_keys = o == FSM_ATTN_K || o == FSM_ATTN_V;
    extent[B] = t->lead[0];
    extent[C] = t->lead[1];
    extent[H] = of_keys ? t->kv_heads : t->kv_heads * t->share;
    extent[R] = of_keys ? t->keys : t->queries;
    extent[I] = o <= FSM_ATTN_K                        ? t->depth
                : o == FSM_ATTN_V || o == FSM_ATTN_OUT ? t->v_depth
                                                       : t->keys;
    for (int d = 0; d < DIMS; d++)
        if (!strchr(has[o], dims[d]) || t->still[o] >> d & 1) extent[d] = STILL;
}

/* Counts through the indices `at` below `extent`, starting from {0}; false at the end. */
static int next(ptrdiff_t at[DIMS], const ptrdiff_t extent[DIMS]) {
    for (int d = DIMS - 1; d >= 0; at[d--] = 0)
        if (++at[d] < extent[d]) return 1;
    return 0;
}

static int is_empty(const ptrdiff_t extent[DIMS]) {
    for (int d = 0; d < DIMS; d++)
        if (extent[d] == 0) return 1;
    return 0;
}

static void expect(int ok, const test *t, const fsm_isa *isa, const char *what) {
    if (!tell(ok)) return;
    printf(
        "FAILED on %s: %s\n    %s, leading (%td %td), %td KV heads of %td, queries %td, keys %td, "
        "depth %td, %td, scale %g, softcap %g, offset %g, window %td %td%s%s, poison %d, %d "
        "threads, seed %llu",
        fsm_isa_name(isa), what, type_names[t->type], t->lead[0], t->lead[1], t->kv_heads, t->share,
        t->queries, t->keys, t->depth, t->v_depth, t->scale, t->softcap, t->offset, t->left,
        t->right, t->causal ? ", causal" : "", t->upward ? ", upward" : "", t->poison, t->threads,
        (unsigned long long)t->seed);
    for (int o = 0; o < OPERANDS; o++) {
        if (!t->has[o]) continue;
        printf(", %s: %s %s", names[o], type_names[type_of(t, o)], layouts[t->layout[o]].name);
        for (int d = 0; d < DIMS; d++)
            if (t->still[o] >> d & 1) printf(" still:%c", dims[d]);
    }
    printf("\n");
}

/* ---- numbers ---- */

static uint64_t hash(uint64_t a, uint64_t b, uint64_t c) { return mix(mix(a * 64 + b) + c); }
static double fraction(uint64_t h) { return (double)(h >> 11) * 0x1p-53; }

/* Of mask and bias: is the key hidden? Blocks of keys are hidden or free for all rows or for some
 * rows, and so are rows and keys. */
static int is_hidden(const test *t, int o, const ptrdiff_t at[DIMS], uint64_t h) {
    const uint64_t seed = t->seed + (uint64_t)o, block = (uint64_t)at[I] / 64;
    const uint64_t head = (uint64_t)((at[B] * 8 + at[C]) * 64 + at[H]), row = (uint64_t)at[R];
    switch (hash(seed, 40, block) % 5) {
    case 0: return 1;
    case 1: return 0;
    }
    if (hash(seed + head, row, 41) % 9 == 0 || hash(seed + head, row + 42, block) % 4 == 0)
        return 1;
    return fraction(h) < 0.2;
}

static double draw(const test *t, int o, const ptrdiff_t at[DIMS]) {
    uint64_t h = t->seed * 16 + (uint64_t)o;
    for (int d = 0; d < DIMS; d++) h = hash(h, (uint64_t)d, (uint64_t)at[d]);
    const double u = fraction(h), lead = (double)(at[B] * 2 + at[C]);
    switch (o) {
    case FSM_ATTN_Q:
    case FSM_ATTN_K: return 2 * u - 1;
    case FSM_ATTN_V: return 4 * u - 1.5;
    case FSM_ATTN_MASK: return is_hidden(t, o, at, h) ? 0 : 1 + h % 2 * 127;
    case FSM_ATTN_BIAS:
        if (!is_hidden(t, o, at, h)) return 4 * u - 2;
        return t->bias_type == compute_of(t) ? -INFINITY : -1e300; /* -inf in any lesser type */
    case FSM_ATTN_OFFSET: return t->offset + (t->seed % 2 && fabs(t->offset) < 1e6 ? lead : 0);
    case FSM_ATTN_LENGTHS: return h % 4 == 0 ? (double)t->keys : floor(u * (double)(t->keys + 1));
    case FSM_ATTN_SINKS:
        return h % 5 == 0 ? -INFINITY : h % 9 == 0 ? (h & 64 ? NAN : INFINITY) : 3 * u - 1;
    default: return 0.3 * u; /* slopes */
    }
}

/* All that a test is made of, as numbers. */
typedef struct {
    double *at[OPERANDS];
    ptrdiff_t stride[OPERANDS][DIMS];
} world;

static void set_strides(ptrdiff_t stride[DIMS], const ptrdiff_t extent[DIMS], ptrdiff_t *size) {
    *size = 1;
    for (int d = DIMS - 1; d >= 0; d--) {
        stride[d] = extent[d] == STILL ? 0 : *size;
        *size *= extent[d] == STILL ? 1 : extent[d];
    }
}

static ptrdiff_t place_of(const ptrdiff_t stride[DIMS], const ptrdiff_t at[DIMS]) {
    ptrdiff_t place = 0;
    for (int d = 0; d < DIMS; d++) place += stride[d] * at[d];
    return place;
}

static double *number(const world *w, int o, const ptrdiff_t at[DIMS]) {
    return w->at[o] + place_of(w->stride[o], at);
}

static world new_world(const test *t) {
    world w = {0};
    for (int o = 0; o < FSM_ATTN_OUT; o++) {
        ptrdiff_t extent[DIMS], at[DIMS] = {0}, size;
        if (!t->has[o]) continue;
        extents(t, o, extent);
        set_strides(w.stride[o], extent, &size);
        w.at[o] = allocate(size * (ptrdiff_t)sizeof(double));
        if (is_empty(extent)) continue;
        do *number(&w, o, at) = rounded_to(type_of(t, o), draw(t, o, at));
        while (next(at, extent));
    }
    return w;
}

static void free_world(world *w) {
    for (int o = 0; o < FSM_ATTN_OUT; o++) free(w->at[o]);
}

/* row: b, c, h, query */
static double position(const test *t, const world *w, const ptrdiff_t row[DIMS]) {
    return (double)row[R] + (t->has[FSM_ATTN_OFFSET] ? *number(w, FSM_ATTN_OFFSET, row) : 0);
}

static int sees(const test *t, const world *w, const ptrdiff_t row[DIMS], ptrdiff_t key) {
    const ptrdiff_t at[DIMS] = {row[B], row[C], row[H], row[R], key};
    const double p = position(t, w, row);
    if (t->causal && (double)key > p) return 0;
    if (t->left >= 0 && (double)key < p - (double)t->left) return 0;
    if (t->right >= 0 && (double)key > p + (double)t->right) return 0;
    if (t->has[FSM_ATTN_LENGTHS] && (double)key >= *number(w, FSM_ATTN_LENGTHS, at)) return 0;
    if (t->has[FSM_ATTN_MASK] && *number(w, FSM_ATTN_MASK, at) == 0) return 0;
    if (!t->has[FSM_ATTN_BIAS]) return 1;
    const double bias = *number(w, FSM_ATTN_BIAS, at);
    return (compute_of(t) == FSM_F64 ? bias : (float)bias) != -INFINITY;
}

static double some_poison(uint64_t h) {
    return h % 3 == 0 ? NAN : h % 3 == 1 ? INFINITY : -INFINITY;
}

/* Of a key that a row does not see, for whatever reason. */
static void spoil_bias(const test *t, world *w, const ptrdiff_t at[DIMS]) {
    double *bias = number(w, FSM_ATTN_BIAS, at);
    *bias = NAN;
    if (sees(t, w, at, at[I])) *bias = -INFINITY;
}

/* Keys and values that no row sees, and the bias of keys that a row does not see. */
static void poison_unseen(const test *t, world *w) {
    ptrdiff_t extent[DIMS], at[DIMS] = {0};
    extents(t, FSM_ATTN_K, extent);
    extent[I] = 1;
    if (is_empty(extent)) return;
    do {
        int seen = 0;
        for (ptrdiff_t i = 0; i < t->share * t->queries; i++) {
            const ptrdiff_t row[] = {at[B], at[C], at[H] * t->share + i / t->queries,
                                     i % t->queries, at[R]};
            const int sees_it = sees(t, w, row, at[R]);
            seen |= sees_it;
            if (t->has[FSM_ATTN_BIAS] && !t->still[FSM_ATTN_BIAS] && !sees_it)
                spoil_bias(t, w, row);
        }
        for (ptrdiff_t d = 0; d < t->depth && !seen; d++)
            number(w, FSM_ATTN_K, at)[d] = some_poison((uint64_t)(at[R] + d / 3));
        for (ptrdiff_t d = 0; d < t->v_depth && !seen; d++)
            number(w, FSM_ATTN_V, at)[d] = some_poison((uint64_t)(at[R] + d));
    } while (next(at, extent));
}

/* For each KV head one key, one value or one query, whoever sees it. */
static void poison_some(const test *t, world *w) {
    ptrdiff_t extent[DIMS], at[DIMS] = {0};
    extents(t, FSM_ATTN_K, extent);
    extent[R] = extent[I] = 1;
    if (is_empty(extent) || !t->keys || !t->v_depth) return;
    do {
        const uint64_t h = hash(t->seed, 50, (uint64_t)(at[B] * 999 + at[C] * 99 + at[H]));
        ptrdiff_t where[DIMS] = {at[B], at[C], at[H], (ptrdiff_t)(h / 4 % (uint64_t)t->keys), 0};
        const int o = h % 4 == 0 ? FSM_ATTN_K : h % 4 == 1 ? FSM_ATTN_Q : FSM_ATTN_V;
        where[I] = (ptrdiff_t)(h >> 32) % (o == FSM_ATTN_V ? t->v_depth : t->depth);
        if (o == FSM_ATTN_Q) where[R] %= t->queries;
        if (o == FSM_ATTN_Q) where[H] *= t->share;
        *number(w, o, where) = some_poison(h >> 8);
    } while (next(at, extent));
}

/* ---- running a test ---- */

typedef struct {
    char *at[RESULTS]; /* C-contiguous, of a whole test; NULL if not asked for */
    ptrdiff_t stride[RESULTS][DIMS], bytes[RESULTS];
} results;

static results new_results(const test *t) {
    results r = {0};
    for (int k = 0; k < RESULTS; k++) {
        ptrdiff_t extent[DIMS];
        extents(t, FSM_ATTN_OUT + k, extent);
        set_strides(r.stride[k], extent, &r.bytes[k]);
        r.bytes[k] *= sizes[type_of(t, FSM_ATTN_OUT + k)];
        if (t->has[FSM_ATTN_OUT + k]) r.at[k] = allocate(r.bytes[k]);
    }
    return r;
}

static void free_results(results *r) {
    for (int k = 0; k < RESULTS; k++) free(r->at[k]);
}

static char *element(const array *a, const ptrdiff_t at[DIMS]) {
    return a->first + place_of(a->stride, at);
}

/* Operand o of the piece of a world that begins at `origin` (b, c, head, query). */
static array new_operand(const test *t, int o, const world *w, const ptrdiff_t origin[DIMS],
                         ptrdiff_t world_share) {
    ptrdiff_t extent[DIMS], at[DIMS] = {0};
    extents(t, o, extent);
    array a = new_blank(&layouts[t->layout[o]], dims, extent, sizes[type_of(t, o)]);
    if (o < FSM_ATTN_OUT && !is_empty(extent)) do {
            ptrdiff_t from[DIMS];
            for (int d = 0; d < DIMS; d++) from[d] = origin[d] + at[d];
            if (o == FSM_ATTN_K || o == FSM_ATTN_V) {
                from[H] = at[H] + (origin[H] ? origin[H] / world_share : 0);
                from[R] = at[R];
            }
            double x = w->at[o] ? *number(w, o, from) : 0;
            if (o == FSM_ATTN_OFFSET) x += (double)origin[R];
            encode(type_of(t, o), x, element(&a, at));
        } while (next(at, extent));
    guard(&a, o < FSM_ATTN_OUT);
    return a;
}

/* Whether the products are those of isa_amx.c. */
static int in_tiles(const test *t, const fsm_isa *isa) {
    return t->type == FSM_BF16 && t->queries > 1 && strcmp(fsm_isa_name(isa), "amx") == 0;
}

/* The caller has a configuration of tiles of its own, and finds it again: one with two rows of a tile. */
#ifdef FSM_HAVE_AMX
static _Alignas(64) const uint8_t caller_tiles[64] = {[0] = 1, [16] = 8, [48] = 2};

static void tiles_begin(const test *t, const fsm_isa *isa) {
    if (in_tiles(t, isa)) __asm__ volatile("ldtilecfg %0" : : "m"(caller_tiles));
}
static int tiles_end(const test *t, const fsm_isa *isa) {
    uint8_t now[64];
    if (!in_tiles(t, isa)) return 1;
    __asm__ volatile("sttilecfg %0\n\ttilerelease" : "=m"(now));
    return memcmp(now, caller_tiles, sizeof now) == 0;
}
#else
static void tiles_begin(const test *t, const fsm_isa *isa) { (void)t, (void)isa; }
static int tiles_end(const test *t, const fsm_isa *isa) { return (void)t, (void)isa, 1; }
#endif

static void run(const test *t, const fsm_isa *isa, const world *w, const ptrdiff_t origin[DIMS],
                ptrdiff_t world_share, results *into) {
    fsm_attention p = {.compute = compute_of(t),
                       .ndim = 2,
                       .threads = t->threads,
                       .isa = isa,
                       .shape = {t->lead[0], t->lead[1]},
                       .heads = t->kv_heads * t->share,
                       .kv_heads = t->kv_heads,
                       .queries = t->queries,
                       .keys = t->keys,
                       .depth = t->depth,
                       .v_depth = t->v_depth,
                       .scale = t->scale,
                       .softcap = t->softcap,
                       .causal = t->causal,
                       .left = t->left,
                       .right = t->right};
    array a[OPERANDS] = {0};
    fsm_attention_plan *plan;
    for (int o = 0; o < OPERANDS; o++) {
        if (!t->has[o]) continue;
        a[o] = new_operand(t, o, w, origin, world_share);
        p.operand[o] = (fsm_array){a[o].first, type_of(t, o), {0}};
        memcpy(p.operand[o].strides, a[o].stride, sizeof a[o].stride);
    }
    const int mode = t->upward ? FE_UPWARD : FE_TONEAREST;
    fesetround(mode);
    tiles_begin(t, isa);
    fsm_status status = fsm_attention_new(&plan, &p);
    raise_one_flag(); /* the plan's own arithmetic raises some */
    while (status == FSM_AGAIN) status = fsm_attention_run(plan);
    fsm_attention_free(plan);
    const int kept = fegetround() == mode && only_that_flag();
    fesetround(FE_TONEAREST);
    expect(kept, t, isa, "changed the floating-point mode or flags");
    expect(tiles_end(t, isa), t, isa, "changed the configuration of tiles");
    expect(status == FSM_DONE, t, isa, "did not end");
    for (int o = 0; o < OPERANDS; o++) {
        if (!t->has[o]) continue;
        const int k = o - FSM_ATTN_OUT, size = sizes[type_of(t, o)];
        ptrdiff_t extent[DIMS], at[DIMS] = {0};
        extents(t, o, extent);
        if (k >= 0 && !is_empty(extent)) do {
                const ptrdiff_t place =
                    place_of(into->stride[k], origin) + place_of(into->stride[k], at);
                take(element(&a[o], at), into->at[k] + place * size, size);
            } while (next(at, extent));
        if (k < 0) expect(is_untouched(&a[o]), t, isa, "wrote to an input");
        else expect(is_blank(&a[o]), t, isa, "wrote beside a result");
        free_array(&a[o]);
    }
}

/* The same, head by head, the queries in two pieces where each can have several, the simplest way. */
static void run_alone(const test *t, const fsm_isa *isa, const world *w, results *into) {
    test one = *t;
    one.lead[0] = one.lead[1] = one.kv_heads = one.share = one.threads = 1;
    one.upward = 0;
    memset(one.layout, CONTIGUOUS, sizeof one.layout);
    if (t->keys < 1 << 20) memset(one.still, 0, sizeof one.still);
    ptrdiff_t heads[] = {t->lead[0], t->lead[1], t->kv_heads * t->share, 1, 1}, origin[DIMS] = {0};
    const ptrdiff_t cut =
        t->queries < 4 ? 0 : 2 + (ptrdiff_t)(t->seed % (uint64_t)(t->queries - 3));
    if (is_empty(heads)) return;
    do
        for (int piece = 0; piece < 1 + (cut > 0); piece++) {
            one.queries = cut == 0 ? t->queries : piece == 0 ? cut : t->queries - cut;
            one.has[FSM_ATTN_OFFSET] = t->has[FSM_ATTN_OFFSET] || piece;
            origin[R] = piece ? cut : 0;
            run(&one, isa, w, origin, t->share, into);
            origin[R] = 0;
        }
    while (next(origin, heads));
}

/* ---- what should come out ---- */

typedef struct {
    long double value, off; /* how far off a result may be, before it is rounded to its type */
    int odd;                /* it sees what is not finite */
    long double size;       /* of a weighted mean: that of what it is the mean of */
} entry;

static int is_odd(const double *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++)
        if (x[i] - x[i] != 0) return 1;
    return 0;
}

/* The results of one row; `weights` has a place for each key, `out` for each column. */
static void evaluate(const test *t, const world *w, const ptrdiff_t row[DIMS], entry *out,
                     entry *lse, entry *weights) {
    const long double eps = compute_of(t) == FSM_F64 ? 0x1p-53L : 0x1p-24L;
    const double *q = number(w, FSM_ATTN_Q, row);
    const ptrdiff_t q_step = w->stride[FSM_ATTN_Q][I], k_step = w->stride[FSM_ATTN_K][I],
                    v_step = w->stride[FSM_ATTN_V][I];
    const double sink = t->has[FSM_ATTN_SINKS] ? *number(w, FSM_ATTN_SINKS, row) : -INFINITY;
    const double slope = t->has[FSM_ATTN_SLOPES] ? *number(w, FSM_ATTN_SLOPES, row) : 0;
    const double p = position(t, w, row);
    const ptrdiff_t end =
        t->has[FSM_ATTN_LENGTHS] ? (ptrdiff_t)*number(w, FSM_ATTN_LENGTHS, row) : t->keys;
    const ptrdiff_t keys = t->causal && p < (double)end ? (p < 0 ? 0 : (ptrdiff_t)p + 1) : end;
    struct {
        ptrdiff_t key;
        const double *v;
        long double z, weight;
    } *seen = allocate((keys + 1) * (ptrdiff_t)sizeof *seen);
    ptrdiff_t n = 0;
    int odd = is_odd(q, q_step ? t->depth : 1);
    long double max = sink, products = 0, other = sink - sink == 0 ? fabs(sink) : 0;
    for (ptrdiff_t j = 0; j < keys; j++) {
        const ptrdiff_t at[] = {row[B], row[C], row[H], row[R], j};
        const ptrdiff_t key[] = {row[B], row[C], row[H] / t->share, j, 0};
        if (!sees(t, w, at, j)) continue;
        const double *k = number(w, FSM_ATTN_K, key);
        long double dot = 0, all = 0;
        for (ptrdiff_t d = 0; d < t->depth; d++) {
            const long double term = (long double)q[d * q_step] * k[d * k_step];
            dot += term;
            all += fabsl(term);
        }
        odd |= is_odd(k, k_step ? t->depth : 1);
        const double bias = t->has[FSM_ATTN_BIAS] ? *number(w, FSM_ATTN_BIAS, at) : 0;
        const double distance = fabs(p - (double)j);
        long double z = t->scale * dot;
        if (t->softcap != 0) z = t->softcap * tanhl(z / t->softcap);
        z += (compute_of(t) == FSM_F64 ? bias : (float)bias) - slope * distance;
        if (all - all == 0) products = fmaxl(products, all);
        other = fmaxl(other, fabs(bias) + slope * distance + t->softcap);
        if (max == max && !(z <= max)) max = z; /* NaN stays */
        seen[n].key = j;
        seen[n].v = number(w, FSM_ATTN_V, key);
        seen[n++].z = z;
    }
    const int broken = n && max - max != 0;
    const long double ref = max - max == 0 ? max : 0;
    long double sum = sink - sink == 0 ? expl(sink - ref) : 0;
    for (ptrdiff_t i = 0; i < n; i++) sum += expl(seen[i].z - ref);
    for (ptrdiff_t i = 0; i < n; i++) seen[i].weight = broken ? NAN : expl(seen[i].z - ref) / sum;

    const long double in_blocks = 2 * (128 + 4 * (long double)((t->keys + 63) / 64)) + 16;
    const long double off =
        eps * (2 * (t->depth + 2) * fabs(t->scale) * products + in_blocks + 4 * other);
    for (ptrdiff_t j = 0; j < t->keys && weights; j++) weights[j] = (entry){0, 0, odd, 0};
    for (ptrdiff_t i = 0; i < n && weights; i++)
        weights[seen[i].key] = (entry){seen[i].weight, off * seen[i].weight, odd, 0};
    if (n == 0) *lse = (entry){sink, 0, odd, 0};
    else *lse = (entry){broken ? max : ref + logl(sum), 0, odd, 0};
    if (n && !broken) lse->off = off + 4 * eps * fmaxl(1, fabsl(lse->value));
    for (ptrdiff_t d = 0; d < t->v_depth; d++) {
        long double mean = 0, size = 0;
        int odd_value = 0;
        for (ptrdiff_t i = 0; i < n; i++) {
            const double v = seen[i].v[d * v_step];
            mean += seen[i].weight * v;
            size += seen[i].weight * fabs(v);
            odd_value |= v - v != 0;
        }
        out[d] = (entry){mean, off * size, odd || odd_value, size};
    }
    free(seen);
}

/* Why a result is wrong, or NULL. */
static const char *fault(const test *t, int o, const entry *want, const char *bytes,
                         const fsm_isa *isa) {
    const fsm_dtype type = type_of(t, o);
    const double got = decode(type, bytes);
    char nan[8];
    encode(type, NAN, nan);
    if (got != got && memcmp(nan, bytes, (size_t)sizes[type])) return "another NaN";
    if (want->value - want->value != 0) {
        if (want->value == -INFINITY && o == FSM_ATTN_LSE)
            return got == -INFINITY ? NULL : "not -inf";
        if (got - got == 0) return "finite";
        return want->value != want->value && got == got && o != FSM_ATTN_LSE ? "inf" : NULL;
    }
    if (got - got != 0) return "not finite";
    if (want->off == 0 && want->value == 0 && (got != 0 || signbit(got))) return "not 0";
    const long double slack = has_long_double() ? 1 : 3; /* else the reference is no better */
    const long double rounding =
        0.501L * floats[type].ulp * fabsl(want->value) + floats[type].least;
    const long double least = compute_of(t) == FSM_F64 ? 0x1p-1070L : 0x1p-140L;
    /* Weights have 16 bits there. */
    const long double off = want->off + (in_tiles(t, isa) ? 0x1p-17L * want->size : 0);
    return fabsl(got - want->value) <= slack * off + rounding + least ? NULL : "far off";
}

/* Every result against the evaluation, and, but for odd ones, bit for bit against that of the heads
 * alone. */
static void compare(const test *t, const world *w, const results *got, const results *alone) {
    const ptrdiff_t extent[] = {t->lead[0], t->lead[1], t->kv_heads * t->share, t->queries, 1};
    ptrdiff_t row[DIMS] = {0};
    entry *e = allocate((t->v_depth + 1 + t->keys) * (ptrdiff_t)sizeof *e), *lse = e + t->v_depth;
    if (!is_empty(extent)) do {
            evaluate(t, w, row, e, lse, t->has[FSM_ATTN_WEIGHTS] ? lse + 1 : NULL);
            for (int o = FSM_ATTN_OUT; o < OPERANDS; o++) {
                const int r = o - FSM_ATTN_OUT, size = sizes[type_of(t, o)];
                const entry *want = r == 0 ? e : r == 1 ? lse : lse + 1;
                const ptrdiff_t n = r == 0 ? t->v_depth : r == 1 ? 1 : t->keys;
                const ptrdiff_t first = place_of(got->stride[r], row) * size;
                for (int k = 0; k < isa_count && t->has[o]; k++) {
                    const char *a = got[k].at[r] + first, *b = alone[k].at[r] + first;
                    const char *why = NULL;
                    char what[160];
                    ptrdiff_t i = 0;
                    for (; i < n && !why; i++, a += size, b += size) {
                        why = fault(t, o, &want[i], a, isas[k]);
                        if (!why && !want[i].odd && memcmp(a, b, (size_t)size)) why = "other bits";
                    }
                    if (why)
                        snprintf(what, sizeof what,
                                 "%s of (%td %td %td %td %td) is %.9g (%.9g alone), not %.12Lg: %s",
                                 names[o], row[B], row[C], row[H], row[R], i - 1,
                                 decode(type_of(t, o), a - size), decode(type_of(t, o), b - size),
                                 want[i - 1].value, why);
                    expect(!why, t, isas[k], why ? what : "");
                }
            }
        } while (next(row, extent));
    free(e);
}

static void check(test t) {
    if (t.seed % ONE_IN) return;
    const ptrdiff_t origin[DIMS] = {0};
    results got[COUNT(isas)], alone[COUNT(isas)];
    world w = new_world(&t);
    for (int k = 0; k < isa_count; k++) {
        alone[k] = new_results(&t);
        run_alone(&t, isas[k], &w, &alone[k]);
    }
    if (t.poison && !t.still[FSM_ATTN_K] && !t.still[FSM_ATTN_V] && !t.still[FSM_ATTN_Q]) {
        poison_unseen(&t, &w);
        if (t.poison == 2) poison_some(&t, &w);
    }
    for (int k = 0; k < isa_count; k++) {
        got[k] = new_results(&t);
        run(&t, isas[k], &w, origin, t.share, &got[k]);
    }
    compare(&t, &w, got, alone);
    for (int k = 0; k < isa_count; k++) {
        free_results(&got[k]);
        free_results(&alone[k]);
    }
    free_world(&w);
}

/* ---- making tests ---- */

static uint64_t tests_made;

static test make(int type, ptrdiff_t kv_heads, ptrdiff_t share, ptrdiff_t queries, ptrdiff_t keys,
                 ptrdiff_t depth, ptrdiff_t v_depth) {
    test t = {.type = type % 4,
              .bias_type = type % 4,
              .lead = {1, 1},
              .kv_heads = kv_heads,
              .share = share,
              .queries = queries,
              .keys = keys,
              .depth = depth,
              .v_depth = v_depth,
              .left = -1,
              .right = -1,
              .threads = 1,
              .seed = tests_made++};
    t.scale = 1 / sqrt((double)depth);
    for (int o = 0; o < OPERANDS; o++) t.has[o] = o <= FSM_ATTN_V || o >= FSM_ATTN_OUT;
    return t;
}

/* 0 <= chance(&h, n) < n */
static int chance(uint64_t *h, int n) { return (int)((*h = mix(*h + 1)) % (uint64_t)n); }

static test laid_out(test t) {
    uint64_t h = t.seed;
    for (int o = 0; o < OPERANDS; o++) t.layout[o] = chance(&h, COUNT(layouts));
    t.threads = 1 + chance(&h, 3);
    t.upward = chance(&h, 2);
    return t;
}

/* Who sees whom. */
static test hidden(test t) {
    const double offsets[] = {0, (double)(t.keys - t.queries), -3, 5, 0x1p61, -0x1p61};
    static const ptrdiff_t sides[] = {-1, -1, 0, 3, 70, PTRDIFF_MAX};
    static const int still[] = {0,      0, 0, 1 << B | 1 << C, 1 << H, 1 << R, 1 << H | 1 << R,
                                1 << I, 31};
    uint64_t h = mix(t.seed + 1000);
    const int has = chance(&h, 16), offset = chance(&h, 2 * COUNT(offsets));
    t.has[FSM_ATTN_MASK] = has & 1;
    t.has[FSM_ATTN_BIAS] = (has & 6) == 2;
    t.has[FSM_ATTN_LENGTHS] = (has & 12) == 12;
    t.has[FSM_ATTN_OFFSET] = offset < COUNT(offsets);
    if (t.has[FSM_ATTN_OFFSET]) t.offset = offsets[offset];
    t.still[FSM_ATTN_MASK] = still[chance(&h, COUNT(still))];
    t.still[FSM_ATTN_BIAS] = still[chance(&h, COUNT(still))];
    t.bias_type = chance(&h, 4);
    t.causal = chance(&h, 3) == 0;
    t.left = sides[chance(&h, COUNT(sides))];
    t.right = sides[chance(&h, COUNT(sides))];
    t.poison = chance(&h, 3);
    return t;
}

/* What becomes of the dot products, and which results are asked for. */
static test scored(test t) {
    uint64_t h = mix(t.seed + 2000);
    const double scales[] = {t.scale, t.scale, 3, -0.7, 0};
    t.scale = scales[chance(&h, COUNT(scales))];
    t.softcap = chance(&h, 3) ? 0 : 1.5;
    t.has[FSM_ATTN_SINKS] = chance(&h, 3) == 0;
    t.has[FSM_ATTN_SLOPES] = chance(&h, 3) == 0 && fabs(t.offset) < 1e6; /* else all is far off */
    t.has[FSM_ATTN_LSE] = chance(&h, 4) > 0;
    t.has[FSM_ATTN_WEIGHTS] = chance(&h, 4) > 0;
    return t;
}

/* Strides of 0 in q, k and v. */
static test stilled(test t) {
    uint64_t h = mix(t.seed + 3000);
    for (int o = 0; o <= FSM_ATTN_V; o++) t.still[o] = chance(&h, 3) ? 0 : chance(&h, 32);
    return t;
}

static test dressed(test t) {
    t.lead[0] = 1 + t.seed % 2;
    t.lead[1] = 1 + t.seed % 3;
    return laid_out(scored(hidden(t)));
}

/* ---- the tests ---- */

/* On either side of vectors, tiles, groups, blocks and parts. */
static void depths(void) {
    for (int d = 1; d <= 35; d++)
        for (int k = 0; k < 4; k++) {
            const int other = (d * 7 + k * 5) % 35 + 1;
            check(make(k + d, 1, 1, 3 + d % 2, 9, k < 2 ? d : other, k < 2 ? other : d));
            check(laid_out(make(k, 1, 1 + d % 5, 1, 9, k < 2 ? d : other, k < 2 ? other : d)));
        }
    static const int more[] = {63, 64, 65, 127, 128, 129, 130, 257};
    for (int k = 0; k < COUNT(more) * 4; k++) {
        check(laid_out(make(k, 1, 1, 1 + k % 3, 21, more[k / 4], more[(k / 4 * 3 + k) % 8])));
        check(make(k, 1, 1 + k % 5, 1, 21, more[(k / 4 * 5 + k) % 8], more[k / 4]));
    }
}

static void queries(void) {
    for (int n = 1; n <= 100; n++) check(make(n, 1 + n % 2, 1, n, 7 + n % 2, 3, 5));
    static const int edges[] = {2, 3, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 97, 191, 192, 193};
    static const int shares[] = {1, 2, 3, 4, 5, 17};
    for (int k = 0; k < COUNT(edges) * COUNT(shares); k++) {
        const int n = edges[k / COUNT(shares)], share = shares[k % COUNT(shares)];
        if (n * share < 1000) check(dressed(make(k + k / 4, 1, share, n, 10, 3, 2)));
    }
}

static void keys(void) {
    for (int n = 1; n <= 135; n++) {
        check(make(n, 1, 1, 2 + n % 3, n, 2, 3));
        check(make(n + n / 4, 1, 1 + n % 6, 1, n, 4, 3));
    }
    static const int edges[] = {63,  64,  65,  127, 128, 129,  191,  192,  193,  255,  257,
                                511, 512, 513, 639, 641, 1023, 1025, 8191, 8192, 8193, 10241};
    static const int shares[] = {1, 2, 3, 4, 5, 6, 7, 16, 17, 33};
    for (int k = 0; k < COUNT(edges); k++)
        for (int u = 0; u < (edges[k] < 2000 ? 6 : 2); u++) {
            const int share = shares[(k + u) % COUNT(shares)];
            check(dressed(make(k + u, 1, edges[k] < 2000 ? share : 2, 1, edges[k], 2, 3)));
            if (u % 4 == 0) check(dressed(make(k + u, 1, 1, 2 + u, edges[k], 2, 1)));
        }
}

static void visibility(void) {
    for (int k = 0; k < 450; k++) {
        uint64_t h = (uint64_t)k;
        const int n = k % 3 ? 2 + chance(&h, 60) : 1, share = 1 + chance(&h, n > 1 ? 2 : 6);
        test t = hidden(make(k, 1 + k % 2, share, n, 1 + chance(&h, k % 5 ? 150 : 300), 2, 3));
        t.lead[1] = 1 + k / 2 % 2;
        check(k % 2 ? t : laid_out(t));
    }
}

static void everything(void) {
    for (int k = 0; k < 500; k++) {
        uint64_t h = mix((uint64_t)k);
        const int n = k % 3 ? 2 + chance(&h, 30) : 1, share = 1 + chance(&h, 4);
        const int keys = chance(&h, k % 7 ? 90 : 200);
        const test t =
            make(k / 3, 1 + chance(&h, 3), share, n, keys, 1 + chance(&h, 20), chance(&h, 20));
        check(k % 4 ? dressed(t) : stilled(dressed(t)));
    }
}

/* Enough work that it is dealt to threads, and rows for units of several groups. */
static void threads(void) {
    for (int k = 0; k < 6; k++) {
        test t = make(k, 1 + k % 3, 4, k % 2 ? 205 : 50, 67, 5, 4);
        t.lead[0] = 3;
        t = dressed(t);
        t.threads = 2 + k % 3;
        check(t);
        t = make(k, 1 + k % 3, 3 + k, 1, 1100, 16, 15);
        t.lead[0] = 3;
        t = dressed(t);
        t.threads = 2 + k % 3;
        check(t);
    }
}

/* Work for many slices, by its size: few of the keys are seen. */
static void slices(void) {
    for (int k = 0; k < 4; k++) {
        test t = make(k, 2, 2, k % 2 ? 1 : 50, 1 << 24, 9, 9);
        t.still[FSM_ATTN_K] = t.still[FSM_ATTN_V] = 1 << R;
        t.has[FSM_ATTN_WEIGHTS] = 0;
        t.has[FSM_ATTN_OFFSET] = t.causal = 1;
        t.threads = 1 + k / 2;
        check(t);
    }
}

static void nothing(void) {
    for (int k = 0; k < 4 * 7; k++) {
        test t = make(k, 2, 2, k % 2 ? 1 : 5, 6, 3, 4);
        switch (k / 4) {
        case 0: t.keys = 0; break;
        case 1: t.v_depth = 0; break;
        case 2: t.queries = 0; break;
        case 3: t.lead[1] = 0; break;
        case 4: t.keys = t.v_depth = 0; break;
        case 5: t.kv_heads = 0; break;
        default: t.share = 0;
        }
        t.has[FSM_ATTN_SINKS] = k % 3 == 0;
        check(t);
    }
    const float ones[4] = {1, 1, 1, 1}; /* two keys; no ISA: the best one */
    float out[2] = {0, 0};
    const fsm_status status = fsm_attention_heads(NULL, FSM_F32, ones, ones, ones, out, NULL, 1, 1,
                                                  1, 2, 2, 2, 1, 0, 0, 1);
    if (tell(status == FSM_DONE && out[0] == 1 && out[1] == 1)) puts("FAILED: not the best ISA");
}

/* ---- merge_attention: a test's results with others, `queries` and so on being its rows ---- */

static int merge_shape(int o) { /* as which operand of attention it is shaped */
    return o == FSM_MERGE_LSE_A || o == FSM_MERGE_LSE_B || o == FSM_MERGE_LSE ? FSM_ATTN_LSE
                                                                              : FSM_ATTN_OUT;
}

/* A half that saw nothing holds anything. */
static double draw_merge(const test *t, int o, const ptrdiff_t at[DIMS]) {
    uint64_t h = t->seed;
    for (int d = 0; d < I; d++) h = hash(h, (uint64_t)d, (uint64_t)at[d]);
    const uint64_t kind = (o < FSM_MERGE_OUT_B ? h : h >> 8) % 16;
    if (merge_shape(o) == FSM_ATTN_LSE) {
        const double lse = 8 * fraction(hash(h, (uint64_t)o, 1)) - 4;
        return kind < 3 ? -INFINITY : kind == 3 ? NAN : kind == 4 ? 80 + lse : kind == 5 ? 1 : lse;
    }
    return kind == 0 ? NAN : 4 * fraction(hash(h, (uint64_t)o, (uint64_t)at[I])) - 2;
}

static void run_merge(const test *t, const fsm_isa *isa, results *into) {
    fsm_merge m = {.compute = compute_of(t),
                   .ndim = 4,
                   .threads = t->threads,
                   .isa = isa,
                   .columns = t->v_depth};
    array a[FSM_MERGE_COUNT];
    ptrdiff_t extent[DIMS];
    extents(t, FSM_ATTN_OUT, extent);
    memcpy(m.shape, extent, 4 * sizeof *extent);
    for (int o = 0; o < FSM_MERGE_COUNT; o++) {
        const fsm_dtype type = type_of(t, merge_shape(o));
        ptrdiff_t at[DIMS] = {0};
        extents(t, merge_shape(o), extent);
        a[o] = new_blank(&layouts[t->layout[o]], dims, extent, sizes[type]);
        if (o < FSM_MERGE_OUT && !is_empty(extent)) do
                encode(type, draw_merge(t, o, at), element(&a[o], at));
            while (next(at, extent));
        guard(&a[o], o < FSM_MERGE_OUT);
        m.operand[o] = (fsm_array){a[o].first, type, {0}};
        memcpy(m.operand[o].strides, a[o].stride, sizeof a[o].stride);
    }
    const int mode = t->upward ? FE_UPWARD : FE_TONEAREST;
    fesetround(mode);
    raise_one_flag();
    for (ptrdiff_t row = 0; row >= 0;) row = fsm_merge_attention(&m, row);
    const int kept = fegetround() == mode && only_that_flag();
    fesetround(FE_TONEAREST);
    expect(kept, t, isa, "merge changed the floating-point mode or flags");
    for (int o = 0; o < FSM_MERGE_COUNT; o++) {
        const int k = merge_shape(o) - FSM_ATTN_OUT, size = sizes[type_of(t, merge_shape(o))];
        ptrdiff_t at[DIMS] = {0};
        extents(t, merge_shape(o), extent);
        if (o >= FSM_MERGE_OUT && !is_empty(extent)) do
                take(element(&a[o], at), into->at[k] + place_of(into->stride[k], at) * size, size);
            while (next(at, extent));
        if (o < FSM_MERGE_OUT) expect(is_untouched(&a[o]), t, isa, "merge wrote to an input");
        else expect(is_blank(&a[o]), t, isa, "merge wrote beside a result");
        free_array(&a[o]);
    }
}

static entry merged(const test *t, const ptrdiff_t row[DIMS], int o) {
    const fsm_dtype lse_type = type_of(t, FSM_ATTN_LSE);
    const long double eps = compute_of(t) == FSM_F64 ? 0x1p-53L : 0x1p-24L;
    const long double la = rounded_to(lse_type, draw_merge(t, FSM_MERGE_LSE_A, row));
    const long double lb = rounded_to(lse_type, draw_merge(t, FSM_MERGE_LSE_B, row));
    const long double top = la > lb ? la : lb, ref = top - top == 0 ? top : 0;
    const long double wa = expl(la - ref), wb = expl(lb - ref), lse = ref + logl(wa + wb);
    if (o == FSM_ATTN_LSE)
        return (entry){lse, top == -INFINITY ? 0 : eps * (8 + 4 * fmaxl(1, fabsl(lse))), 0, 0};
    if (la != la || lb != lb) return (entry){NAN, 0, 0, 0};
    const long double a = wa > 0 ? rounded_to(t->type, draw_merge(t, FSM_MERGE_OUT_A, row)) : 0;
    const long double b = wb > 0 ? rounded_to(t->type, draw_merge(t, FSM_MERGE_OUT_B, row)) : 0;
    if (wa + wb == 0) return (entry){0, 0, 0, 0};
    const long double size = (fabsl(a) * wa + fabsl(b) * wb) / (wa + wb);
    const long double apart = wa > 0 && wb > 0 ? fabsl(la - lb) : 0;
    return (entry){(a * wa + b * wb) / (wa + wb), eps * (16 + 2 * apart) * size, 0, 0};
}

static void check_merge(const test *t) {
    test plain = *t;
    if (t->seed % ONE_IN) return;
    memset(plain.layout, CONTIGUOUS, sizeof plain.layout);
    plain.threads = 1;
    plain.upward = 0;
    for (int k = 0; k < isa_count; k++) {
        results want = new_results(t), got = new_results(t);
        run_merge(&plain, isas[k], &want);
        run_merge(t, isas[k], &got);
        for (int o = FSM_ATTN_OUT; o <= FSM_ATTN_LSE; o++) {
            const int r = o - FSM_ATTN_OUT, size = sizes[type_of(t, o)];
            const char *why = NULL, *at = got.at[r];
            expect(!memcmp(at, want.at[r], (size_t)want.bytes[r]), t, isas[k], "merge: other bits");
            ptrdiff_t extent[DIMS], row[DIMS] = {0};
            extents(t, o, extent);
            if (is_empty(extent)) continue;
            do {
                const entry e = merged(t, row, o);
                why = fault(t, o, &e, at, isas[k]);
                at += size;
            } while (!why && next(row, extent));
            expect(!why, t, isas[k], why ? why : "");
        }
        free_results(&want);
        free_results(&got);
    }
}

static void merges(void) {
    for (int k = 0; k < 4 * 40; k++) {
        test t = make(k, 1 + k % 3, 1 + k % 2, k % 7, 1, 1, k / 4 % 5 ? k / 4 : 260);
        t.has[FSM_ATTN_WEIGHTS] = 0;
        t.lead[0] = 1 + k / 4 % 5;
        check_merge(&t);
        t = laid_out(t);
        if (k % 5 == 0) t.queries = 4000 / (t.v_depth + 1);
        check_merge(&t);
    }
}

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {
#define GROUP(f) {#f, f}
    GROUP(depths),  GROUP(queries), GROUP(keys),    GROUP(visibility), GROUP(everything),
    GROUP(threads), GROUP(slices),  GROUP(nothing), GROUP(merges)};

int main(int argc, char **argv) {
    choose_isas(argc, argv, "");
    for (int g = 0; g < COUNT(groups); g++) {
        const long good = passed, bad = failed;
        const time_t start = time(NULL);
        groups[g].run();
        report(groups[g].name, good, bad, start);
    }
    return total();
}
