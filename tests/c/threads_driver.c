/* Many threads that call the library at once, on the same inputs: the results are those of one alone.
 *
 * It is made for ThreadSanitizer (`make tsan`), which tells of what two threads touch unordered. The
 * calls are the few that share anything: teams of threads, plans dealt to them in every way, and
 * results that are merged. What they compute is the business of the other drivers. */
#pragma GCC diagnostic ignored "-Wunused-function" /* it needs little of the harness */
#include "harness.h"

enum { CALLERS = 6, ROUNDS = 4, MOST_THREADS = 3, ELEMENTS = 1 << 17 };

static float input[ELEMENTS], weights[ELEMENTS]; /* read by all */
static const fsm_isa *isa;

typedef fsm_status (*call)(int threads, float *out);

/* ---- calls: each fills `out`, of ELEMENTS ---- */

static fsm_problem problem_of(fsm_op op, int threads, float *out, ptrdiff_t rows, ptrdiff_t n) {
    fsm_problem p;
    fsm_describe_rows(&p, op, FSM_F32, input, 4 * n, 4, out, 4 * n, 4, rows, n);
    p.isa = isa;
    p.threads = threads;
    return p;
}

static fsm_status rows(int threads, float *out) {
    const fsm_problem p = problem_of(FSM_SOFTMAX, threads, out, 1024, 128);
    return fsm_compute_softmax(&p);
}

static fsm_status one_row(int threads, float *out) { /* dealt chunk by chunk, sums merged */
    const fsm_problem p = problem_of(FSM_LOG_SOFTMAX, threads, out, 1, ELEMENTS);
    return fsm_compute_softmax(&p);
}

static fsm_status columns(int threads, float *out) {
    fsm_problem p = problem_of(FSM_SOFTMAX, threads, out, 512, 256);
    p.reduced[0] = 1;
    p.reduced[1] = 0;
    return fsm_compute_softmax(&p);
}

static fsm_status fused(int threads, float *out) {
    fsm_problem p = problem_of(FSM_SOFTMAX, threads, out, 512, 256);
    p.operand[FSM_BIAS] = (fsm_array){(char *)weights, FSM_F32, {0, 4}};
    return fsm_compute_softmax(&p);
}

static fsm_status backward(int threads, float *out) {
    fsm_problem p = problem_of(FSM_SOFTMAX_BACKWARD, threads, out, 512, 256);
    p.operand[FSM_Y] = (fsm_array){(char *)weights, FSM_F32, {1024, 4}};
    return fsm_compute_softmax(&p);
}

/* 8 heads over 4 of the keys and values, in the first quarter of the input. */
static fsm_attention attention_of(int threads, float *out, ptrdiff_t queries) {
    enum { HEADS = 8, KV_HEADS = 4, KEYS = 1024, DEPTH = 8 };
    fsm_attention a = {.compute = FSM_F32,
                       .threads = threads,
                       .isa = isa,
                       .heads = HEADS,
                       .kv_heads = KV_HEADS,
                       .queries = queries,
                       .keys = KEYS,
                       .depth = DEPTH,
                       .v_depth = DEPTH,
                       .scale = 0.5,
                       .left = -1,
                       .right = -1};
    const fsm_array q = {(char *)weights, FSM_F32, {4 * queries * DEPTH, 4 * DEPTH, 4}};
    const fsm_array k = {(char *)input, FSM_F32, {4 * KEYS * DEPTH, 4 * DEPTH, 4}};
    a.operand[FSM_ATTN_Q] = a.operand[FSM_ATTN_OUT] = a.operand[FSM_ATTN_GRAD_OUT] = q;
    a.operand[FSM_ATTN_K] = a.operand[FSM_ATTN_V] = k;
    a.operand[FSM_ATTN_OUT].data = (char *)out;
    return a;
}

static fsm_status many_queries(int threads, float *out) {
    const fsm_attention a = attention_of(threads, out, 300);
    return fsm_compute_attention(&a);
}

static fsm_status one_query(int threads, float *out) { /* parts of the keys, merged */
    const fsm_attention a = attention_of(threads, out, 1);
    return fsm_compute_attention(&a);
}

static fsm_status packed(int threads, float *out) {
    static const int64_t q_starts[] = {0, 1, 200, 300}, k_starts[] = {0, 700, 701, 1024};
    fsm_attention a = attention_of(threads, out, 300);
    fsm_attention_plan *plan;
    a.ndim = 1;
    a.shape[0] = 3;
    for (int o = 0; o < FSM_ATTN_COUNT; o++) {
        ptrdiff_t *stride = a.operand[o].strides;
        memmove(stride + 1, stride, 3 * sizeof *stride);
        stride[0] = 0;
    }
    a.queries = 199;
    a.keys = 700;
    fsm_status status = fsm_attention_packed_new(&plan, &a, q_starts, k_starts);
    while (status == FSM_AGAIN) status = fsm_attention_run(plan);
    fsm_attention_free(plan);
    return status;
}

/* dk and dv, and of one number of bias for all: what pieces add to together. */
static fsm_status gradients_of(int threads, float *out, int biased) {
    enum { QUERIES = 300, Q_SIZE = 8 * QUERIES * 8, K_SIZE = 4 * 1024 * 8 };
    fsm_attention a = attention_of(threads, weights, QUERIES);
    fsm_attention_backward_plan *plan;
    memset(out, 0, ELEMENTS * sizeof *out);
    a.operand[FSM_ATTN_LSE] = (fsm_array){(char *)weights, FSM_F32, {4 * QUERIES, 4}};
    a.operand[FSM_ATTN_DQ] = a.operand[FSM_ATTN_Q];
    a.operand[FSM_ATTN_DK] = a.operand[FSM_ATTN_DV] = a.operand[FSM_ATTN_K];
    a.operand[FSM_ATTN_DQ].data = (char *)out;
    a.operand[FSM_ATTN_DK].data = (char *)(out + Q_SIZE);
    a.operand[FSM_ATTN_DV].data = (char *)(out + Q_SIZE + K_SIZE);
    if (biased) {
        a.operand[FSM_ATTN_BIAS] = (fsm_array){(char *)weights, FSM_F32, {0}};
        a.operand[FSM_ATTN_DBIAS] = (fsm_array){(char *)(out + Q_SIZE + 2 * K_SIZE), FSM_F64, {0}};
    }
    fsm_status status = fsm_attention_backward_new(&plan, &a);
    while (status == FSM_AGAIN) status = fsm_attention_backward_run(plan);
    fsm_attention_backward_free(plan);
    return status;
}

static fsm_status gradients(int threads, float *out) { return gradients_of(threads, out, 0); }

static fsm_status gradient_of_bias(int threads, float *out) {
    return gradients_of(threads, out, 1);
}

static const struct {
    const char *name;
    call call;
} calls[] = {{"rows", rows},           {"one row", one_row},
             {"columns", columns},     {"fused", fused},
             {"backward", backward},   {"attention", many_queries},
             {"decode", one_query},    {"packed", packed},
             {"gradients", gradients}, {"gradient of bias", gradient_of_bias}};

/* ---- at once ---- */

static float *want[COUNT(calls)];

static void *caller(void *number) {
    const int me = *(const int *)number;
    float *out = allocate(sizeof input);
    for (int i = 0; i < ROUNDS * COUNT(calls); i++) {
        const int c = (i + 2 * me) % COUNT(calls), threads = 1 + (i + me) % MOST_THREADS;
        memset(out, 0xff, sizeof input);
        const int done = calls[c].call(threads, out) == FSM_DONE;
        if (tell(done && memcmp(out, want[c], sizeof input) == 0))
            printf("%s: %s on %d threads: other bits than alone\n", fsm_isa_name(isa),
                   calls[c].name, threads);
    }
    free(out);
    return NULL;
}

int main(int argc, char **argv) {
    choose_isas(argc, argv, "amx");
    for (int i = 0; i < ELEMENTS; i++) {
        input[i] = (float)(mix((uint64_t)i) >> 40) * 0x1p-22f;
        weights[i] = (float)(mix((uint64_t)i + ELEMENTS) >> 40) * 0x1p-24f;
    }
    for (int k = 0; k < isa_count; k++) {
        const long good = passed, bad = failed;
        const time_t start = time(NULL);
        isa = isas[k];
        for (int c = 0; c < COUNT(calls); c++) {
            want[c] = memset(allocate(sizeof input), 0xff, sizeof input);
            if (calls[c].call(1, want[c]) != FSM_DONE) abort();
        }
        pthread_t thread[CALLERS];
        int number[CALLERS];
        for (int i = 0; i < CALLERS; i++) {
            number[i] = i;
            if (pthread_create(&thread[i], NULL, caller, &number[i])) abort();
        }
        for (int i = 0; i < CALLERS; i++) pthread_join(thread[i], NULL);
        for (int c = 0; c < COUNT(calls); c++) free(want[c]);
        report(fsm_isa_name(isa), good, bad, start);
    }
    return total();
}
