/* fastsoftmax: exact-sum softmax on the CPU. The C API, and the only header that the Python binding
 * includes.
 *
 * A caller describes its arrays in an fsm_problem, makes a plan of it, and runs the plan until it
 * is done:
 *
 *     fsm_plan *plan;
 *     fsm_status s = fsm_plan_new(&plan, &problem);
 *     while (s == FSM_AGAIN) s = fsm_plan_run(plan);     // each call: a slice of some milliseconds
 *     fsm_plan_free(plan);
 *
 * Small contiguous work has a shorter way, without plan or heap: fsm_softmax_small. Nothing here
 * checks types or shapes beyond what is stated: the caller (_core.pyx) owns the semantics. Every
 * function may be called from any thread; a plan belongs to one thread at a time. */
#ifndef FASTSOFTMAX_H
#define FASTSOFTMAX_H

#include <stddef.h>
#include <stdint.h>

enum { FSM_MAX_NDIM = 64 };

/* Element types. All may be an input; outputs are the four floating types. */
typedef enum {
    FSM_F16,
    FSM_BF16,
    FSM_F32,
    FSM_F64,
    FSM_I8,
    FSM_I16,
    FSM_I32,
    FSM_I64,
    FSM_U8, /* also bool */
    FSM_U16,
    FSM_U32,
    FSM_U64
} fsm_dtype;

typedef enum {
    FSM_SOFTMAX,            /* out = exp(z - lse(z)),            z = fma(x, scale, bias)          */
    FSM_LOG_SOFTMAX,        /* out = z - lse(z)                                                   */
    FSM_LOGSUMEXP,          /* out = lse(z), one value per row                                    */
    FSM_LOGSUMEXP_WEIGHTED, /* out = log|sum(y exp(x))|, sign = its sign; y == 0 takes no part    */
    FSM_SOFTMAX_BACKWARD,   /* out = scale * y * (x - sum(x y));  x is the gradient               */
    FSM_LOG_SOFTMAX_BACKWARD, /* out = scale * (x - exp(y) sum(x)) */
    FSM_OP_COUNT
} fsm_op;

typedef enum {
    FSM_DONE = 0,
    FSM_AGAIN = 1,  /* a slice is done, more is left */
    FSM_NOMEM = -1, /* scratch could not be had; nothing was written */
} fsm_status;

/* The operands of a problem. Those that are absent have data == NULL. */
typedef enum {
    FSM_X,     /* the logits, or the gradient of a backward pass */
    FSM_Y,     /* backward: the output of the forward pass; weighted logsumexp: the weights */
    FSM_BIAS,  /* added to the scaled logits; an entry of -inf takes no part */
    FSM_WHERE, /* bytes, 0 = the entry takes no part */
    FSM_SCALE, /* 1/temperature, in the compute type, stride 0 along the axis; absent = 1 */
    FSM_OUT,   /* reductions: stride 0 along the axis */
    FSM_SIGN,  /* weighted logsumexp only, may be absent; same dtype as OUT */
    FSM_OPERAND_COUNT
} fsm_operand;

typedef struct fsm_isa fsm_isa; /* the kernels of one instruction set */

typedef struct {
    char *data; /* the element (0, ..., 0); any alignment */
    fsm_dtype dtype;
    ptrdiff_t strides[FSM_MAX_NDIM]; /* in bytes; negative and 0 are fine; 0 where broadcast */
} fsm_array;

typedef struct {
    fsm_op op;
    fsm_dtype compute; /* FSM_F32 or FSM_F64 */
    int ndim;
    int threads; /* at most so many; small work uses fewer */
    const fsm_isa *isa;
    ptrdiff_t shape[FSM_MAX_NDIM];
    unsigned char reduced[FSM_MAX_NDIM]; /* 1: this dimension belongs to the softmax axis */
    fsm_array operand[FSM_OPERAND_COUNT];
} fsm_problem;

typedef struct fsm_plan fsm_plan;

/* FSM_AGAIN: *plan is ready to run. FSM_DONE: nothing to compute, *plan is NULL. FSM_NOMEM: *plan
 * is NULL. */
fsm_status fsm_plan_new(fsm_plan **plan, const fsm_problem *problem);
fsm_status fsm_plan_run(fsm_plan *plan);
void fsm_plan_free(fsm_plan *plan);

/* `rows` rows of n >= 1 elements, C-contiguous, x and out of one floating dtype, out == x or
 * disjoint from it: softmax (log == 0) or log_softmax (log == 1) on this thread, without a plan or
 * heap. rows * n should be small (see fsm_is_small). */
void fsm_softmax_small(const fsm_isa *isa, fsm_dtype dtype, int log, const void *x, void *out,
                       ptrdiff_t rows, ptrdiff_t n);
int fsm_is_small(ptrdiff_t elements); /* true: no second thread would be woken for so many */

/* ---- attention ---- */

/* The operands of an attention problem, and what follows the leading dimensions in their strides. Those
 * that are absent have data == NULL. */
typedef enum {
    FSM_ATTN_Q,       /* head, query, column */
    FSM_ATTN_K,       /* KV head, key, column */
    FSM_ATTN_V,       /* KV head, key, column */
    FSM_ATTN_MASK,    /* head, query, key; bytes, 0 = not visible */
    FSM_ATTN_BIAS,    /* head, query, key; added to the score, -inf = not visible */
    FSM_ATTN_OFFSET,  /* none; int64: query i stands at i + offset; |offset| <= 2^61 */
    FSM_ATTN_LENGTHS, /* none; int64: keys from there on are not visible */
    FSM_ATTN_SINKS,   /* head; compute type: one more logit, in the denominator only */
    FSM_ATTN_SLOPES,  /* head; compute type: slope * |position - key| is subtracted */
    FSM_ATTN_OUT,     /* head, query, column; the dtype of q */
    FSM_ATTN_LSE,     /* head, query; compute type, may be absent */
    FSM_ATTN_WEIGHTS, /* head, query, key; the dtype of q, may be absent */
    FSM_ATTN_COUNT
} fsm_attention_operand;

typedef struct {
    fsm_dtype compute; /* FSM_F32 or FSM_F64 */
    int ndim;          /* of the leading dimensions; at most FSM_MAX_NDIM - 3 */
    int threads;
    const fsm_isa *isa;
    ptrdiff_t shape[FSM_MAX_NDIM];
    ptrdiff_t heads, kv_heads, queries, keys, depth, v_depth; /* kv_heads divides heads */
    fsm_array operand[FSM_ATTN_COUNT]; /* strides: leading dimensions, then three as above */
    double scale, softcap;             /* finite; softcap 0 = none */
    int causal;
    ptrdiff_t left, right; /* the window: p - left <= key <= p + right; -1 = open */
} fsm_attention;

typedef struct fsm_attention_plan fsm_attention_plan;

/* As fsm_plan_new, _run and _free. */
fsm_status fsm_attention_new(fsm_attention_plan **plan, const fsm_attention *problem);
fsm_status fsm_attention_run(fsm_attention_plan *plan);
void fsm_attention_free(fsm_attention_plan *plan);

/* The same over packed sequences, shape[0] of them, ndim being 1: sequence i has the queries
 * q_starts[i] to q_starts[i + 1] of Q, OUT and LSE and the keys k_starts[i] to k_starts[i + 1] of K
 * and V, whose leading strides are 0. `queries` and `keys` are those of the longest; MASK and BIAS
 * count from the first query and key of each sequence, and WEIGHTS is absent. */
fsm_status fsm_attention_packed_new(fsm_attention_plan **plan, const fsm_attention *problem,
                                    const int64_t *q_starts, const int64_t *k_starts);

/* Attention over two sets of keys from the results for each: rows of `columns` elements with a
 * log-sum-exp each. Operands, all with strides [dimensions of the rows..., column]: */
typedef enum {
    FSM_MERGE_OUT_A,
    FSM_MERGE_LSE_A, /* compute type; its column stride is not looked at */
    FSM_MERGE_OUT_B,
    FSM_MERGE_LSE_B,
    FSM_MERGE_OUT,
    FSM_MERGE_LSE,
    FSM_MERGE_COUNT
} fsm_merge_operand;

typedef struct {
    fsm_dtype compute;
    int ndim; /* of the rows */
    int threads;
    const fsm_isa *isa;
    ptrdiff_t shape[FSM_MAX_NDIM], columns;
    fsm_array operand[FSM_MERGE_COUNT];
} fsm_merge;

void fsm_merge_attention(const fsm_merge *problem);

/* ---- what there is ---- */

/* ISAs, best first. fsm_isa_at(i) is NULL past the end; only those that this CPU can run are
 * listed. */
const fsm_isa *fsm_isa_at(int i);
const char *fsm_isa_name(const fsm_isa *isa);
void fsm_exp_f32(const fsm_isa *isa, float *out, const float *x,
                 ptrdiff_t n); /* the internal exp, x <= 0 */
void fsm_exp_f64(const fsm_isa *isa, double *out, const double *x, ptrdiff_t n); /* for its tests */

/* Threads. */
int fsm_usable_cpus(void); /* min(affinity, cgroup quota), at least 1 */
int fsm_has_openmp(void);
int fsm_openmp_limit(void); /* an OpenMP limit lowered since the library was loaded, else INT_MAX */

#endif
