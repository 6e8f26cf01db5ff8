/* As driver.c, for the backward pass of attention and for cross entropy.
 *
 *     gradient_driver [ISA...]        by default every ISA that this CPU can run
 *
 * Each test runs on every ISA, its arrays in some layout and on some threads, and is held against
 *
 *     the same ISA     contiguous, on one thread: bit for bit
 *     long double      a plain evaluation, loosely: accuracy is tested from Python
 *     guards           around the arrays and in their gaps nothing may be written, nor read
 */
#include "harness.h"

/* ---- what a test is ---- */

/* Of the dimensions b (leading), h (head), r (row) and i (column). */
enum { B, H, R, I, DIMS };
static const char dims[] = "bhri";
static const layout layouts[] = {
    {"contiguous", "bhri", 1, 0, 0, 0},    {"heads inside", "brhi", 1, 0, 0, 0},
    {"transposed", "bhir", 1, 0, 0, 0},    {"unaligned", "bhri", 1, 0, 0, 1},
    {"every third", "bhri", 3, 5, 0, 0},   {"inside out", "irhb", 1, 0, 0, 0},
    {"rows reversed", "bhri", 1, 0, 4, 0}, {"all reversed", "brhi", 2, 1, 15, 1},
};
enum { CONTIGUOUS };

typedef struct {
    fsm_dtype type;
    ptrdiff_t lead, kv_heads, share, queries, keys, depth, v_depth;
    int causal, biased, capped, layout, threads;
    uint64_t seed;
    int meet; /* bit d: the bias is broadcast along dimension d, and its gradient summed */
} test;

static fsm_dtype compute_of(const test *t) { return t->type == FSM_F64 ? FSM_F64 : FSM_F32; }

static void expect(int ok, const test *t, const fsm_isa *isa, const char *what) {
    if (!tell(ok)) return;
    printf("FAILED on %s: %s\n    %s, %td x (%td x %td) heads, %td queries, %td keys, depths %td "
           "and %td, causal %d, bias %d, meet %d, softcap %d, %s, %d threads\n",
           fsm_isa_name(isa), what, type_names[t->type], t->lead, t->kv_heads, t->share, t->queries,
           t->keys, t->depth, t->v_depth, t->causal, t->biased, t->meet, t->capped,
           layouts[t->layout].name, t->threads);
}

/* A number of operand o, in [-1, 1]. */
static double draw(const test *t, int o, const ptrdiff_t at[DIMS]) {
    uint64_t h = t->seed * 64 + (uint64_t)o;
    for (int d = 0; d < DIMS; d++) h = mix(h * 4096 + (uint64_t)at[d]);
    return (double)(h >> 11) * 0x1p-52 - 1;
}

static int next(ptrdiff_t at[DIMS], const ptrdiff_t extent[DIMS]) {
    for (int d = DIMS - 1; d >= 0; at[d--] = 0)
        if (++at[d] < extent[d]) return 1;
    return 0;
}

static char *element(const array *a, const ptrdiff_t at[DIMS]) {
    char *p = a->first;
    for (int d = 0; d < DIMS; d++) p += at[d] * a->stride[d];
    return p;
}

/* ---- attention ---- */

static int meets(const test *t, int o, int d) {
    return (o == FSM_ATTN_BIAS || o == FSM_ATTN_DBIAS) && t->meet >> d & 1;
}

static void extents(const test *t, int o, ptrdiff_t extent[DIMS]) {
    const int of_keys = o == FSM_ATTN_K || o == FSM_ATTN_V || o == FSM_ATTN_DK || o == FSM_ATTN_DV;
    const int narrow = o == FSM_ATTN_Q || o == FSM_ATTN_K || o == FSM_ATTN_DQ || o == FSM_ATTN_DK;
    extent[B] = t->lead;
    extent[H] = of_keys ? t->kv_heads : t->kv_heads * t->share;
    extent[R] = of_keys ? t->keys : t->queries;
    extent[I] = o == FSM_ATTN_LSE                           ? 1
                : o == FSM_ATTN_BIAS || o == FSM_ATTN_DBIAS ? t->keys
                : narrow                                    ? t->depth
                                                            : t->v_depth;
    for (int d = 0; d < DIMS; d++)
        if (meets(t, o, d)) extent[d] = 1;
}

static int has(const test *t, int o) {
    switch (o) {
    case FSM_ATTN_BIAS:
    case FSM_ATTN_DBIAS: return t->biased;
    case FSM_ATTN_Q:
    case FSM_ATTN_K:
    case FSM_ATTN_V:
    case FSM_ATTN_OUT:
    case FSM_ATTN_LSE: return 1;
    default: return o >= FSM_ATTN_GRAD_OUT && o <= FSM_ATTN_DV;
    }
}

static fsm_dtype type_of(const test *t, int o) {
    if (o == FSM_ATTN_DBIAS) return FSM_F64;
    if (o == FSM_ATTN_LSE || (o >= FSM_ATTN_DQ && o <= FSM_ATTN_DV)) return compute_of(t);
    return t->type;
}

static double operand(const test *t, int o, const ptrdiff_t at[DIMS]) {
    ptrdiff_t e[DIMS];
    extents(t, o, e);
    for (int d = 0; d < DIMS; d++) e[d] = at[d] % e[d];
    return rounded_to(type_of(t, o), draw(t, o, e));
}

/* Gradients of one query, added up: all but dk and dv go where they belong, too. */
typedef struct {
    long double *sum[FSM_ATTN_COUNT], *size[FSM_ATTN_COUNT]; /* and of absolute values */
    double *out, *lse;                                       /* what the forward pass left */
} truth;

static ptrdiff_t place(const test *t, int o, ptrdiff_t b, ptrdiff_t h, ptrdiff_t r, ptrdiff_t i) {
    ptrdiff_t e[DIMS];
    extents(t, o, e);
    return ((b % e[B] * e[H] + h % e[H]) * e[R] + r % e[R]) * e[I] + i % e[I];
}

static void add(const test *t, truth *w, int o, ptrdiff_t place, long double x) {
    if (!has(t, o)) return;
    w->sum[o][place] += x;
    w->size[o][place] += fabsl(x);
}

static void evaluate(const test *t, truth *w) {
    const long double scale = 0.5L, cap = 1.5L;
    long double *z = allocate(t->keys * 4 * (ptrdiff_t)sizeof *z), *f = z + t->keys,
                *p = f + t->keys, *dp = p + t->keys;
    ptrdiff_t at[DIMS], heads[DIMS] = {t->lead, t->kv_heads * t->share, t->queries, 1},
                        q[DIMS] = {0};
    do {
        const ptrdiff_t kv = q[H] / t->share, n = t->causal && q[R] < t->keys ? q[R] + 1 : t->keys;
        long double top = -INFINITY, total = 0, delta = 0;
        for (ptrdiff_t j = 0; j < n; j++) {
            long double dot = 0;
            for (ptrdiff_t d = 0; d < t->depth; d++)
                dot += (long double)operand(t, FSM_ATTN_Q, (ptrdiff_t[]){q[B], q[H], q[R], d}) *
                       operand(t, FSM_ATTN_K, (ptrdiff_t[]){q[B], kv, j, d});
            const long double th = tanhl(scale * dot / cap);
            z[j] = t->capped ? cap * th : scale * dot;
            f[j] = t->capped ? 1 - th * th : 1;
            if (t->biased) z[j] += operand(t, FSM_ATTN_BIAS, (ptrdiff_t[]){q[B], q[H], q[R], j});
            if (z[j] > top) top = z[j];
        }
        for (ptrdiff_t j = 0; j < n; j++) total += expl(z[j] - top);
        const ptrdiff_t row = place(t, FSM_ATTN_LSE, q[B], q[H], q[R], 0);
        w->lse[row] = rounded_to(compute_of(t), (double)(top + logl(total)));
        memset(dp, 0, (size_t)n * sizeof *dp);
        for (ptrdiff_t j = 0; j < n; j++) p[j] = expl(z[j] - w->lse[row]);
        for (ptrdiff_t i = 0; i < t->v_depth; i++) {
            long double out = 0;
            const double g = operand(t, FSM_ATTN_GRAD_OUT, (ptrdiff_t[]){q[B], q[H], q[R], i});
            for (ptrdiff_t j = 0; j < n; j++) {
                const double v = operand(t, FSM_ATTN_V, (ptrdiff_t[]){q[B], kv, j, i});
                out += p[j] * v;
                dp[j] += (long double)g * v;
                add(t, w, FSM_ATTN_DV, place(t, FSM_ATTN_DV, q[B], kv, j, i), p[j] * g);
            }
            w->out[row * t->v_depth + i] = rounded_to(t->type, (double)out);
            delta += (long double)g * w->out[row * t->v_depth + i];
        }
        for (ptrdiff_t j = 0; j < n; j++) {
            const long double dz = p[j] * (dp[j] - delta), ds = dz * f[j] * scale;
            add(t, w, FSM_ATTN_DBIAS, place(t, FSM_ATTN_DBIAS, q[B], q[H], q[R], j), dz);
            for (ptrdiff_t d = 0; d < t->depth; d++) {
                memcpy(at, (ptrdiff_t[]){q[B], kv, j, d}, sizeof at);
                add(t, w, FSM_ATTN_DQ, place(t, FSM_ATTN_DQ, q[B], q[H], q[R], d),
                    ds * operand(t, FSM_ATTN_K, at));
                add(t, w, FSM_ATTN_DK, place(t, FSM_ATTN_DK, q[B], kv, j, d),
                    ds * operand(t, FSM_ATTN_Q, (ptrdiff_t[]){q[B], q[H], q[R], d}));
            }
        }
    } while (next(q, heads));
    free(z);
}

/* Results one after the other, in C order, in their types, at `into`. */
static void run(const test *t, const fsm_isa *isa, const truth *w, char *into) {
    fsm_attention p = {.compute = compute_of(t),
                       .ndim = 1,
                       .threads = t->threads,
                       .isa = isa,
                       .shape = {t->lead},
                       .heads = t->kv_heads * t->share,
                       .kv_heads = t->kv_heads,
                       .queries = t->queries,
                       .keys = t->keys,
                       .depth = t->depth,
                       .v_depth = t->v_depth,
                       .scale = 0.5,
                       .softcap = t->capped ? 1.5 : 0,
                       .causal = t->causal,
                       .left = -1,
                       .right = -1};
    array a[FSM_ATTN_COUNT] = {0};
    for (int o = 0; o < FSM_ATTN_COUNT; o++) {
        if (!has(t, o)) continue;
        const int result = o >= FSM_ATTN_DQ, size = sizes[type_of(t, o)];
        ptrdiff_t extent[DIMS], at[DIMS] = {0};
        extents(t, o, extent);
        a[o] = new_blank(&layouts[result ? CONTIGUOUS : t->layout], dims, extent, size);
        do {
            const ptrdiff_t row = place(t, FSM_ATTN_LSE, at[B], at[H], at[R], 0);
            const double x = result              ? 0
                             : o == FSM_ATTN_LSE ? w->lse[row]
                             : o == FSM_ATTN_OUT ? w->out[row * t->v_depth + at[I]]
                                                 : draw(t, o, at);
            encode(type_of(t, o), x, element(&a[o], at));
        } while (next(at, extent));
        guard(&a[o], !result);
        p.operand[o] = (fsm_array){a[o].first, type_of(t, o), {0}};
        for (int d = 0; d < DIMS; d++)
            p.operand[o].strides[d] = meets(t, o, d) ? 0 : a[o].stride[d];
    }
    fsm_attention_backward_plan *plan;
    fsm_status status = fsm_attention_backward_new(&plan, &p);
    raise_one_flag();
    while (status == FSM_AGAIN) status = fsm_attention_backward_run(plan);
    fsm_attention_backward_free(plan);
    expect(only_that_flag(), t, isa, "changed the floating-point flags");
    expect(status == FSM_DONE, t, isa, "did not end");
    for (int o = 0; o < FSM_ATTN_COUNT; o++) {
        if (!has(t, o)) continue;
        const int size = sizes[type_of(t, o)];
        ptrdiff_t extent[DIMS], at[DIMS] = {0};
        extents(t, o, extent);
        if (o < FSM_ATTN_DQ) expect(is_untouched(&a[o]), t, isa, "wrote to an input");
        else {
            do take(element(&a[o], at), into, size), into += size;
            while (next(at, extent));
            expect(is_blank(&a[o]), t, isa, "wrote beside a result");
        }
        free_array(&a[o]);
    }
}

static void check(test t) {
    if (t.seed % ONE_IN) return;
    truth w = {.out = allocate(t.lead * t.kv_heads * t.share * t.queries * t.v_depth * 8),
               .lse = allocate(t.lead * t.kv_heads * t.share * t.queries * 8)};
    ptrdiff_t bytes = 0, length[FSM_ATTN_COUNT] = {0};
    for (int o = FSM_ATTN_DQ; o < FSM_ATTN_COUNT; o++) {
        ptrdiff_t e[DIMS];
        if (!has(&t, o)) continue;
        extents(&t, o, e);
        length[o] = e[B] * e[H] * e[R] * e[I];
        bytes += length[o] * sizes[type_of(&t, o)];
        w.sum[o] = calloc((size_t)length[o], sizeof(long double));
        w.size[o] = calloc((size_t)length[o], sizeof(long double));
    }
    evaluate(&t, &w);
    const long double off = compute_of(&t) != FSM_F64 ? 0x1p-13L
                            : has_long_double()       ? 0x1p-40L
                                                      : 0x1p-36L;
    test plain = t;
    plain.layout = CONTIGUOUS;
    plain.threads = 1;
    char *want = allocate(bytes), *got = allocate(bytes);
    for (int k = 0; k < isa_count; k++) {
        run(&plain, isas[k], &w, want);
        run(&t, isas[k], &w, got);
        expect(!memcmp(got, want, (size_t)bytes), &t, isas[k], "other bits");
        const char *at = got;
        for (int o = FSM_ATTN_DQ; o < FSM_ATTN_COUNT; o++) {
            int right = 1;
            for (ptrdiff_t i = 0; i < length[o]; i++, at += sizes[type_of(&t, o)])
                right &=
                    fabsl(decode(type_of(&t, o), at) - w.sum[o][i]) <= off * (w.size[o][i] + 0.01L);
            expect(right, &t, isas[k], "a gradient is off");
        }
    }
    free(want);
    free(got);
    for (int o = 0; o < FSM_ATTN_COUNT; o++) free(w.sum[o]), free(w.size[o]);
    free(w.out);
    free(w.lse);
}

static void attention(void) {
    static const ptrdiff_t lengths[] = {1, 2, 3, 12, 23, 25, 48, 49, 63, 64, 65, 100, 130};
    static const ptrdiff_t depths[] = {1, 3, 4, 8, 9, 16, 17, 33};
    static const fsm_dtype types[] = {FSM_F16, FSM_BF16, FSM_F32, FSM_F64};
    for (uint64_t k = 0; k < 160; k++) {
        const uint64_t h = mix(k);
        check((test){.type = types[k % 4],
                     .lead = 1 + (ptrdiff_t)(h & 1),
                     .kv_heads = 1 + (ptrdiff_t)(h >> 1 & 1),
                     .share = 1 + (ptrdiff_t)(h >> 2 & 1),
                     .queries = lengths[h / 8 % COUNT(lengths)],
                     .keys = lengths[h / 128 % COUNT(lengths)],
                     .depth = depths[h / 4096 % COUNT(depths)],
                     .v_depth = depths[h / 65536 % COUNT(depths)],
                     .causal = (int)(h >> 20 & 1),
                     .biased = (int)(h >> 21 & 1),
                     .capped = (int)(h >> 22 & 1),
                     .layout = (int)(k / 4 % COUNT(layouts)),
                     .threads = 1 + (int)(k % 3),
                     .seed = k,
                     .meet = (int)(h >> 23 & 15)});
    }
    /* several parts */
    for (uint64_t k = 0; k < 4; k++) {
        static const int meet[] = {0, 1 << R | 1 << I};
        check((test){types[2 + k % 2], 1, 1, 2, 300, 530, 3, 4, (int)k / 2, (int)k / 2, 0, (int)k,
                     3, (1000 + k) * ONE_IN, meet[k % 2]});
    }
}

/* ---- cross entropy ---- */

/* Rows of `keys` classes, queries of them; every fifth is ignored. */
static void run_loss(const test *t, const fsm_isa *isa, fsm_op op, char *into) {
    fsm_problem p = {op, compute_of(t), DIMS, t->threads, isa, .reduced = {0, 0, 0, 1}};
    const int reduction = op == FSM_CROSS_ENTROPY, size = sizes[t->type];
    const ptrdiff_t all[DIMS] = {1, 1, t->queries, t->keys}, row[DIMS] = {1, 1, t->queries, STILL};
    const layout *l = &layouts[t->layout];
    memcpy(p.shape, all, sizeof all);
    array x = new_blank(l, dims, all, size), label = new_blank(&layouts[CONTIGUOUS], dims, row, 8),
          grad = new_blank(&layouts[CONTIGUOUS], dims, row, sizes[compute_of(t)]),
          out = new_blank(l, dims, reduction ? row : all, size);
    ptrdiff_t at[DIMS] = {0};
    do {
        encode(t->type, 8 * draw(t, FSM_X, at), element(&x, at));
        const ptrdiff_t of[DIMS] = {0, 0, at[R], 0};
        encode(compute_of(t), draw(t, FSM_GRAD, of), element(&grad, of));
        encode(FSM_I64, at[R] % 5 == 4 ? -1 : (double)(at[R] * 7 % t->keys), element(&label, of));
    } while (next(at, all));
    array *operands[] = {&x, &label, &grad, &out};
    static const fsm_operand which[] = {FSM_X, FSM_LABEL, FSM_GRAD, FSM_OUT};
    const fsm_dtype types[] = {t->type, FSM_I64, compute_of(t), t->type};
    for (int o = 0; o < COUNT(which); o++) {
        guard(operands[o], o < 3);
        if (which[o] == FSM_GRAD && reduction) continue;
        p.operand[which[o]] = (fsm_array){operands[o]->first, types[o], {0}};
        memcpy(p.operand[which[o]].strides, operands[o]->stride, sizeof x.stride);
    }
    fsm_plan *plan;
    fsm_status status = fsm_plan_new(&plan, &p);
    while (status == FSM_AGAIN) status = fsm_plan_run(plan);
    fsm_plan_free(plan);
    expect(status == FSM_DONE, t, isa, "did not end");
    const ptrdiff_t width[DIMS] = {1, 1, t->queries, reduction ? 1 : t->keys};
    memset(at, 0, sizeof at);
    do take(element(&out, at), into, size), into += size;
    while (next(at, width));
    for (int o = 0; o < 3; o++) expect(is_untouched(operands[o]), t, isa, "wrote to an input");
    expect(is_blank(&out), t, isa, "wrote beside the result");
    for (int o = 0; o < 4; o++) free_array(operands[o]);
}

static int loss_is_right(const test *t, const char *loss, const char *dx) {
    const int size = sizes[t->type];
    /* without long double (valgrind) the oracle of float64 has roundings of its own: those of a sum,
     * and that of a difference from 1, which counts 2^10 times beside the 2^-10 below */
    const ptrdiff_t own = t->type == FSM_F64 && !has_long_double() ? 4096 + t->keys : 0;
    const long double off = (4 + own) * floats[t->type].ulp;
    for (ptrdiff_t r = 0; r < t->queries; r++, loss += size) {
        long double sum = 0;
        for (ptrdiff_t i = 0; i < t->keys; i++)
            sum += expl(rounded_to(t->type, 8 * draw(t, FSM_X, (ptrdiff_t[]){0, 0, r, i})));
        const ptrdiff_t label = r % 5 == 4 ? -1 : r * 7 % t->keys;
        const long double g =
            rounded_to(compute_of(t), draw(t, FSM_GRAD, (ptrdiff_t[]){0, 0, r, 0}));
        for (ptrdiff_t i = 0; i < t->keys; i++, dx += size) {
            const long double x =
                rounded_to(t->type, 8 * draw(t, FSM_X, (ptrdiff_t[]){0, 0, r, i}));
            const long double d = label < 0 ? 0 : g * (expl(x) / sum - (i == label));
            if (!(fabsl(decode(t->type, dx) - d) <= off * (fabsl(d) + 0x1p-10L))) return 0;
            if (i != label) continue;
            if (!(fabsl(decode(t->type, loss) - (logl(sum) - x)) <= off * (1 + logl(sum) - x)))
                return 0;
        }
        if (label < 0 && decode(t->type, loss) != 0) return 0;
    }
    return 1;
}

static void cross_entropy(void) {
    static const ptrdiff_t lengths[] = {1, 2, 9, 31, 32, 33, 65, 257, 1030, 5000};
    static const fsm_dtype types[] = {FSM_F16, FSM_BF16, FSM_F32, FSM_F64};
    for (uint64_t k = 0; k < 4 * COUNT(lengths) * COUNT(layouts); k += 1 + ONE_IN / 2) {
        const ptrdiff_t n = lengths[k / 4 % COUNT(lengths)];
        test t = {.type = types[k % 4],
                  .queries = 1 + (ptrdiff_t)(k * 5 % 140), /* 128: 64 lanes */
                  .keys = n,
                  .seed = k,
                  .layout = (int)(k / 4 / COUNT(lengths)),
                  .threads = 1 + (int)(k % 3)};
        test plain = t;
        plain.layout = CONTIGUOUS;
        plain.threads = 1;
        const ptrdiff_t bytes = t.queries * (n + 1) * sizes[t.type];
        char *want = allocate(bytes), *got = allocate(bytes), *dx = got + t.queries * sizes[t.type];
        run_loss(&plain, scalar, FSM_CROSS_ENTROPY, want);
        run_loss(&plain, scalar, FSM_CROSS_ENTROPY_BACKWARD, want + (dx - got));
        expect(loss_is_right(&t, want, want + (dx - got)), &t, scalar, "cross entropy is off");
        for (int i = 0; i < isa_count; i++) {
            run_loss(&t, isas[i], FSM_CROSS_ENTROPY, got);
            run_loss(&t, isas[i], FSM_CROSS_ENTROPY_BACKWARD, dx);
            expect(!memcmp(got, want, (size_t)bytes), &t, isas[i], "cross entropy: other bits");
        }
        free(want);
        free(got);
    }
}

int main(int argc, char **argv) {
    static void (*const groups[])(void) = {attention, cross_entropy};
    static const char *const names[] = {"attention", "cross_entropy"};
    choose_isas(argc, argv, "amx");
    for (int g = 0; g < COUNT(groups); g++) {
        const long good = passed, bad = failed;
        const time_t start = time(NULL);
        groups[g]();
        report(names[g], good, bad, start);
    }
    return total();
}
