/* The C API without Python, for sanitizers, valgrind and emulators: does every way through the
 * kernels stay inside its arrays, and does every way give the same bits?
 *
 *     driver [ISA...]        by default every ISA that this CPU can run
 *
 * Cross entropy is in gradient_driver.c. A `test` is an operation on rows of numbers, which value()
 * makes up, and says how they lie in memory. check() runs it on every ISA and holds the results
 * against
 *
 *     the scalar kernels   given each row alone, contiguous, on one thread: bit for bit
 *     long double          a plain evaluation, loosely: accuracy is tested from Python
 *     guards               around the arrays and in their gaps nothing may be written, nor read
 *
 * The last line is a fingerprint of the scalar results: the same on every platform, if nothing is
 * left out or one test in the same number is run (ONE_IN).
 */
#include "harness.h"
#include "kernels.h"
#include "parallel.h"

/* ---- what a test is ---- */

/* Of the dimensions r, s (rows) and a, b (axis). */
static const layout layouts[] = {
    {"contiguous", "rsab", 1, 0, 0, 0},    {"columns", "abrs", 1, 0, 0, 0},
    {"unaligned", "rsab", 1, 0, 0, 1},     {"padded", "rsab", 1, 5, 0, 0},
    {"every third", "rsab", 3, 0, 0, 0},   {"unaligned columns", "abrs", 1, 3, 0, 1},
    {"middle axis", "rabs", 1, 0, 0, 0},   {"axis split", "arbs", 1, 0, 0, 0},
    {"rows split", "rasb", 1, 0, 0, 0},    {"axis transposed", "rsba", 1, 0, 0, 0},
    {"rows reversed", "rsab", 1, 0, 3, 0}, {"axis reversed", "rsab", 1, 0, 12, 1},
    {"all reversed", "abrs", 2, 1, 15, 0},
};
enum { CONTIGUOUS, COLUMNS, UNALIGNED, PADDED, EVERY_THIRD, UNALIGNED_COLUMNS, MIDDLE_AXIS };

typedef struct {
    fsm_op op;
    fsm_dtype compute, type[FSM_OPERAND_COUNT];
    int has[FSM_OPERAND_COUNT], layout[FSM_OPERAND_COUNT];
    int still[FSM_OPERAND_COUNT]; /* 1: the same in all rows, 2: along the axis; a stride of 0 */
    int spread;                   /* but written out all the same */
    ptrdiff_t shape[4], first;    /* of r, s, a, b; the number of the first row */
    fsm_operand out_at;           /* FSM_X, FSM_Y: in place */
    int threads, upward;          /* upward: the caller rounds so, which must change nothing */
    int special;                  /* rows with NaN, inf and so on */
    int small, one_call;          /* by fsm_softmax_small, by fsm_softmax_rows */
    int parts;                    /* in so many, by fsm_parts_sum and fsm_parts_map */
} test;

static int is_reduction(fsm_op op) { return op == FSM_LOGSUMEXP || op == FSM_LOGSUMEXP_WEIGHTED; }
static int is_backward(fsm_op op) { return op >= FSM_SOFTMAX_BACKWARD; }
static ptrdiff_t rows_of(const test *t) { return t->shape[0] * t->shape[1]; }
static ptrdiff_t length_of(const test *t) { return t->shape[2] * t->shape[3]; }
static ptrdiff_t width_of(const test *t) { return is_reduction(t->op) ? 1 : length_of(t); }
static ptrdiff_t bytes_of(const test *t) {
    return rows_of(t) * width_of(t) * sizes[t->type[FSM_OUT]];
}

static void expect(int ok, const test *t, const fsm_isa *isa, const char *what, ptrdiff_t at) {
    static const char *const ops[] = {"softmax",  "log_softmax",      "logsumexp",
                                      "weighted", "softmax_backward", "log_softmax_backward"};
    static const char *const names[] = {"x", "y", "bias", "where", "scale", "out", "sign"};
    static const char *const still[] = {"", " still in all rows", " still along axis", " still"};
    if (!tell(ok)) return;
    printf("FAILED on %s: %s, result %td\n    %s in %s, shape (%td %td, %td %td), %d threads",
           fsm_isa_name(isa), what, at, ops[t->op], type_names[t->compute], t->shape[0],
           t->shape[1], t->shape[2], t->shape[3], t->threads);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        if (t->has[o])
            printf(", %s: %s %s%s", names[o], type_names[t->type[o]], layouts[t->layout[o]].name,
                   still[t->still[o]]);
    printf("%s%s%s%s\n", t->out_at == FSM_OUT ? "" : ", in place", t->special ? ", special" : "",
           t->small      ? ", small"
           : t->one_call ? ", in one call"
           : t->parts    ? ", in parts"
                         : "",
           t->upward ? ", upward" : "");
}

/* ---- elements ---- */

static uint64_t hash(fsm_operand o, ptrdiff_t r, ptrdiff_t i) {
    return mix(((uint64_t)r * 8 + (uint64_t)o) * 0xd1b54a32d192ed03 + (uint64_t)i);
}

/* Element i of row r of an operand. Special rows come in turns. */
static double value(const test *t, fsm_operand o, ptrdiff_t r, ptrdiff_t i) {
    enum { PLAIN, A_NAN, AN_INF, SOME_LOW, ALL_LOW, NOTHING, HIDDEN, FAR_APART, ZEROS, KINDS };
    r = t->still[o] & 1 ? 0 : r;
    i = t->still[o] & 2 ? 0 : i;
    const uint64_t h = hash(o, r, i);
    const double u = (double)(h >> 11) * 0x1p-53;
    const int kind = t->special ? (int)(r % KINDS) : PLAIN;
    const int log_backward = t->op == FSM_LOG_SOFTMAX_BACKWARD;
    switch (o) {
    case FSM_WHERE: return kind != NOTHING && u > 0.2;
    case FSM_SCALE: return r % 3 == 2 ? -0.5 - u : 0.5 + u;
    case FSM_BIAS: return kind == NOTHING || u < 0.1 ? -INFINITY : 4 * u - 2;
    case FSM_Y:
        if (kind == NOTHING || h % 8 == 0) return log_backward ? -INFINITY : 0;
        if (log_backward) return -10 * u;
        return t->op == FSM_SOFTMAX_BACKWARD ? u * u : 2 * u - 0.6;
    default: break;
    }
    switch (t->type[FSM_X]) { /* unsigned: too large to be signed */
    case FSM_U8: return 255 - (int)(40 * u);
    case FSM_U16: return 65535 - (int)(40 * u);
    case FSM_U32: return 4294967295 - (int)(40 * u);
    case FSM_U64: return 0x1.8p63 + 2048 * (int)(2 * u);
    case FSM_I8:
    case FSM_I16:
    case FSM_I32:
    case FSM_I64: return (int)(80 * u) - 40;
    default: break;
    }
    if (kind == A_NAN || kind == AN_INF) /* at one place */
        if ((uint64_t)i == hash(o, r, -1) % (uint64_t)length_of(t))
            return kind == A_NAN ? NAN : INFINITY;
    if (kind == ALL_LOW || (kind == SOME_LOW && h % 4)) return -INFINITY;
    if (kind == HIDDEN && t->has[FSM_WHERE] && value(t, FSM_WHERE, r, i) == 0) return NAN;
    if (kind == HIDDEN && t->has[FSM_BIAS] && value(t, FSM_BIAS, r, i) < -2) return INFINITY;
    if (kind == HIDDEN && t->has[FSM_Y] && h % 2 && value(t, FSM_Y, r, i) == 0) return NAN;
    if (kind == FAR_APART) return 8000 * (u - 0.3);
    if (kind == ZEROS) return h % 2 ? 0.0 : -0.0;
    return (r % 4 == 3 ? 240 : 16) * (u - 0.5); /* 240: some results are subnormal, or 0 */
}

static double stored(const test *t, fsm_operand o, ptrdiff_t r, ptrdiff_t i) {
    return rounded_to(t->type[o], value(t, o, r, i));
}

/* ---- arrays ---- */

static char *element(const test *t, const array *a, ptrdiff_t r, ptrdiff_t i) {
    const ptrdiff_t s = t->shape[1], b = t->shape[3], *stride = a->stride;
    return a->first + r / s * stride[0] + r % s * stride[1] + i / b * stride[2] + i % b * stride[3];
}

static array new_array(const test *t, fsm_operand o) {
    const int reduced = o == FSM_SCALE || (is_reduction(t->op) && o >= FSM_OUT);
    ptrdiff_t extent[4];
    for (int d = 0; d < 4; d++) {
        const int kind = d < 2 ? 1 : 2, still = t->still[o] & kind && !t->spread;
        extent[d] = still || (kind == 2 && reduced) ? STILL : t->shape[d];
    }
    array a = new_blank(&layouts[t->layout[o]], "rsab", extent, sizes[t->type[o]]);
    for (ptrdiff_t r = 0; o < FSM_OUT && r < rows_of(t); r++)
        for (ptrdiff_t i = 0; i < (reduced ? 1 : length_of(t)); i++)
            encode(t->type[o], value(t, o, t->first + r, i), element(t, &a, r, i));
    guard(&a, o < FSM_OUT);
    return a;
}

/* Moves the results out, row by row. True if nothing but guards is left. */
static int take_out(const test *t, const array *a, char *to) {
    const int size = sizes[t->type[FSM_OUT]];
    for (ptrdiff_t r = 0; r < rows_of(t); r++)
        for (ptrdiff_t i = 0; i < width_of(t); i++, to += size) take(element(t, a, r, i), to, size);
    return is_blank(a);
}

/* ---- running a test ---- */

/* As many rows as the test has, of so many elements, contiguous. */
static array new_rows(const test *t, ptrdiff_t width, ptrdiff_t size) {
    const ptrdiff_t extent[] = {t->shape[0], t->shape[1], width, 1};
    return new_blank(&layouts[CONTIGUOUS], "rsab", extent, (int)size);
}

/* The largest element of each row, in the compute type; NaN if there is one. */
static array new_maxima(const test *t, const array *x) {
    array a = new_rows(t, 1, sizes[t->compute]);
    for (ptrdiff_t r = 0; r < rows_of(t); r++) {
        double m = -INFINITY;
        for (ptrdiff_t i = 0; i < length_of(t); i++) {
            const double one = decode(t->type[FSM_X], element(t, x, r, i));
            if (isgreater(one, m) || one != one) m = one;
        }
        encode(t->compute, m, a.first + r * sizes[t->compute]);
    }
    guard(&a, 1);
    return a;
}

/* Each part has arrays of its own; some are empty where there are more parts than elements. First
 * the sums of all parts are added up, then each is mapped. */
static void run_parts(const test *t, const fsm_isa *isa, const array *x, const array *out) {
    const ptrdiff_t rows = rows_of(t), whole = length_of(t), counts = rows * FSM_PARTS;
    const ptrdiff_t x_size = sizes[t->type[FSM_X]], out_size = sizes[t->type[FSM_OUT]];
    array max = new_maxima(t, x), total = new_rows(t, FSM_PARTS, sizeof(int64_t));
    int64_t *sum = memset(total.first, 0, (size_t)counts * sizeof *sum);
    for (int k = 0; k < 2 * t->parts; k++) {
        const int map = k >= t->parts;
        const ptrdiff_t at = whole * (k % t->parts) / t->parts;
        const ptrdiff_t n = whole * (k % t->parts + 1) / t->parts - at;
        const ptrdiff_t width = is_reduction(t->op) ? 1 : n, to = is_reduction(t->op) ? 0 : at;
        array part = new_rows(t, n, x_size), counted = new_rows(t, FSM_PARTS, sizeof *sum);
        array result = new_rows(t, width, out_size);
        for (ptrdiff_t r = 0; r < rows; r++)
            for (ptrdiff_t i = 0; i < n; i++)
                memcpy(part.first + (r * n + i) * x_size, element(t, x, r, at + i), (size_t)x_size);
        if (map) memcpy(counted.first, total.first, (size_t)counts * sizeof *sum);
        guard(&part, 1);
        guard(&counted, map);
        guard(&result, 0);
        const fsm_parts p = {t->op,       t->compute, t->type[FSM_X], t->type[FSM_OUT],
                             isa,         t->threads, rows,           n,
                             whole,       part.first, max.first,      (int64_t *)counted.first,
                             result.first};
        if (map) fsm_parts_map(&p);
        else fsm_parts_sum(&p);
        for (ptrdiff_t j = 0; !map && j < counts; j++) {
            int64_t one;
            take(counted.first + j * (ptrdiff_t)sizeof one, (char *)&one, sizeof one);
            sum[j] += one;
        }
        for (ptrdiff_t r = 0; map && r < rows; r++)
            for (ptrdiff_t i = 0; i < width; i++)
                take(result.first + (r * width + i) * out_size, element(t, out, r, to + i),
                     (int)out_size);
        expect(map ? is_untouched(&counted) : is_blank(&counted), t, isa, "wrote beside sums", k);
        expect(is_blank(&result), t, isa, "wrote beside a part of out", k);
        expect(is_untouched(&part), t, isa, "wrote to a part of x", k);
        free_array(&part);
        free_array(&counted);
        free_array(&result);
    }
    expect(is_untouched(&max), t, isa, "wrote to max", 0);
    free_array(&max);
    free_array(&total);
}

/* `signs` is written if the test has some. */
static void run(const test *t, const fsm_isa *isa, char *results, char *signs) {
    fsm_problem p = {t->op, t->compute, 4, t->threads, isa, .reduced = {0, 0, 1, 1}};
    array a[FSM_OPERAND_COUNT] = {0};
    fsm_plan *plan = NULL;
    fsm_status status = FSM_DONE;
    memcpy(p.shape, t->shape, sizeof t->shape);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
        if (!t->has[o]) continue;
        if (o == FSM_OUT && t->out_at != FSM_OUT) a[o] = a[t->out_at];
        else a[o] = new_array(t, (fsm_operand)o);
        p.operand[o] = (fsm_array){a[o].first, t->type[o], {0}};
        memcpy(p.operand[o].strides, a[o].stride, sizeof a[o].stride);
    }
    const int mode = t->upward ? FE_UPWARD : FE_TONEAREST;
    fesetround(mode);
    raise_one_flag();
    if (t->small)
        fsm_softmax_small(isa, t->type[FSM_X], t->op == FSM_LOG_SOFTMAX, a[FSM_X].first,
                          a[FSM_OUT].first, rows_of(t), length_of(t));
    else if (t->one_call)
        status = fsm_softmax_rows(isa, t->op, t->type[FSM_X], a[FSM_X].first, a[FSM_X].stride[1],
                                  a[FSM_X].stride[3], a[FSM_OUT].first, a[FSM_OUT].stride[1],
                                  a[FSM_OUT].stride[3], rows_of(t), length_of(t), t->threads);
    else if (t->parts) run_parts(t, isa, &a[FSM_X], &a[FSM_OUT]);
    else status = fsm_plan_new(&plan, &p);
    while (status == FSM_AGAIN) status = fsm_plan_run(plan);
    fsm_plan_free(plan);
    const int kept = fegetround() == mode && only_that_flag();
    fesetround(FE_TONEAREST);
    expect(kept, t, isa, "changed the floating-point mode or flags", 0);
    expect(status == FSM_DONE, t, isa, "did not end", 0);
    expect(take_out(t, &a[FSM_OUT], results), t, isa, "wrote beside out", 0);
    if (t->has[FSM_SIGN]) expect(take_out(t, &a[FSM_SIGN], signs), t, isa, "wrote beside sign", 0);
    for (fsm_operand o = 0; o < FSM_OUT; o++)
        if (t->has[o] && t->out_at != o)
            expect(is_untouched(&a[o]), t, isa, "wrote to an input", 0);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        if (o != FSM_OUT || t->out_at == FSM_OUT) free_array(&a[o]);
}

/* The same rows, one by one, the simplest way. */
static void run_alone(const test *t, char *results, char *signs) {
    test one = *t;
    memcpy(one.shape, (ptrdiff_t[]){1, 1, 1, length_of(t)}, sizeof one.shape);
    memset(one.layout, CONTIGUOUS, sizeof one.layout);
    one.out_at = FSM_OUT;
    one.threads = one.spread = 1;
    one.small = one.one_call = one.parts = one.upward = 0;
    for (ptrdiff_t r = 0; r < rows_of(t); r++, one.first++)
        run(&one, scalar, results + r * bytes_of(&one), signs + r * bytes_of(&one));
}

typedef struct {
    double x, y;
    int takes_part;
    long double value, unit; /* of the result, and what its error is measured by */
} entry;

/* Row r in long double. The sign of a weighted sum goes into the entry after the last. */
static void evaluate(const test *t, ptrdiff_t r, entry *e) {
    const int log_backward = t->op == FSM_LOG_SOFTMAX_BACKWARD;
    const double scale = t->has[FSM_SCALE] ? stored(t, FSM_SCALE, r, 0) : 1;
    long double m = -INFINITY, sum = 0, all = 0; /* m: NaN if there is one; all: of |terms| */
    double odd = 0;                              /* the sum of weighted terms that are not finite */
    for (ptrdiff_t i = 0; i < length_of(t); i++) {
        const double x = stored(t, FSM_X, r, i), s = is_backward(t->op) ? 1 : scale;
        const double bias = t->has[FSM_BIAS] ? stored(t, FSM_BIAS, r, i) : 0;
        const double y = t->has[FSM_Y] ? stored(t, FSM_Y, r, i) : 1;
        const int where = t->has[FSM_WHERE] ? stored(t, FSM_WHERE, r, i) != 0 : 1;
        const int in = where && bias != -INFINITY && y != (log_backward ? -INFINITY : 0);
        if (t->compute == FSM_F64) e[i] = (entry){fma(x, s, bias), y, in, 0, 0};
        else e[i] = (entry){fmaf((float)x, (float)s, (float)bias), (float)y, in, 0, 0};
        const double z = e[i].x;
        const long double term = log_backward ? z : (long double)z * e[i].y;
        if (!in) continue;
        if (is_backward(t->op)) sum += term, all += fabsl(term);
        else if (t->op == FSM_LOGSUMEXP_WEIGHTED && !(z < INFINITY)) odd += z * e[i].y;
        else if (z > m || z != z) m = z;
    }
    const int finite = m - m == 0, weighted = t->op == FSM_LOGSUMEXP_WEIGHTED;
    long double top = 0, rest = 0; /* the term of the first maximum, and the others */
    for (ptrdiff_t i = 0; i < length_of(t) && finite; i++) {
        if (!e[i].takes_part || !(e[i].x < INFINITY)) continue;
        const long double term = e[i].y * expl(e[i].x - m);
        if (e[i].x == m && top == 0) top = term;
        else rest += term;
        all += fabsl(term);
    }
    if (!is_backward(t->op)) sum = top + rest;
    const long double log_sum = weighted ? logl(fabsl(sum)) : log1pl(rest);
    const long double least_unit = finite ? fmaxl(1, fabsl(m)) : 1;
    for (entry *one = e; one < e + width_of(t); one++) {
        const long double x = one->x, p = log_backward ? expl(one->y) : one->y;
        if (is_reduction(t->op)) {
            one->value = finite ? m + log_sum : m;
            one->unit = fmaxl(least_unit, fabsl(one->value));
        } else if (!one->takes_part) one->value = t->op == FSM_LOG_SOFTMAX ? -INFINITY : 0;
        else if (log_backward) {
            one->value = scale * (x - p * sum);
            one->unit = fabs(scale) * (fabsl(x) + p * all);
        } else if (is_backward(t->op)) {
            one->value = scale * (p * (x - sum));
            one->unit = fabs(scale) * p * (fabsl(x) + all);
        } else if (!finite) one->value = NAN;
        else if (t->op == FSM_SOFTMAX) one->unit = one->value = expl(x - m) / sum;
        else {
            one->value = x - m - log_sum;
            one->unit = fmaxl(least_unit, fabsl(one->value));
            if (x == m) one->unit = fabsl(one->value) + 0x1p-24L * length_of(t); /* no cancelling */
        }
    }
    if (!weighted) return;
    const double signed_sum = odd != 0 ? odd : (double)sum;
    e[length_of(t)].value = odd != odd ? NAN : (signed_sum > 0) - (signed_sum < 0);
    if (odd != 0) e->value = fabs(odd);
    if (signed_sum < 0 && !t->has[FSM_SIGN]) e->value = NAN;
    e->unit += all / fabsl(sum); /* cancellation */
}

/* In units. */
static int tolerance(const test *t) {
    return t->compute == FSM_F64 && !has_long_double() ? 4096 : 4;
}

static int agrees(const test *t, double got, long double want, long double unit) {
    const fsm_dtype out = t->type[FSM_OUT], compute = t->compute;
    if (got != got || want != want) return got != got && want != want;
    if (want - want != 0 || unit == 0) return got == want;
    if (got - got != 0) return fabsl(want) >= floats[out].most && (got > 0) == (want > 0);
    const long double rounding = 0.501L * floats[out].ulp * fabsl(want) + floats[out].least;
    return fabsl(got - want) <=
           tolerance(t) * floats[compute].ulp * unit + floats[compute].least + rounding;
}

static void check_values(const test *t, const char *results, const char *signs) {
    const fsm_dtype out = t->type[FSM_OUT];
    entry *e = allocate((length_of(t) + 1) * (ptrdiff_t)sizeof *e);
    char what[80] = "";
    ptrdiff_t at = 0;
    for (ptrdiff_t r = 0; r < rows_of(t) && !*what; r++, signs += sizes[out]) {
        evaluate(t, t->first + r, e);
        for (ptrdiff_t i = 0; i < width_of(t) && !*what; i++, at++, results += sizes[out]) {
            const double got = decode(out, results);
            if (!agrees(t, got, e[i].value, e[i].unit))
                snprintf(what, sizeof what, "%.17g, not %.20Lg", got, e[i].value);
        }
        if (t->has[FSM_SIGN] && !agrees(t, decode(out, signs), e[length_of(t)].value, 0))
            strcpy(what, "the wrong sign");
    }
    expect(!*what, t, scalar, what, at - 1);
    free(e);
}

static atomic_ullong fingerprint; /* a sum: threads add to it in any order */

static void add_to_fingerprint(const char *bytes, ptrdiff_t n) {
    uint64_t h = (uint64_t)n;
    for (ptrdiff_t i = 0; i < n; i++) h = mix(h + (unsigned char)bytes[i]);
    atomic_fetch_add(&fingerprint, h);
}

static void check(test t) {
    static _Thread_local long asked; /* so that all runs leave out the same ones */
    if (asked++ % ONE_IN) return;
    const ptrdiff_t bytes = bytes_of(&t), all = t.has[FSM_SIGN] ? 2 * bytes : bytes;
    char *want = allocate(all), *got = allocate(all);
    run_alone(&t, want, want + bytes);
    check_values(&t, want, want + bytes);
    add_to_fingerprint(want, all);
    for (int k = 0; k < isa_count; k++) {
        ptrdiff_t i = 0;
        run(&t, isas[k], got, got + bytes);
        const int same = memcmp(want, got, (size_t)all) == 0;
        while (!same && want[i] == got[i]) i++;
        expect(same, &t, isas[k], "other bits", i / sizes[t.type[FSM_OUT]]);
    }
    free(want);
    free(got);
}

/* ---- making tests ---- */

static test make(fsm_op op, fsm_dtype compute, fsm_dtype x, fsm_dtype out, ptrdiff_t rows,
                 ptrdiff_t n) {
    test t = {.op = op, .compute = compute, .shape = {1, rows, 1, n}, .threads = 1};
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) t.type[o] = o < FSM_OUT ? compute : out;
    t.type[FSM_X] = x;
    t.type[FSM_WHERE] = FSM_U8;
    t.has[FSM_X] = t.has[FSM_OUT] = 1;
    t.has[FSM_Y] = op >= FSM_LOGSUMEXP_WEIGHTED;
    t.has[FSM_SIGN] = op == FSM_LOGSUMEXP_WEIGHTED;
    t.out_at = FSM_OUT;
    t.upward = n % 2;
    return t;
}

/* One of the usual combinations of types. */
enum { USUAL = 5 };
static test usual(int k, fsm_op op, ptrdiff_t rows, ptrdiff_t n) {
    static const fsm_dtype in[] = {FSM_F32, FSM_F64, FSM_F16, FSM_BF16, FSM_F16};
    static const fsm_dtype out[] = {FSM_F32, FSM_F64, FSM_F16, FSM_BF16, FSM_F32};
    k %= USUAL;
    return make(op, in[k] == FSM_F64 ? FSM_F64 : FSM_F32, in[k], out[k], rows, n);
}

/* Those operands of a set that the operation takes. */
enum { BIAS = 1, WHERE = 2, SCALE = 4, EVERYTHING = 7 };
static test with(test t, int set) {
    t.has[FSM_BIAS] = (set & BIAS) && t.op <= FSM_LOGSUMEXP;
    t.has[FSM_WHERE] = (set & WHERE) && t.op <= FSM_LOGSUMEXP_WEIGHTED;
    t.has[FSM_SCALE] = (set & SCALE) && t.op != FSM_LOGSUMEXP_WEIGHTED;
    return t;
}

static test laid_out(test t, int in, int fused, int out) {
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        t.layout[o] = o >= FSM_OUT ? out : o >= FSM_BIAS ? fused : in;
    return t;
}

static test shaped(test t, const ptrdiff_t shape[4]) {
    memcpy(t.shape, shape, sizeof t.shape);
    return t;
}

/* ---- the tests, of one operation each ---- */

/* Every length up to 130, and those around the places where something changes. */
static void lengths(fsm_op op) {
    static const ptrdiff_t longer[] = {255,   256,   257,   258,    511,    512,   513,  1023,
                                       1024,  1025,  4095,  4096,   4097,   8191,  8192, 8193,
                                       16383, 16384, 16385, 131071, 131072, 131073};
    for (int k = 0; k < 130 + COUNT(longer); k++) {
        const ptrdiff_t n = k < 130 ? k + 1 : longer[k - 130], rows = n < 4000 ? 3 : 1;
        for (int u = 0; u < (n < 4000 ? USUAL : 1); u++) check(usual(u, op, rows, n));
        for (int u = 0; u < (n < 4000 ? USUAL : 1); u++)
            check(with(usual(u + k, op, rows, n), WHERE | SCALE));
    }
}

/* Short rows are taken side by side, as lanes, and so are columns. */
static void lanes(fsm_op op) {
    static const ptrdiff_t rows[] = {1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 130};
    static const ptrdiff_t lengths[] = {1, 31, 70};
    for (int k = 0; k < COUNT(rows); k++)
        for (int n = 1; n <= 34; n++)
            check(with(usual(n + k, op, rows[k], n), k % 4 == 3 ? WHERE : 0));
    for (int k = 0; k < COUNT(lengths); k++)
        for (int n = 1; n <= 130; n++) {
            const test t = usual(n + k, op, n, lengths[k]);
            check(laid_out(with(t, n % 3 ? 0 : WHERE | SCALE), COLUMNS, COLUMNS, COLUMNS));
        }
}

static void dtypes(fsm_op op) {
    for (int k = 0; k < 2 * 12 * 4 * 2; k++) {
        const fsm_dtype compute = k % 2 ? FSM_F64 : FSM_F32, x = k / 2 % 12, out = k / 24 % 4;
        if (compute == FSM_F32 && x > FSM_F64) continue; /* integers are float64 to us */
        test t = k / 96 ? make(op, compute, x, out, 3, 37) : make(op, compute, x, out, 21, 9);
        t.type[FSM_Y] = t.type[FSM_BIAS] = (x + out) % 4;
        check(t);
        check(laid_out(with(t, EVERYTHING), EVERY_THIRD, UNALIGNED, COLUMNS));
    }
}

static const ptrdiff_t shapes[][4] = {{3, 5, 2, 7}, {2, 19, 1, 3}, {2, 70, 3, 11}, {3, 1, 4, 75}};

/* Each pair of layouts; types, shape and operands by chance. */
static void all_layouts(fsm_op op) {
    for (int k = 0; k < 3 * COUNT(layouts) * COUNT(layouts); k++) {
        const int h = (int)(hash(FSM_X, k, op) % (1 << 20)), in = k % COUNT(layouts);
        const test t = with(shaped(usual(h, op, 1, 1), shapes[h / 8 % COUNT(shapes)]), h / 32);
        check(laid_out(t, in, h / 256 % COUNT(layouts), k / COUNT(layouts) % COUNT(layouts)));
    }
}

/* Strides of 0, which broadcasting makes. */
static void zero_strides(fsm_op op) {
    for (int k = 0; k < 3 * 128; k++) {
        test t = shaped(usual(k / 3, op, 1, 1), shapes[(k + k / 128) % COUNT(shapes)]);
        t = with(t, k % 3 ? EVERYTHING : BIAS | WHERE);
        t.still[FSM_X] = k % 4;
        t.still[FSM_Y] = t.still[FSM_BIAS] = k / 4 % 4;
        t.still[FSM_WHERE] = k / 16 % 4;
        t.still[FSM_SCALE] = k / 64 % 2;
        check(k % 5 < 3 ? t : laid_out(t, MIDDLE_AXIS, COLUMNS, PADDED));
    }
}

/* Each set of operands, in place or not. */
static void operands(fsm_op op) {
    static const ptrdiff_t shapes[][2] = {{5, 1}, {3, 33}, {18, 20}, {2, 1500}};
    for (int k = 0; k < COUNT(shapes) * USUAL * 32; k++) {
        const ptrdiff_t *shape = shapes[k % COUNT(shapes)];
        test t = with(usual(k / 4, op, shape[0], shape[1]), k / 20);
        if (k / 20 & 8) t = laid_out(t, COLUMNS, UNALIGNED, COLUMNS);
        if (k / 20 & 16 && t.type[FSM_X] == t.type[FSM_OUT] && !is_reduction(op)) t.out_at = FSM_X;
        if (k / 20 & 2 && t.type[FSM_Y] == t.type[FSM_OUT] && is_backward(op)) t.out_at = FSM_Y;
        if (k / 20 & 1) t.has[FSM_SIGN] = 0;
        check(t);
    }
}

static void special_rows(fsm_op op) {
    static const ptrdiff_t lengths[] = {1, 2, 5, 17, 40, 300};
    for (int k = 0; k < COUNT(lengths) * USUAL * 16; k++) {
        test t = with(usual(k / 16, op, 10, lengths[k / 16 / USUAL]), k);
        if (k & 8) t = laid_out(t, COLUMNS, COLUMNS, UNALIGNED);
        if (k & 1) t.has[FSM_SIGN] = 0;
        t.special = 1;
        check(t);
    }
    for (int k = 0; k < 9; k++) { /* a row in chunks */
        test t = with(usual(k, op, 1, 33000), WHERE);
        t.first = k;
        t.threads = 2;
        t.special = 1;
        check(t);
    }
}

/* Rows, columns and parts of long rows are dealt to threads. */
static void threads(fsm_op op) {
    static const ptrdiff_t shapes[][2] = {
        {230, 290}, {3000, 22}, {1, 66000}, {3, 22000}, {18, 4000}};
    for (int k = 0; k < COUNT(shapes) * 2; k++) {
        const ptrdiff_t *shape = shapes[k / 2];
        test t = with(usual(k + (int)op, op, shape[0], shape[1]), k % 3 ? 0 : WHERE);
        t.threads = 2 + k % 3;
        check(k % 2 ? t : laid_out(t, COLUMNS, COLUMNS, COLUMNS));
    }
}

/* Rows of more than 2^18 elements are taken in chunks, and work that takes long in slices. */
static void long_rows(fsm_op op) {
    test t = shaped(usual(1, op, 1, 1), (ptrdiff_t[]){1, 5, 3, 20001});
    t.threads = 3;
    check(laid_out(t, COLUMNS, PADDED, UNALIGNED));
    for (int k = 0; k < (op <= FSM_LOGSUMEXP ? 3 : 1); k++) {
        t = with(usual(k, op, 1, (1 << 18) + 1), k == 2 ? BIAS | SCALE : 0);
        t.threads = 1 + (k + (int)op) % 3;
        check(t);
    }
}

static void small(fsm_op op) {
    static const ptrdiff_t rows[] = {1, 4, 65};
    for (int n = 1; n <= 1100 && op <= FSM_LOG_SOFTMAX; n += n < 70 ? 1 : 93)
        for (int k = 0; k < COUNT(rows) * 4; k++) {
            test t = usual(k % 4, op, rows[k / 4], n);
            t.out_at = n % 3 ? FSM_OUT : FSM_X;
            t.special = n % 5 == 0;
            t.small = 1;
            check(t);
        }
}

static void one_call(fsm_op op) {
    static const ptrdiff_t lengths[] = {1, 3, 16, 33, 1025, 40000};
    for (int k = 0; k < 4 * COUNT(lengths) * COUNT(layouts) && op <= FSM_LOGSUMEXP; k++) {
        const int layout = k / 4 % COUNT(layouts), n = k / 4 / COUNT(layouts);
        if (n == COUNT(lengths) - 1 && layout % 3) continue; /* long enough for threads, and slow */
        test t = usual(k % 4, op, n < 4 ? 20 : 2, lengths[n]);
        t = laid_out(t, layout, 0, (layout + k % 3) % COUNT(layouts));
        t.out_at = op != FSM_LOGSUMEXP && k % 3 == 0 ? FSM_X : FSM_OUT;
        t.special = k % 5 == 0;
        t.threads = 1 + k % 2;
        t.one_call = 1;
        check(t);
    }
}

/* Rows that lie in no one memory; the longest are dealt to threads. */
static void parts(fsm_op op) {
    static const ptrdiff_t lengths[] = {1, 2, 5, 17, 64, 300, 5000};
    for (int k = 0; k < COUNT(lengths) * USUAL * 4 && op <= FSM_LOGSUMEXP; k++) {
        const ptrdiff_t n = lengths[k / 4 / USUAL];
        test t = usual(k / 4, op, n < 300 ? 10 : 20, n);
        t.special = k % 2;
        t.parts = 1 + k % 4;
        t.threads = 1 + k % 3;
        check(t);
    }
}

/* Calls from several threads at once, each of which may start more. */
static void *caller(void *first) {
    const test *mine = first;
    for (int k = 0; k < 15; k++) {
        const int rows = k % 3 ? 130 : 90, n = k % 3 ? 9 : 400;
        test t = with(usual(k + (int)mine->first, mine->op, rows + mine->first, n), k);
        t.threads = 1 + k / 3 % 3;
        check(k % 7 < 4 ? t : laid_out(t, COLUMNS, PADDED, UNALIGNED));
    }
    return NULL;
}

static void callers(fsm_op op) {
    pthread_t thread[4];
    test t[4];
    for (int k = 0; k < 4; k++) {
        t[k] = (test){.op = op, .first = k};
        if (pthread_create(&thread[k], NULL, caller, &t[k])) abort();
    }
    for (int k = 0; k < 4; k++) pthread_join(thread[k], NULL);
}

/* Threads that compute at once: the callers, and the helpers of one of them. */
enum { TEAM_CALLERS = 6, TEAM = 3 };
static atomic_int inside, most_inside;

static void be_inside(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const int now = atomic_fetch_add(&inside, 1) + 1;
    int most = atomic_load(&most_inside);
    while (now > most && !atomic_compare_exchange_weak(&most_inside, &most, now)) {}
    for (int k = 0; k < 300; k++) sched_yield(); /* time for the others to come in */
    atomic_fetch_sub(&inside, 1);
    (void)context, (void)thread, (void)begin, (void)end;
}

static void *team_caller(void *unused) {
    for (int k = 0; k < 20; k++) fsm_parallel_for(TEAM, 8 * TEAM, 1, be_inside, NULL);
    return unused;
}

enum { UNITS = 1000 };
static atomic_int done[UNITS];

static void do_units(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t i = begin; i < end; i++) atomic_fetch_add(&done[i], 1);
    (void)context, (void)thread;
}

/* Each unit is done once, whatever the shares; more threads than shares have some in common. */
static void shares(const test *t) {
    static const ptrdiff_t counts[] = {0, 1, 2, 7, 64, 65, UNITS}, grains[] = {1, 3, 64};
    static const int threads[] = {1, 2, 3, 5, 70}; /* 70 once: they are slow to meet */
    for (int k = 0; k < 2 * COUNT(counts) * COUNT(grains) * COUNT(threads); k++) {
        const ptrdiff_t n = counts[k / 2 % COUNT(counts)];
        const ptrdiff_t grain = grains[k / 2 / COUNT(counts) % COUNT(grains)];
        const int team = threads[k / 2 / COUNT(counts) / COUNT(grains)];
        ptrdiff_t right = 0;
        if (team == 70 && (n < UNITS || grain > 1)) continue;
        fsm_parallel_shares(team, n, grain, k % 2, do_units, NULL);
        for (ptrdiff_t i = 0; i < UNITS; i++) right += atomic_exchange(&done[i], 0) == (i < n);
        expect(right == UNITS, t, isas[0], "units done once, of 1000", right);
    }
}

static void teams(fsm_op op) {
    const test t = usual(0, op, 1, 1);
    pthread_t thread[TEAM_CALLERS];
    if (op != FSM_SOFTMAX) return;
    shares(&t);
    for (int k = 0; k < TEAM_CALLERS; k++)
        if (pthread_create(&thread[k], NULL, team_caller, NULL)) abort();
    for (int k = 0; k < TEAM_CALLERS; k++) pthread_join(thread[k], NULL);
    expect(most_inside > 1 && most_inside <= TEAM_CALLERS + TEAM - 1, &t, isas[0],
           "threads at once", most_inside);
}

/* The internal exp, against long double. */
static void exponentials(fsm_op op) {
    for (int k = 0; k < 2 * 260 * isa_count && op == FSM_SOFTMAX; k++) {
        const fsm_isa *isa = isas[k / 520];
        const test t = usual(k % 2, op, 1, 1 + k / 2 % 260);
        const fsm_dtype type = t.compute;
        const ptrdiff_t n = length_of(&t);
        array x = new_array(&t, FSM_X), y = new_array(&t, FSM_OUT);
        char *results = allocate(bytes_of(&t));
        for (ptrdiff_t i = 0; i < n; i++)
            encode(type, -fabs(value(&t, FSM_X, 3, i)), element(&t, &x, 0, i));
        if (type == FSM_F32) fsm_exp_f32(isa, (float *)y.first, (float *)x.first, n);
        else fsm_exp_f64(isa, (double *)y.first, (double *)x.first, n);
        expect(take_out(&t, &y, results), &t, isa, "exp wrote beside out", 0);
        for (ptrdiff_t i = 0; i < n; i++) {
            const long double e = expl(decode(type, element(&t, &x, 0, i)));
            expect(agrees(&t, decode(type, results + i * sizes[type]), e, e), &t, isa, "exp", i);
        }
        free_array(&x);
        free_array(&y);
        free(results);
    }
}

/* Rows whose results go past the caches, which a plan does only where there are very many: the same,
 * wherever they begin in a line, and whichever kinds of rows follow each other: every fourth row is
 * the order in which one without a finite maximum comes between two that end within a line. The gaps
 * between them and what follows stay as they are. Only short rows are done in blocks: 75 of them are
 * some blocks. */
static void past_the_caches(fsm_op op) {
    static const ptrdiff_t lengths[] = {
        33, 129, 191, 300, 513, 700, FSM_BLOCK + 76, FSM_LAG_MOST + 52};
    static const struct {
        ptrdiff_t rows, step;
    } ways[] = {{1, 1}, {2, 1}, {4, 1}, {9, 1}, {9, 4}, {75, 1}, {75, 4}};
    enum { OFFSETS = 16, MOST = 75, FEW = 9, STEPS = 4 };
    for (int k = 0; op <= FSM_LOG_SOFTMAX && k < 2 * COUNT(lengths) * isa_count; k++) {
        const fsm_isa *isa = isas[k / 2 / COUNT(lengths)];
        const ptrdiff_t n = lengths[k / 2 % COUNT(lengths)];
        const ptrdiff_t there = (n > 300 ? FEW : MOST) * STEPS; /* rows of x */
        test t = usual(k % 2, op, there, n);
        t.special = 1;
        const ptrdiff_t size = sizes[t.compute], all = (MOST * (n + 3) + OFFSETS) * size;
        const fsm_kernels *kernels = t.compute == FSM_F64 ? isa->f64 : isa->f32;
        array x = new_array(&t, FSM_X);
        for (ptrdiff_t i = 0; i < there * n; i++)
            encode(t.compute, value(&t, FSM_X, i / n, i % n), element(&t, &x, i / n, i % n));
        char *e = allocate(exps_kept(n, 1) * n * size), *near = allocate(all),
             *past = allocate(all);
        for (int way = 0; way < OFFSETS * 2 * COUNT(ways); way++) {
            const ptrdiff_t gap = way & 1 ? 3 : 0, at = (way >> 1) % OFFSETS * size;
            const ptrdiff_t rows = ways[way / (2 * OFFSETS)].rows;
            const size_t bytes = (size_t)((rows * (n + 3) + OFFSETS) * size);
            if (rows == MOST && n > 300) break;
            if ((way / 2 + k) % ONE_IN) continue;
            fsm_rows w = {.x = x.first,
                          .out = near + at,
                          .x_stride = ways[way / (2 * OFFSETS)].step * n * size,
                          .out_stride = (n + gap) * size,
                          .rows = rows,
                          .n = n,
                          .x_dtype = t.compute,
                          .out_dtype = t.compute,
                          .scratch = e};
            memset(near, 0xff, bytes);
            memset(past, 0xff, bytes);
            kernels->rows(op, &w);
            w.out = past + at;
            w.from_memory = w.nontemporal = 1;
            kernels->rows(op, &w);
            expect(!memcmp(near, past, bytes), &t, isa, "past the caches", way);
        }
        free_array(&x);
        free(e);
        free(near);
        free(past);
    }
}

/* The rows of a test that has no more than them, for the kernels. */
static fsm_rows plain_rows(const test *t, const char *x, char *out, char *e) {
    const ptrdiff_t n = t->shape[3];
    return (fsm_rows){.x = x,
                      .out = out,
                      .x_stride = n * sizes[t->type[FSM_X]],
                      .out_stride = width_of(t) * sizes[t->type[FSM_OUT]],
                      .rows = t->shape[1],
                      .n = n,
                      .x_dtype = t->type[FSM_X],
                      .out_dtype = t->type[FSM_OUT],
                      .scratch = e};
}

/* An operation that meets a subnormal number, as input or result of a multiplication, takes Intel 150
 * cycles: exp and what is made of it are subnormal in every fourth row, but the flag of such a
 * multiplication stays down. */
static void underflow(fsm_op op) {
    static const ptrdiff_t lengths[] = {1, 5, 20, 40, 300, 700, FSM_LAG_MOST + 52};
    enum { ROWS = 70 };
    for (int k = 0; op <= FSM_LOG_SOFTMAX && k < 2 * COUNT(lengths) * isa_count; k++) {
        const fsm_isa *isa = isas[k / 2 / COUNT(lengths)];
        const ptrdiff_t n = lengths[k / 2 % COUNT(lengths)];
        const test t = usual(k % 2, op, ROWS, n);
        const ptrdiff_t size = sizes[t.compute];
        char *x = allocate(ROWS * n * size), *out = allocate(ROWS * n * size),
             *e = allocate(exps_kept(n, 1) * n * size);
        for (ptrdiff_t i = 0; i < ROWS * n; i++) {
            const double z = value(&t, FSM_X, i / n, i % n);
            encode(t.compute, t.compute == FSM_F64 && i / n % 4 == 3 ? 8 * z : z, x + i * size);
        }
        fsm_rows w = plain_rows(&t, x, out, e);
        const fsm_kernels *kernels = t.compute == FSM_F64 ? isa->f64 : isa->f32;
        for (; w.nontemporal < (n > FSM_SHORT_ROW ? 2 : 1); w.nontemporal++) {
            feclearexcept(FE_ALL_EXCEPT);
            kernels->rows(op, &w);
            expect(!fetestexcept(FE_UNDERFLOW), &t, isa, "underflow", w.nontemporal);
        }
        double least = 1;
        for (ptrdiff_t i = 0; i < ROWS * n; i++) {
            const double y = decode(t.compute, out + i * size);
            if (y > 0 && y < least) least = y;
        }
        expect(op != FSM_SOFTMAX || n < 300 || least < (size == 8 ? 0x1p-1022 : 0x1p-126), &t, isa,
               "no subnormal number", 0);
        free(x);
        free(out);
        free(e);
    }
}

/* Rows of -inf with two numbers, one of which is small and may be overlooked: where the others are as
 * masks leave them its result is not 0. */
static void holes(fsm_op op) {
    static const fsm_dtype types[] = {FSM_F32, FSM_F64, FSM_F16, FSM_BF16};
    static const ptrdiff_t lengths[] = {2, 31, 33, 40, 77, 150, 300, 700, 2100};
    enum { ROWS = 5 };
    for (int k = 0; op == FSM_SOFTMAX && k < COUNT(lengths) * COUNT(types) * isa_count; k++) {
        const fsm_isa *isa = isas[k / COUNT(lengths) / COUNT(types)];
        const fsm_dtype type = types[k / COUNT(lengths) % COUNT(types)];
        const fsm_dtype compute = type == FSM_F64 ? FSM_F64 : FSM_F32;
        const ptrdiff_t n = lengths[k % COUNT(lengths)];
        const test t = make(op, compute, type, compute, ROWS, n);
        const ptrdiff_t size = sizes[type], own = sizes[compute];
        char *x = allocate(ROWS * n * size), *out = allocate(ROWS * n * own),
             *e = allocate(exps_kept(n, 1) * n * own);
        const fsm_rows w = plain_rows(&t, x, out, e);
        for (ptrdiff_t place = 0; place < n; place += 1 + place / 100) {
            for (ptrdiff_t i = 0; i < ROWS * n; i++) encode(type, -INFINITY, x + i * size);
            for (int r = 0; r < ROWS; r++) {
                const double far = r != place % ROWS ? -1 : compute == FSM_F64 ? -720 : -95;
                encode(type, far, x + (r * n + place) * size);
                encode(type, 0, x + (r * n + (place + n / 2) % n) * size);
            }
            (compute == FSM_F64 ? isa->f64 : isa->f32)->rows(op, &w);
            int seen = 0;
            for (ptrdiff_t i = 0; i < ROWS * n; i++) seen += decode(compute, out + i * own) > 0;
            expect(seen == 2 * ROWS, &t, isa, "holes", place);
        }
        free(x);
        free(out);
        free(e);
    }
}

/* Rows of equal elements have the largest sums: the counts of the exact one are all that they can be. */
static void equal_rows(fsm_op op) {
    static const fsm_dtype types[] = {FSM_F32, FSM_F64, FSM_F16, FSM_BF16};
    enum { ROWS = 5, LENGTHS = 530 };
    for (int k = 0; op <= FSM_LOGSUMEXP && k < LENGTHS * COUNT(types) * isa_count; k++) {
        const fsm_isa *isa = isas[k / LENGTHS / COUNT(types)];
        const fsm_dtype type = types[k / LENGTHS % COUNT(types)];
        const fsm_dtype compute = type == FSM_F64 ? FSM_F64 : FSM_F32;
        const ptrdiff_t step = k % LENGTHS, n = step < 522 ? step + 1 : 512 * (step - 520);
        const test t = make(op, compute, type, compute, ROWS, n);
        const ptrdiff_t size = sizes[type], own = sizes[compute], results = ROWS * width_of(&t);
        char *x = allocate(ROWS * n * size), *out = allocate(results * own),
             *e = allocate(exps_kept(n, 1) * n * own);
        const fsm_rows w = plain_rows(&t, x, out, e);
        for (ptrdiff_t i = 0; i < ROWS * n; i++) encode(type, -3, x + i * size);
        (compute == FSM_F64 ? isa->f64 : isa->f32)->rows(op, &w);
        const double want = op == FSM_SOFTMAX       ? 1.0 / (double)n
                            : op == FSM_LOG_SOFTMAX ? -log((double)n)
                                                    : log((double)n) - 3;
        int right = 0;
        for (ptrdiff_t i = 0; i < results; i++)
            right += fabs(decode(compute, out + i * own) - want) <= 1e-6 * fabs(want);
        expect(right == results, &t, isa, "equal elements", right);
        free(x);
        free(out);
        free(e);
    }
}

/* What has no elements is done at once; a plan may be given up halfway; limits make sense. */
/* Slices of a problem in which every element of x is `value`. */
static int slices_of(fsm_problem *p, float value) {
    fsm_plan *plan;
    int slices = 0;
    float *x = (float *)p->operand[FSM_X].data;
    for (ptrdiff_t i = 0; i < p->shape[1]; i++) x[i] = value;
    fsm_status status = fsm_plan_new(&plan, p);
    for (; status == FSM_AGAIN; slices++) status = fsm_plan_run(plan);
    fsm_plan_free(plan);
    return slices;
}

static void odds_and_ends(fsm_op op) {
    const test t = make(op, FSM_F32, FSM_F32, FSM_F32, 1, 1 << 20);
    float *data = memset(allocate(4 << 20), 0, 4 << 20);
    for (int k = 0; k < isa_count; k++) {
        fsm_problem p = {op, FSM_F32, 2, 2, isas[k], .reduced = {0, 1}};
        for (int o = 0; o < FSM_OPERAND_COUNT; o++)
            if (t.has[o]) p.operand[o] = (fsm_array){(char *)data, FSM_F32, {0, 4}};
        for (int rows = 0; rows < 2; rows++) {
            fsm_plan *plan = (fsm_plan *)data;
            p.shape[0] = rows;
            p.shape[1] = 1 - rows;
            expect(fsm_plan_new(&plan, &p) == FSM_DONE && !plan, &t, isas[k], "a plan", rows);
        }
        fsm_plan *plan;
        p.shape[1] = 1 << 20;
        expect(fsm_plan_new(&plan, &p) == FSM_AGAIN, &t, isas[k], "no plan", 0);
        expect(fsm_plan_run(plan) == FSM_AGAIN, &t, isas[k], "no slices", 0);
        fsm_plan_free(plan);
        /* The entries of a row without a finite maximum are a pass more, and can be interrupted, too. */
        const int more = op == FSM_SOFTMAX || op == FSM_LOG_SOFTMAX;
        expect((slices_of(&p, NAN) > slices_of(&p, 0)) == more, &t, isas[k], "slices of NaN", 0);
        p.shape[1] = 4;
        p.isa = NULL; /* the best one */
        expect(fsm_compute_softmax(&p) == FSM_DONE, &t, isas[k], "not the best ISA", 0);
    }
    free(data);
    expect(fsm_usable_cpus() >= 1 && fsm_openmp_limit() >= 1, &t, scalar, "no threads", 0);
    expect(fsm_is_small(1) && !fsm_is_small(1 << 24), &t, scalar, "fsm_is_small", 0);
    expect(!fsm_isa_at(-1) && !fsm_isa_at(99), &t, scalar, "fsm_isa_at", 0);
}

static const struct {
    const char *name;
    void (*run)(fsm_op);
} groups[] = {
#define GROUP(f) {#f, f}
    GROUP(lengths),      GROUP(lanes),    GROUP(dtypes),       GROUP(all_layouts),
    GROUP(zero_strides), GROUP(operands), GROUP(special_rows), GROUP(threads),
    GROUP(long_rows),    GROUP(small),    GROUP(one_call),     GROUP(parts),
    GROUP(callers),      GROUP(teams),    GROUP(exponentials), GROUP(past_the_caches),
    GROUP(underflow),    GROUP(holes),    GROUP(equal_rows),   GROUP(odds_and_ends)};

int main(int argc, char **argv) {
    choose_isas(argc, argv, "amx");
    for (int g = 0; g < COUNT(groups); g++) {
        const long good = passed, bad = failed;
        const time_t start = time(NULL);
        for (fsm_op op = 0; op < FSM_CROSS_ENTROPY; op++) groups[g].run(op);
        report(groups[g].name, good, bad, start);
    }
    const int status = total();
    printf("bits %016llx\n", fingerprint);
    return status;
}
