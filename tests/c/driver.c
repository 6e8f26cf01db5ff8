/* The C API without Python, for sanitizers, valgrind and emulators: does every way through the kernels stay inside
 * its arrays, and does every way give the same bits?
 *
 *     driver [ISA...]        by default every ISA that this CPU can run
 *
 * A `test` is an operation on rows of numbers, which value() makes up, and says how they lie in memory. check() runs it
 * on every ISA, and holds the result against
 *
 *     the scalar kernels   given each row alone, contiguous, on one thread: bit for bit
 *     long double          a plain evaluation: loosely, for accuracy is tested from Python
 *     guards               around the arrays and in their gaps nothing may be written, nor, as far as a tool can tell, read
 *
 * Guards have all bits set, so that they are NaN: what no tool sees (GCC's ASan is blind to masked vector instructions)
 * spoils the result.
 */
#define _POSIX_C_SOURCE 200112L
#include "fastsoftmax.h"

#include <fenv.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__has_include)
#if __has_include(<sanitizer/asan_interface.h>)
#include <sanitizer/asan_interface.h> /* its macros do nothing in a program without ASan */
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif
#ifndef GUARD
#define GUARD 64 /* bytes on either side of an array; 0 where a tool watches the ends of every malloc, as valgrind does */
#endif

#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

typedef struct {
    const char *name, *order; /* r, s: the dimensions of the rows, a, b: those of the axis; the last moves fastest */
    int step, pad;            /* elements from one to the next; further ones between runs of the last dimension */
    int back, skew;           /* 1: the rows lie in reverse, 2: the axis does, 3: both; bytes off the allocation */
} layout;

static const layout layouts[] = {
    {"contiguous", "rsab", 1, 0, 0, 0},        {"unaligned", "rsab", 1, 0, 0, 1},
    {"padded", "rsab", 1, 5, 0, 0},            {"every third", "rsab", 3, 0, 0, 0},
    {"strided axis", "abrs", 1, 0, 0, 0},      {"strided axis, padded, unaligned", "abrs", 1, 3, 0, 1},
    {"axis in the middle", "rabs", 1, 0, 0, 0}, {"axis in two parts", "arbs", 1, 0, 0, 0},
    {"rows in two parts", "rasb", 1, 0, 0, 0}, {"axis transposed", "rsba", 1, 0, 0, 0},
    {"rows reversed", "rsab", 1, 0, 1, 0},     {"axis reversed", "rsab", 1, 0, 2, 1},
    {"all reversed", "abrs", 2, 1, 3, 0},
};

typedef struct {
    fsm_op op;
    fsm_dtype compute, type[FSM_OPERAND_COUNT];
    int has[FSM_OPERAND_COUNT], still[FSM_OPERAND_COUNT]; /* still, 1: the same for all rows, 2: along the axis; stride 0 */
    const layout *layout[FSM_OPERAND_COUNT];
    ptrdiff_t shape[4], first; /* of r, s, a, b; the first row's number */
    fsm_operand out_at;        /* FSM_X, FSM_Y: in place */
    int threads, special;      /* special: rows with NaN, inf and so on */
    int small;                 /* by fsm_softmax_small */
    int upward;                /* the caller rounds upwards, which must change nothing */
    int spread;                /* 1: what is the same for all rows or along the axis is written out all the same */
} test;

static const fsm_isa *isas[8], *scalar;
static int isa_count;
static atomic_long passed, failed;

/* ---- elements ---- */

static const struct {
    const char *name;
    ptrdiff_t size;
    double ulp, least, most; /* ulp(1), the smallest and the largest number */
} types[] = {
    {"f16", 2, 0x1p-10, 0x1p-24, 65504}, {"bf16", 2, 0x1p-7, 0x1p-133, 0x1.fep127},
    {"f32", 4, FLT_EPSILON, 0x1p-149, FLT_MAX}, {"f64", 8, DBL_EPSILON, 0x1p-1074, DBL_MAX},
    {"i8", 1, 0, 0, 0}, {"i16", 2, 0, 0, 0}, {"i32", 4, 0, 0, 0}, {"i64", 8, 0, 0, 0},
    {"u8", 1, 0, 0, 0}, {"u16", 2, 0, 0, 0}, {"u32", 4, 0, 0, 0}, {"u64", 8, 0, 0, 0},
};
static const char *const ops[] = {"softmax", "log_softmax", "logsumexp", "weighted", "softmax_backward", "log_softmax_backward"};

static int is_reduction(fsm_op op) { return op == FSM_LOGSUMEXP || op == FSM_LOGSUMEXP_WEIGHTED; }
static int is_backward(fsm_op op) { return op >= FSM_SOFTMAX_BACKWARD; }
static ptrdiff_t row_count(const test *t) { return t->shape[0] * t->shape[1]; }
static ptrdiff_t row_length(const test *t) { return t->shape[2] * t->shape[3]; }

/* Halves are cut off, not rounded, and small ones become 0: any number will do. */
static uint16_t half_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    const uint32_t sign = u >> 16 & 0x8000, m = u & 0x7fffffff;
    if (m >= 0x47800000) return (uint16_t)(sign | (m > 0x7f800000 ? 0x7e00 : 0x7c00));
    return (uint16_t)(sign | (m < 0x38800000 ? 0 : (m - 0x38000000) >> 13));
}

static void encode(fsm_dtype type, double v, void *to) {
    const float f = type <= FSM_F32 ? (float)v : 0;
    uint32_t u;
    memcpy(&u, &f, 4);
#define PUT(T, e) { const T a = (T)(e); memcpy(to, &a, sizeof a); } break
    switch (type) {
    case FSM_F16: PUT(uint16_t, half_of(f));
    case FSM_BF16: PUT(uint16_t, u >> 16);
    case FSM_F32: PUT(float, f);
    case FSM_F64: PUT(double, v);
    case FSM_I8: PUT(int8_t, v);
    case FSM_I16: PUT(int16_t, v);
    case FSM_I32: PUT(int32_t, v);
    case FSM_I64: PUT(int64_t, v);
    case FSM_U8: PUT(uint8_t, v);
    case FSM_U16: PUT(uint16_t, v);
    case FSM_U32: PUT(uint32_t, v);
    case FSM_U64: PUT(uint64_t, v);
    }
}

static double decode(fsm_dtype type, const void *from) {
#define GET(T) { T a; memcpy(&a, from, sizeof a); return (double)a; }
    uint16_t h;
    memcpy(&h, from, types[type].size == 2 ? 2 : 1);
    switch (type) {
    case FSM_F16: {
        const int e = h >> 10 & 31, m = h & 1023;
        const double a = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
        return h & 0x8000 ? -a : a;
    }
    case FSM_BF16: {
        const uint32_t u = (uint32_t)h << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    case FSM_F32: GET(float)
    case FSM_F64: GET(double)
    case FSM_I8: GET(int8_t)
    case FSM_I16: GET(int16_t)
    case FSM_I32: GET(int32_t)
    case FSM_I64: GET(int64_t)
    case FSM_U8: GET(uint8_t)
    case FSM_U16: GET(uint16_t)
    case FSM_U32: GET(uint32_t)
    default: GET(uint64_t)
    }
}

/* ---- the numbers of a test: a function of operand, row and element ---- */

static uint64_t hash(fsm_operand o, ptrdiff_t r, ptrdiff_t i) { /* splitmix64 */
    uint64_t h = (uint64_t)o * 0x9e3779b97f4a7c15 + (uint64_t)r * 0xd1b54a32d192ed03 + (uint64_t)i * 0xaef17502108ef2d9;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9;
    h = (h ^ h >> 27) * 0x94d049bb133111eb;
    return h ^ h >> 31;
}

static double value(const test *t, fsm_operand o, ptrdiff_t r, ptrdiff_t i) {
    enum { PLAIN, ONE_NAN, ONE_INF, SOME_MINUS_INF, ALL_MINUS_INF, NOTHING, HIDDEN_NAN, HUGE_ONES, ZEROS, KINDS };
    r = t->still[o] & 1 ? 0 : r;
    i = t->still[o] & 2 ? 0 : i;
    const uint64_t h = hash(o, r, i);
    const double u = (double)(h >> 11) * 0x1p-53;
    const ptrdiff_t kind = t->special ? r % KINDS : PLAIN;
    const double none = o == FSM_BIAS || (o == FSM_Y && t->op == FSM_LOG_SOFTMAX_BACKWARD) ? -INFINITY : 0;
    switch (o) {
    case FSM_WHERE: return kind == NOTHING || u < 0.2 ? 0 : 1;
    case FSM_SCALE: return r % 3 == 2 ? -0.5 - u : 0.5 + u;
    case FSM_BIAS: return kind == NOTHING || u < 0.1 ? none : 4 * u - 2;
    case FSM_Y: /* probabilities, logarithms of them, weights of either sign */
        if (kind == NOTHING || h % 8 == 0) return none;
        return t->op == FSM_SOFTMAX_BACKWARD ? u * u : t->op == FSM_LOG_SOFTMAX_BACKWARD ? -10 * u : 2 * u - 0.6;
    default: break;
    }
    switch (t->type[FSM_X]) { /* unsigned numbers that signed ones are not */
    case FSM_U8: return 255 - (int)(40 * u);
    case FSM_U16: return 65535 - (int)(40 * u);
    case FSM_U32: return 4294967295.0 - (int)(40 * u);
    case FSM_U64: return 0x1.8p63 + 2048 * (int)(2 * u);
    default: if (t->type[FSM_X] > FSM_F64) return (int)(80 * u) - 40;
    }
    const int chosen = (ptrdiff_t)(hash(o, r, -1) % (uint64_t)row_length(t)) == i;
    if (kind == ONE_NAN && chosen) return NAN;
    if (kind == ONE_INF && chosen) return INFINITY;
    if (kind == ALL_MINUS_INF || (kind == SOME_MINUS_INF && h % 4)) return -INFINITY;
    if (kind == HIDDEN_NAN) {
        if (t->has[FSM_WHERE] && value(t, FSM_WHERE, r, i) == 0) return NAN;
        if (t->has[FSM_BIAS] && value(t, FSM_BIAS, r, i) == -INFINITY) return h % 2 ? NAN : INFINITY;
    }
    if (kind == HUGE_ONES) return 8000 * (u - 0.3);
    if (kind == ZEROS) return h % 2 ? 0.0 : -0.0;
    return (r % 4 == 3 ? 240 : 16) * (u - 0.5); /* every fourth row has subnormal results, and 0 */
}

/* What is in memory then. */
static double stored(const test *t, fsm_operand o, ptrdiff_t r, ptrdiff_t i) {
    char bytes[8];
    encode(t->type[o], value(t, o, r, i), bytes);
    return decode(t->type[o], bytes);
}

/* ---- arrays ---- */

static void *allocate(ptrdiff_t bytes) {
    void *p = malloc((size_t)bytes);
    if (!p) abort();
    return p;
}

typedef struct {
    char *block, *first, *copy; /* the allocation; the element (0, 0, 0, 0); an input: what was in the allocation */
    ptrdiff_t size, stride[4];
} array;

static ptrdiff_t offset_of(const test *t, const array *a, ptrdiff_t r, ptrdiff_t i) {
    const ptrdiff_t s = t->shape[1], b = t->shape[3];
    return r / s * a->stride[0] + r % s * a->stride[1] + i / b * a->stride[2] + i % b * a->stride[3];
}

static array new_array(const test *t, fsm_operand o) {
    const layout *l = t->layout[o];
    const ptrdiff_t size = types[t->type[o]].size;
    const int reduced = o == FSM_SCALE || (is_reduction(t->op) && o >= FSM_OUT);
    array a = {0};
    ptrdiff_t pitch = size * l->step, extent = size, start = 0;
    for (int k = 3; k >= 0; k--) {
        const int d = (int)(strchr("rsab", l->order[k]) - "rsab"), kind = d < 2 ? 1 : 2;
        if ((kind == 2 && reduced) || (t->still[o] & kind && !t->spread)) continue;
        a.stride[d] = l->back & kind ? -pitch : pitch;
        extent += (t->shape[d] - 1) * pitch;
        start += l->back & kind ? (t->shape[d] - 1) * pitch : 0;
        pitch = pitch * t->shape[d] + (k == 3 ? l->pad * size : 0);
    }
    a.size = GUARD + l->skew + extent + GUARD;
    a.block = memset(allocate(a.size), 0xff, (size_t)a.size);
    a.first = a.block + GUARD + l->skew + start;
    if (o < FSM_OUT)
        for (ptrdiff_t r = 0; r < row_count(t); r++)
            for (ptrdiff_t i = 0; i < (reduced ? 1 : row_length(t)); i++)
                encode(t->type[o], value(t, o, r + t->first, i), a.first + offset_of(t, &a, r, i));
    if (o < FSM_OUT) a.copy = memcpy(allocate(a.size), a.block, (size_t)a.size);
    ASAN_POISON_MEMORY_REGION(a.block, GUARD);
    ASAN_POISON_MEMORY_REGION(a.block + a.size - GUARD, GUARD);
    return a;
}

static void free_array(array *a) {
    free(a->block);
    free(a->copy);
}

static int is_untouched(const array *a) {
    ASAN_UNPOISON_MEMORY_REGION(a->block, a->size);
    return memcmp(a->block, a->copy, (size_t)a->size) == 0;
}

/* Moves the results out, row by row, which must leave nothing but guards. */
static int take_out(const test *t, array *a, char *to) {
    const ptrdiff_t size = types[t->type[FSM_OUT]].size, n = is_reduction(t->op) ? 1 : row_length(t);
    for (ptrdiff_t r = 0; r < row_count(t); r++)
        for (ptrdiff_t i = 0; i < n; i++, to += size) {
            char *at = a->first + offset_of(t, a, r, i);
            memcpy(to, at, (size_t)size);
            memset(at, 0xff, (size_t)size);
        }
    ASAN_UNPOISON_MEMORY_REGION(a->block, a->size);
    return (unsigned char)a->block[0] == 0xff && memcmp(a->block, a->block + 1, (size_t)a->size - 1) == 0;
}

/* ---- running and judging a test ---- */

static void expect(int ok, const test *t, const fsm_isa *isa, const char *what, ptrdiff_t at) {
    if (ok) {
        atomic_fetch_add(&passed, 1);
        return;
    }
    if (atomic_fetch_add(&failed, 1) >= 20) return; /* enough to read */
    printf("FAILED on %s: %s, result %td: %s, compute %s", fsm_isa_name(isa), what, at, ops[t->op], types[t->compute].name);
    static const char *const names[] = {"x", "y", "bias", "where", "scale", "out", "sign"};
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        if (t->has[o])
            printf(", %s: %s %s%s", names[o], types[t->type[o]].name, t->layout[o]->name,
                   (const char *[]){"", " still over rows", " still over axis", " still"}[t->still[o]]);
    printf(", shape (%td %td | %td %td), %d threads%s%s%s\n", t->shape[0], t->shape[1], t->shape[2], t->shape[3], t->threads,
           t->out_at == FSM_OUT ? "" : ", in place", t->special ? ", special" : "", t->small ? ", small" : "");
}

static ptrdiff_t result_count(const test *t) { return row_count(t) * (is_reduction(t->op) ? 1 : row_length(t)); }
static ptrdiff_t result_bytes(const test *t) { return result_count(t) * types[t->type[FSM_OUT]].size; }

/* `signs` is written if the test has some. */
static void run(const test *t, const fsm_isa *isa, char *results, char *signs) {
    fsm_problem p = {.op = t->op, .compute = t->compute, .ndim = 4, .threads = t->threads, .isa = isa, .reduced = {0, 0, 1, 1}};
    array a[FSM_OPERAND_COUNT] = {0};
    memcpy(p.shape, t->shape, sizeof t->shape);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
        if (!t->has[o]) continue;
        a[o] = o == FSM_OUT && t->out_at != FSM_OUT ? a[t->out_at] : new_array(t, (fsm_operand)o);
        p.operand[o].data = a[o].first;
        p.operand[o].dtype = t->type[o];
        memcpy(p.operand[o].strides, a[o].stride, sizeof a[o].stride);
    }
    fsm_status status = FSM_DONE;
    const int mode = t->upward ? FE_UPWARD : FE_TONEAREST;
    fesetround(mode);
    feclearexcept(FE_ALL_EXCEPT);
    if (t->small)
        fsm_softmax_small(isa, t->type[FSM_X], t->op == FSM_LOG_SOFTMAX, a[FSM_X].first, a[FSM_OUT].first, row_count(t),
                          row_length(t));
    else {
        fsm_plan *plan;
        status = fsm_plan_new(&plan, &p);
        while (status == FSM_AGAIN) status = fsm_plan_run(plan);
        fsm_plan_free(plan);
    }
    const int kept = fegetround() == mode && !fetestexcept(FE_ALL_EXCEPT);
    fesetround(FE_TONEAREST);
    expect(kept, t, isa, "changed the floating-point mode or flags", 0);
    expect(status == FSM_DONE, t, isa, "did not end", 0);
    expect(take_out(t, &a[FSM_OUT], results), t, isa, "wrote beside out", 0);
    if (t->has[FSM_SIGN]) expect(take_out(t, &a[FSM_SIGN], signs), t, isa, "wrote beside sign", 0);
    for (int o = 0; o < FSM_OUT; o++)
        if (t->has[o] && t->out_at != (fsm_operand)o) expect(is_untouched(&a[o]), t, isa, "wrote to an input", 0);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        if (o != FSM_OUT || t->out_at == FSM_OUT) free_array(&a[o]);
}

/* The same rows, one by one, the simplest way. */
static void run_alone(const test *t, char *results, char *signs) {
    test one = *t;
    memcpy(one.shape, (ptrdiff_t[]){1, 1, 1, row_length(t)}, sizeof one.shape);
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) one.layout[o] = &layouts[0];
    one.out_at = FSM_OUT;
    one.threads = one.spread = 1;
    one.small = one.upward = 0;
    for (ptrdiff_t r = 0; r < row_count(t); r++) {
        one.first = t->first + r;
        run(&one, scalar, results + r * result_bytes(&one), signs + r * result_bytes(&one));
    }
}

/* The results of one row, and what their errors are measured by. A reduction has its sign in value[1]. */
static void evaluate(const test *t, ptrdiff_t r, double *z, double *y, long double *value, long double *unit) {
    const ptrdiff_t n = row_length(t);
    const int single = t->compute == FSM_F32, weighted = t->op == FSM_LOGSUMEXP_WEIGHTED;
    const double scale = t->has[FSM_SCALE] ? stored(t, FSM_SCALE, r, 0) : 1;
    long double m = -INFINITY, sum = 0, all = 0, odd = 0;
    int any_nan = 0;
    for (ptrdiff_t i = 0; i < n; i++) { /* y: 0 where the entry takes no part */
        const double x = stored(t, FSM_X, r, i), bias = t->has[FSM_BIAS] ? stored(t, FSM_BIAS, r, i) : 0;
        const double s = is_backward(t->op) ? 1 : scale;
        z[i] = single ? (double)fmaf((float)x, (float)s, (float)bias) : fma(x, s, bias);
        y[i] = t->has[FSM_Y] ? stored(t, FSM_Y, r, i) : 1;
        if (single) y[i] = (float)y[i];
        if (bias == -INFINITY || (t->has[FSM_WHERE] && stored(t, FSM_WHERE, r, i) == 0)) y[i] = 0;
        if (is_backward(t->op)) {
            const double term = t->op == FSM_SOFTMAX_BACKWARD ? (y[i] == 0 ? 0 : z[i] * y[i]) : y[i] == -INFINITY ? 0 : z[i];
            sum += term;
            all += fabs(term);
        } else if (y[i] != 0) {
            const double term = y[i] * (z[i] - z[i] == 0 ? 1 : z[i] == -INFINITY ? 0 : z[i]);
            if (term - term != 0) odd += term;
            any_nan |= z[i] != z[i];
            if (z[i] > m && (!weighted || z[i] < INFINITY)) m = z[i];
        }
    }
    if (is_backward(t->op)) {
        for (ptrdiff_t i = 0; i < n; i++) {
            const int log = t->op == FSM_LOG_SOFTMAX_BACKWARD;
            const long double p = log ? expl(y[i]) : y[i];
            value[i] = p == 0 ? 0 : log ? scale * (z[i] - p * sum) : scale * (p * (z[i] - sum));
            unit[i] = fabs(scale) * (log ? fabs(z[i]) + p * all : p * (fabs(z[i]) + all));
        }
        return;
    }
    for (ptrdiff_t i = 0; i < n && m - m == 0; i++) {
        const long double e = y[i] != 0 && z[i] - z[i] == 0 ? y[i] * expl(z[i] - m) : 0;
        sum += e;
        all += fabsl(e);
    }
    const long double lse = m - m == 0 ? m + logl(fabsl(sum)) : m;
    if (weighted) {
        value[1] = odd != 0 ? (odd > 0) - (odd < 0) : (sum > 0) - (sum < 0);
        value[0] = odd != 0 ? INFINITY : sum == 0 ? -INFINITY : lse;
        if (odd != odd) value[0] = value[1] = NAN;
        if (value[1] < 0 && !t->has[FSM_SIGN]) value[0] = NAN;
        unit[0] = fmaxl(1, fmaxl(fabsl(m), fabsl(lse))) + all / fabsl(sum);
    } else if (t->op == FSM_LOGSUMEXP) {
        value[0] = any_nan ? NAN : lse;
        unit[0] = fmaxl(1, fmaxl(fabsl(m), fabsl(lse)));
    } else
        for (ptrdiff_t i = 0; i < n; i++) {
            const int log = t->op == FSM_LOG_SOFTMAX;
            if (y[i] == 0) value[i] = log ? -INFINITY : 0;
            else if (any_nan || m - m != 0) value[i] = NAN;
            else value[i] = log ? z[i] - m - logl(sum) : expl(z[i] - m) / sum;
            unit[i] = log ? fmaxl(1, fmaxl(fabsl(m), fabsl(value[i]))) : value[i];
        }
}

static int agrees(const test *t, double got, long double want, long double unit) {
    const fsm_dtype out = t->type[FSM_OUT];
    if (got != got || want != want) return got != got && want != want;
    if (want - want != 0) return got == want;
    if (got - got != 0) return fabsl(want) >= types[out].most && (got > 0) == (want > 0);
    const double computed = types[t->compute].ulp, least = types[out].least + types[t->compute].least;
    return fabsl(got - want) <= 4 * computed * unit + 0.501L * types[out].ulp * fabsl(want) + least;
}

static void check_values(const test *t, const char *results, const char *signs) {
    const fsm_dtype out = t->type[FSM_OUT];
    const ptrdiff_t size = types[out].size, n = row_length(t), count = is_reduction(t->op) ? 1 : n;
    double *z = allocate(2 * n * (ptrdiff_t)sizeof *z);
    long double *value = allocate(2 * (n + 1) * (ptrdiff_t)sizeof *value), *unit = value + n + 1;
    ptrdiff_t wrong = -1;
    char what[80] = "";
    for (ptrdiff_t r = 0; r < row_count(t) && wrong < 0; r++) {
        evaluate(t, t->first + r, z, z + n, value, unit);
        for (ptrdiff_t i = r * count; i < (r + 1) * count && wrong < 0; i++)
            if (!agrees(t, decode(out, results + i * size), value[i - r * count], unit[i - r * count])) {
                snprintf(what, sizeof what, "%.9g for %.9Lg", decode(out, results + i * size), value[i - r * count]);
                wrong = i;
            }
        if (t->has[FSM_SIGN] && wrong < 0 && !agrees(t, decode(out, signs + r * size), value[1], 0)) {
            snprintf(what, sizeof what, "sign %g for %Lg", decode(out, signs + r * size), value[1]);
            wrong = r;
        }
    }
    expect(wrong < 0, t, scalar, what, wrong);
    free(z);
    free(value);
}

static void check(const test *t) {
    const ptrdiff_t bytes = result_bytes(t), all = t->has[FSM_SIGN] ? 2 * bytes : bytes;
    char *want = allocate(all), *got = allocate(all);
    run_alone(t, want, want + bytes);
    check_values(t, want, want + bytes);
    for (int k = 0; k < isa_count; k++) {
        run(t, isas[k], got, got + bytes);
        ptrdiff_t i = 0;
        while (i < all && want[i] == got[i]) i++;
        expect(i == all, t, isas[k], "other bits", i / types[t->type[FSM_OUT]].size);
    }
    free(want);
    free(got);
}

/* ---- the tests ---- */

static test make(fsm_op op, fsm_dtype compute, fsm_dtype x, fsm_dtype out, ptrdiff_t rows, ptrdiff_t n) {
    test t = {.op = op, .compute = compute, .shape = {1, rows, 1, n}, .out_at = FSM_OUT, .threads = 1, .upward = n % 2};
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
        t.type[o] = compute;
        t.layout[o] = &layouts[0];
    }
    t.type[FSM_X] = x;
    t.type[FSM_WHERE] = FSM_U8;
    t.type[FSM_OUT] = t.type[FSM_SIGN] = out;
    t.has[FSM_X] = t.has[FSM_OUT] = 1;
    t.has[FSM_Y] = op >= FSM_LOGSUMEXP_WEIGHTED;
    t.has[FSM_SIGN] = op == FSM_LOGSUMEXP_WEIGHTED;
    return t;
}

/* Adds those operands of a set of bits that the operation takes. */
static test with(test t, int bias, int where, int scale) {
    t.has[FSM_BIAS] = bias && t.op <= FSM_LOGSUMEXP;
    t.has[FSM_WHERE] = where && t.op <= FSM_LOGSUMEXP_WEIGHTED;
    t.has[FSM_SCALE] = scale && t.op != FSM_LOGSUMEXP_WEIGHTED;
    return t;
}

static test laid_out(test t, const layout *in, const layout *fused, const layout *out) {
    const layout *of[] = {in, in, fused, fused, fused, out, out};
    memcpy(t.layout, of, sizeof of);
    return t;
}

static const layout *by_name(const char *name) {
    int k = 0;
    while (strcmp(layouts[k].name, name)) k++;
    return &layouts[k];
}

/* Types of one calculation: compute, x and out. */
static const fsm_dtype usual[][3] = {{FSM_F32, FSM_F32, FSM_F32}, {FSM_F64, FSM_F64, FSM_F64}, {FSM_F32, FSM_F16, FSM_F16},
                                     {FSM_F32, FSM_BF16, FSM_BF16}, {FSM_F32, FSM_F16, FSM_F32}};
static test usual_types(fsm_op op, int k, ptrdiff_t rows, ptrdiff_t n) {
    const fsm_dtype *u = usual[k % LENGTH(usual)];
    return make(op, u[0], u[1], u[2], rows, n);
}

#define EACH_OP(op) for (fsm_op op = 0; op < FSM_OP_COUNT; op++)
#define EACH(k, array) for (int k = 0; k < LENGTH(array); k++)

/* Every length up to 130, and those around the places where something changes: plain, and read through scratch. */
static void lengths(void) {
    static const ptrdiff_t longer[] = {255,  256,  257,  258,  511,   512,   513,   1023,   1024,   1025,
                                       4095, 4096, 4097, 8193, 16383, 16384, 16385, 131071, 131072, 131073};
    EACH_OP(op)
    for (int k = 0; k < 131 + LENGTH(longer) - 1; k++) {
        const ptrdiff_t n = k < 130 ? k + 1 : longer[k - 130];
        EACH(u, usual) {
            if (n > 5000 && u > 1 && u != 2 + (int)n % 3) continue;
            const test t = usual_types(op, u, n < 5000 ? 3 : 1, n);
            check(&t);
            const test masked = with(t, 0, 1, 1);
            check(&masked);
        }
    }
}

/* Short rows lie side by side in groups of lanes. */
static void short_rows(void) {
    static const ptrdiff_t rows[] = {1, 2, 4, 15, 16, 17, 63, 64, 65, 130};
    EACH_OP(op)
    for (ptrdiff_t n = 1; n <= 34; n++)
        EACH(r, rows) {
            const test t = with(usual_types(op, (int)n + r, rows[r], n), 0, r % 4 == 3, 0);
            check(&t);
        }
}

static void dtypes(void) {
    static const ptrdiff_t shapes[][2] = {{3, 37}, {21, 9}};
    EACH_OP(op)
    for (fsm_dtype compute = FSM_F32; compute <= FSM_F64; compute++)
        for (fsm_dtype x = 0; x <= (compute == FSM_F32 ? FSM_F64 : FSM_U64); x++)
            for (fsm_dtype out = 0; out <= FSM_F64; out++)
                EACH(s, shapes)
                for (int fused = 0; fused < 2; fused++) {
                    test t = make(op, compute, x, out, shapes[s][0], shapes[s][1]);
                    t.type[FSM_Y] = t.type[FSM_BIAS] = (x + out + s) % 4;
                    t = with(t, fused, fused, fused);
                    if (fused) t = laid_out(t, by_name("every third"), by_name("unaligned"), by_name("strided axis"));
                    check(&t);
                }
}

static void all_layouts(void) {
    static const ptrdiff_t shapes[][4] = {{3, 5, 2, 7}, {2, 19, 1, 3}, {2, 70, 3, 11}, {3, 1, 4, 75}};
    int k = 0;
    EACH_OP(op) EACH(in, layouts) EACH(out, layouts) EACH(s, shapes) {
        test t = usual_types(op, k++, 1, 1);
        memcpy(t.shape, shapes[s], sizeof t.shape);
        if (k % 3) t = with(t, k % 2, k % 5 < 2, k % 7 < 3);
        t = laid_out(t, &layouts[in], &layouts[k % LENGTH(layouts)], &layouts[out]);
        check(&t);
    }
}

/* Strides of 0, which broadcasting makes, against the same numbers written out. */
static void zero_strides(void) {
    static const ptrdiff_t shapes[][4] = {{3, 5, 2, 7}, {2, 19, 1, 3}, {3, 2, 4, 75}};
    EACH_OP(op) EACH(s, shapes)
    for (int still = 0; still < 4 * 4 * 4 * 2; still++) {
        test t = usual_types(op, still / 3, 1, 1);
        memcpy(t.shape, shapes[s], sizeof t.shape);
        t = with(t, 1, 1, still % 3);
        t.still[FSM_X] = still % 4;
        t.still[FSM_Y] = t.still[FSM_BIAS] = still / 4 % 4;
        t.still[FSM_WHERE] = still / 16 % 4;
        t.still[FSM_SCALE] = still / 64;
        if (still % 5 > 2) t = laid_out(t, by_name("axis in the middle"), by_name("strided axis"), by_name("padded"));
        check(&t);
    }
}

/* bias, where and scale, present or not, in place or not. */
static void operands(void) {
    static const ptrdiff_t shapes[][2] = {{5, 1}, {3, 33}, {18, 20}, {2, 1500}};
    EACH_OP(op) EACH(s, shapes) EACH(u, usual)
    for (int set = 0; set < 32; set++) {
        test t = with(usual_types(op, u, shapes[s][0], shapes[s][1]), set & 1, set & 2, set & 4);
        if (set & 8) t = laid_out(t, by_name("strided axis"), by_name("axis reversed"), by_name("strided axis"));
        if (set & 16 && t.type[FSM_X] == t.type[FSM_OUT] && !is_reduction(op)) t.out_at = FSM_X;
        if (set & 1 && t.type[FSM_Y] == t.type[FSM_OUT] && is_backward(op)) t.out_at = FSM_Y;
        if (set & 1) t.has[FSM_SIGN] = 0;
        check(&t);
    }
}

static void special_rows(void) {
    static const ptrdiff_t lengths[] = {1, 2, 5, 17, 40, 300, 1100};
    EACH_OP(op) EACH(k, lengths) EACH(u, usual)
    for (int set = 0; set < 16; set++) {
        test t = with(usual_types(op, u, 20, lengths[k]), set & 1, set & 2, set & 4);
        if (set & 8) t = laid_out(t, by_name("strided axis"), by_name("strided axis"), by_name("unaligned"));
        t.special = 1;
        t.has[FSM_SIGN] = t.has[FSM_SIGN] && set & 4;
        check(&t);
    }
    for (int first = 0; first < 9; first++) { /* the passes over a row that is read in chunks */
        test t = with(usual_types(first % 2 ? FSM_SOFTMAX : FSM_LOG_SOFTMAX, 0, 1, (1 << 18) + 5), 0, 1, 0);
        t.special = 1;
        t.first = first;
        check(&t);
    }
}

/* 1 to 130 columns side by side. */
static void lanes(void) {
    static const ptrdiff_t lengths[] = {1, 2, 31, 33, 70};
    EACH_OP(op) EACH(k, lengths)
    for (ptrdiff_t columns = 1; columns <= 130; columns++) {
        test t = with(usual_types(op, (int)columns + k, columns, lengths[k]), 0, columns % 3 == 0, columns % 5 == 0);
        t = laid_out(t, by_name("strided axis"), by_name("strided axis"), by_name("strided axis"));
        check(&t);
    }
}

/* Rows dealt to threads, and parts of rows: contiguous, masked, as columns. */
static void threads(void) {
    static const ptrdiff_t shapes[][2] = {{300, 300}, {3000, 21}, {1, 70000}, {3, 24000}, {18, 9000}, {130, 520}};
    EACH_OP(op) EACH(s, shapes)
    for (int n = 1; n <= 4; n++) {
        test t = with(usual_types(op, s + n, shapes[s][0], shapes[s][1]), 0, n == 2, n == 3);
        if (n > 2) t = laid_out(t, by_name("strided axis"), by_name("strided axis"), by_name("strided axis"));
        t.threads = n;
        check(&t);
    }
}

/* Rows of more than 2^18 elements, whole slices of them. */
static void wide(void) {
    EACH_OP(op)
    for (int k = 0; k < 4; k++) {
        test t = usual_types(op, k, 1, (1 << 18) + 1);
        if (k == 1) t.shape[3] = op == FSM_LOGSUMEXP_WEIGHTED ? (1 << 20) + 3 : t.shape[3];
        if (k == 2) t = with(t, 1, 0, 1);
        if (k == 3) {
            memcpy(t.shape, (ptrdiff_t[]){1, 5, 3, 20001}, sizeof t.shape);
            t = laid_out(t, by_name("strided axis"), by_name("padded"), by_name("axis transposed"));
        }
        t.threads = 1 + k % 3;
        check(&t);
    }
}

static void small(void) {
    static const ptrdiff_t rows[] = {1, 3, 4, 17, 65};
    for (fsm_dtype type = FSM_F16; type <= FSM_F64; type++)
        for (ptrdiff_t n = 1; n <= 1030; n += n < 70 ? 1 : 60)
            EACH(r, rows) {
                test t = make((n + r) % 2 ? FSM_SOFTMAX : FSM_LOG_SOFTMAX, type == FSM_F64 ? FSM_F64 : FSM_F32, type, type, rows[r], n);
                t.small = 1;
                t.out_at = n % 3 ? FSM_OUT : FSM_X;
                t.special = n % 5 == 0;
                check(&t);
            }
}

/* Calls from several threads, each of which may start more. */
static void *one_caller(void *number) {
    const int k = (int)(intptr_t)number;
    EACH_OP(op)
    for (int i = 0; i < 60; i++) {
        static const ptrdiff_t shapes[][2] = {{7, 50}, {130, 9}, {200, 400}};
        test t = with(usual_types(op, i + k, shapes[i % 3][0] + k, shapes[i % 3][1]), i % 2, i % 4 == 2, i % 5 == 1);
        if (i % 7 > 4) t = laid_out(t, by_name("strided axis"), by_name("padded"), by_name("unaligned"));
        t.threads = 1 + i / 3 % 3;
        check(&t);
    }
    return NULL;
}

static void callers(void) {
    pthread_t callers[4];
    EACH(k, callers) if (pthread_create(&callers[k], NULL, one_caller, (void *)(intptr_t)k)) abort();
    EACH(k, callers) pthread_join(callers[k], NULL);
}

/* The internal exp, in exactly as many elements as there are. */
static void exponentials(void) {
    for (fsm_dtype type = FSM_F32; type <= FSM_F64; type++)
        for (ptrdiff_t n = 1; n <= 260; n++)
            for (int k = 0; k < isa_count; k++) {
                test t = make(FSM_SOFTMAX, type, type, type, 1, n);
                array x = new_array(&t, FSM_X), y = new_array(&t, FSM_OUT);
                char *got = allocate(result_bytes(&t));
                for (ptrdiff_t i = 0; i < n; i++) encode(type, -fabs(value(&t, FSM_X, 0, i)), x.first + offset_of(&t, &x, 0, i));
                if (type == FSM_F32) fsm_exp_f32(isas[k], (float *)y.first, (float *)x.first, n);
                else fsm_exp_f64(isas[k], (double *)y.first, (double *)x.first, n);
                expect(take_out(&t, &y, got), &t, isas[k], "exp wrote beside out", 0);
                ptrdiff_t wrong = -1;
                for (ptrdiff_t i = 0; i < n; i++) {
                    const long double e = expl(decode(type, x.first + offset_of(&t, &x, 0, i)));
                    if (!agrees(&t, decode(type, got + i * types[type].size), e, e)) wrong = i;
                }
                expect(wrong < 0, &t, isas[k], "exp is wrong", wrong);
                free_array(&x);
                free_array(&y);
                free(got);
            }
}

/* What has no elements is done at once; a plan may be given up; the numbers of CPUs and threads make sense. */
static void odds_and_ends(void) {
    EACH_OP(op)
    for (int k = 0; k < isa_count; k++) {
        const test t = make(op, FSM_F32, FSM_F32, FSM_F32, 3, 5);
        fsm_problem p = {.op = op, .compute = FSM_F32, .ndim = 2, .threads = 2, .isa = isas[k], .reduced = {0, 1}};
        fsm_plan *plan = (fsm_plan *)&p;
        for (int set = 0; set < 3; set++) {
            memcpy(p.shape, (ptrdiff_t[][2]){{0, 5}, {3, 0}, {0, 0}}[set], 2 * sizeof *p.shape);
            expect(fsm_plan_new(&plan, &p) == FSM_DONE && !plan, &t, isas[k], "a plan for nothing", set);
        }
        memcpy(p.shape, (ptrdiff_t[]){1, 1 << 19}, 2 * sizeof *p.shape);
        float *data = calloc(1 << 19, sizeof *data);
        for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
            if (t.has[o]) p.operand[o] = (fsm_array){(char *)data, FSM_F32, {0, is_reduction(op) && o >= FSM_OUT ? 0 : 4}};
        }
        const fsm_status first = fsm_plan_new(&plan, &p), second = fsm_plan_run(plan);
        expect(first == FSM_AGAIN && second == FSM_AGAIN, &t, isas[k], "no slices", 0);
        fsm_plan_free(plan);
        free(data);
    }
    const test t = make(FSM_SOFTMAX, FSM_F32, FSM_F32, FSM_F32, 1, 1);
    expect(fsm_usable_cpus() >= 1 && fsm_openmp_limit() >= 1, &t, scalar, "no threads", 0);
    expect(fsm_is_small(1) && !fsm_is_small(1 << 24) && !fsm_isa_at(-1) && !fsm_isa_at(99), &t, scalar, "limits", 0);
}

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {{"lengths", lengths},       {"short rows", short_rows},     {"dtypes", dtypes},   {"layouts", all_layouts},
              {"zero strides", zero_strides}, {"operands", operands},     {"special rows", special_rows}, {"lanes", lanes},
              {"threads", threads},       {"wide rows", wide},            {"small", small},     {"callers", callers},
              {"exp", exponentials},      {"odds and ends", odds_and_ends}};

int main(int argc, char **argv) {
    for (int i = 0; fsm_isa_at(i); i++) {
        scalar = fsm_isa_at(i); /* the last one is always there */
        int chosen = argc == 1;
        for (int k = 1; k < argc; k++) chosen |= !strcmp(argv[k], fsm_isa_name(scalar));
        if (chosen) isas[isa_count++] = scalar;
    }
    if (isa_count < argc - 1) {
        fprintf(stderr, "usage: %s [ISA...]; this CPU has", argv[0]);
        for (int i = 0; fsm_isa_at(i); i++) fprintf(stderr, " %s", fsm_isa_name(fsm_isa_at(i)));
        fputs("\n", stderr);
        return 2;
    }
    EACH(g, groups) {
        const long p = passed, f = failed;
        const clock_t start = clock();
        groups[g].run();
        printf("%-14s %8ld passed, %ld failed, %.1f s\n", groups[g].name, passed - p, failed - f,
               (double)(clock() - start) / CLOCKS_PER_SEC);
        fflush(stdout);
    }
    printf("%ld passed, %ld failed\n", (long)passed, (long)failed);
    return failed != 0;
}
