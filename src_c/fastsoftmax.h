/* fastsoftmax: exact-sum softmax and attention on the CPU. The C API, and the only header that the
 * Python binding includes.
 *
 * A caller describes its arrays in an fsm_problem, makes a plan of it, and runs the plan until it
 * is done:
 *
 *     fsm_plan *plan;
 *     fsm_status s = fsm_plan_new(&plan, &problem);
 *     while (s == FSM_AGAIN) s = fsm_plan_run(plan);     // each call: a slice of some milliseconds
 *     fsm_plan_free(plan);
 *
 * fsm_compute_softmax does just that; fsm_softmax_rows and fsm_attention_heads spare the caller the
 * description, too, and are what most programs want ("in one call", below).
 *
 * Types and shapes   Nothing here checks them beyond what is stated: the caller owns the semantics
 *                    (in Python, _core.pyx). What the results are, also for NaN, infinities and
 *                    what takes no part, is what the Python functions document.
 * Memory             Arrays belong to the caller and are read and written where they lie, at any
 *                    alignment; inputs are never written. A problem is copied into its plan and may
 *                    go once the plan is made; its arrays must stay until the plan is done. A plan
 *                    is one block of malloc, until its _free.
 * Threads            Every function may be called from any thread, with or without Python's lock; a
 *                    plan belongs to one thread at a time. `threads` is how many a call may use at
 *                    the most, its own included, at least 1. Callers that run at once share the
 *                    CPUs; where no thread can be started a call computes alone.
 * Floating point     Callers may have any rounding mode and any flags: the default mode is set while
 *                    kernels run, and afterwards both are as they were. Making a plan of attention
 *                    may raise flags.
 * Errors             An fsm_status below 0. There is no other way out: nothing is printed, no signal
 *                    raised, no exception set.
 *
 * The extension module fastsoftmax._core hides these symbols. Others, in Cython or C, get pointers
 * to some of the functions from it ("from other extension modules", at the end). */
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
    FSM_CROSS_ENTROPY,        /* out = lse(x) - x[label], one value per row; 0 if it is ignored  */
    FSM_CROSS_ENTROPY_BACKWARD, /* out = grad * (softmax(x) - onehot(label)); 0 likewise           */
    FSM_OP_COUNT
} fsm_op;

typedef enum {
    FSM_DONE = 0,
    FSM_AGAIN = 1,    /* a slice is done, more is left */
    FSM_NOMEM = -1,   /* scratch could not be had; nothing was written */
    FSM_INVALID = -2, /* an argument is out of range; nothing was written */
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
    FSM_LABEL, /* cross entropy; int64, aligned, stride 0 along the axis; below 0: row ignored */
    FSM_GRAD,  /* cross entropy, backward; compute type, stride 0 along the axis */
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
    fsm_dtype compute; /* FSM_F32 or FSM_F64: not narrower than X, OUT, Y of a gradient; FSM_F64 if
                          one of X, Y and BIAS has integers, or a row 2^41 elements */
    int ndim;          /* 0 to FSM_MAX_NDIM */
    int threads;       /* at most so many; small work uses fewer */
    const fsm_isa *isa;
    ptrdiff_t shape[FSM_MAX_NDIM];
    unsigned char reduced[FSM_MAX_NDIM];  /* 1: this dimension belongs to the softmax axis */
    fsm_array operand[FSM_OPERAND_COUNT]; /* of this shape; OUT may be X or Y, with its strides and
                                             dtype, and must share no other memory with an input */
} fsm_problem;

typedef struct fsm_plan fsm_plan;

/* Makes a plan of a problem. FSM_AGAIN: *plan is ready to run. FSM_DONE: there is nothing to
 * compute, *plan is NULL; that is so, too, for reductions of rows of length 0, which write nothing.
 * FSM_NOMEM: *plan is NULL. */
fsm_status fsm_plan_new(fsm_plan **plan, const fsm_problem *problem);

/* Does a slice of the work. FSM_AGAIN: call it again; FSM_DONE: the results are there, and the plan
 * is of no more use. */
fsm_status fsm_plan_run(fsm_plan *plan);

/* Frees a plan, done or not; NULL is fine. Of a plan that is not done the results are unspecified. */
void fsm_plan_free(fsm_plan *plan);

/* `rows` rows of n >= 1 elements, C-contiguous, x and out of one floating dtype, out == x or
 * disjoint from it: softmax (log == 0) or log_softmax (log == 1) on this thread, without a plan or
 * heap. rows * n should be small (see fsm_is_small). */
void fsm_softmax_small(const fsm_isa *isa, fsm_dtype dtype, int log, const void *x, void *out,
                       ptrdiff_t rows, ptrdiff_t n);
int fsm_is_small(ptrdiff_t elements); /* true: no second thread would be woken for so many */

/* ---- parts of rows ---- */

/* A part of each of some rows, C-contiguous; the rest of the rows lies elsewhere. For each part
 * fsm_parts_sum writes FSM_PARTS integers; those of all parts of a row, added up, are what
 * fsm_parts_map makes the results of a part of: those of the whole row in one call, to the bit. */
enum { FSM_PARTS = 5 };

typedef struct {
    fsm_op op;                             /* FSM_SOFTMAX, FSM_LOG_SOFTMAX or FSM_LOGSUMEXP */
    fsm_dtype compute, x_dtype, out_dtype; /* x is float64 if compute is, and only then */
    const fsm_isa *isa;
    int threads;
    ptrdiff_t rows, n, whole; /* n: elements of a part; whole: of a row */
    const void *x;            /* [rows, n] */
    const void *max;          /* [rows], of the whole rows, in the compute type; NaN if one is */
    int64_t *sums;            /* [rows, FSM_PARTS]; max and sums are aligned */
    void *out;                /* [rows, n], of FSM_LOGSUMEXP [rows], for which map reads no x */
} fsm_parts;

void fsm_parts_sum(const fsm_parts *parts);
void fsm_parts_map(const fsm_parts *parts);

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
    /* of fsm_attention_backward only; what begins with D is added to, not overwritten */
    FSM_ATTN_GRAD_OUT, /* head, query, column; the dtype of q */
    FSM_ATTN_DQ,       /* head, query, column; compute type, columns contiguous */
    FSM_ATTN_DK,       /* KV head, key, column; likewise */
    FSM_ATTN_DV,       /* KV head, key, column; likewise */
    FSM_ATTN_DBIAS,    /* head, query, key; float64, aligned, may be absent */
    FSM_ATTN_DSINKS,   /* head; likewise */
    FSM_ATTN_COUNT
} fsm_attention_operand;

typedef struct {
    fsm_dtype compute; /* FSM_F32 or FSM_F64, and this if BIAS has integers */
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

/* As fsm_plan_new, _run and _free. If there are no keys, or none that a query sees, its result is 0.
 * OUT, LSE and WEIGHTS share no memory with an input or each other. */
fsm_status fsm_attention_new(fsm_attention_plan **plan, const fsm_attention *problem);
fsm_status fsm_attention_run(fsm_attention_plan *plan);
void fsm_attention_free(fsm_attention_plan *plan);

/* The same over packed sequences, shape[0] of them, ndim being 1: sequence i has the queries
 * q_starts[i] to q_starts[i + 1] of Q, OUT and LSE and the keys k_starts[i] to k_starts[i + 1] of K
 * and V, whose leading strides are 0. `queries` and `keys` are those of the longest; MASK and BIAS
 * count from the first query and key of each sequence, and WEIGHTS is absent. */
fsm_status fsm_attention_packed_new(fsm_attention_plan **plan, const fsm_attention *problem,
                                    const int64_t *q_starts, const int64_t *k_starts);

/* The gradients of attention with respect to q, k, v, bias and sinks, from that with respect to
 * OUT. OUT and LSE are those of the forward pass, and read; WEIGHTS is not looked at. What is added
 * to may have strides of 0 where it is broadcast, and its arrays share no memory with others. As
 * fsm_plan_new, _run and _free. */
typedef struct fsm_attention_backward_plan fsm_attention_backward_plan;

fsm_status fsm_attention_backward_new(fsm_attention_backward_plan **plan,
                                      const fsm_attention *problem);
fsm_status fsm_attention_backward_run(fsm_attention_backward_plan *plan);
void fsm_attention_backward_free(fsm_attention_backward_plan *plan);

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

/* A slice of the rows, from `begin` on. Returns where the next one begins, -1 if all is done. It takes
 * no memory and cannot fail. OUT and LSE share no memory with an input. */
ptrdiff_t fsm_merge_attention(const fsm_merge *problem, ptrdiff_t begin);

/* ---- in one call ---- */

/* Run a problem to its end: FSM_DONE or FSM_NOMEM. Its isa may be NULL: the best of this CPU; with a
 * pointer that fastsoftmax._core gave: the one that Python uses (FASTSOFTMAX_ISA). */
fsm_status fsm_compute_softmax(const fsm_problem *problem);
fsm_status fsm_compute_attention(const fsm_attention *problem);

/* softmax, log_softmax or logsumexp of `rows` rows of `n` elements.
 *
 *     isa              as above
 *     op               FSM_SOFTMAX, FSM_LOG_SOFTMAX or FSM_LOGSUMEXP
 *     dtype            a floating type, of x and of out
 *     x, out           element 0 of row 0; element i of row r of x is r * x_row + i * x_step bytes
 *                      further. Steps may be negative, of x also 0. out may be x if its steps are
 *                      the same, and must not overlap it otherwise
 *     out_step         of FSM_LOGSUMEXP is not looked at: there is one result a row
 *     rows, n          at least 0; the logsumexp of no elements is -inf
 *     threads          at least 1
 *
 * FSM_DONE, FSM_NOMEM or FSM_INVALID: op or dtype is none of these, a number is too small, x or out
 * is NULL where there is something to read or write. The bits are those of the Python functions. */
fsm_status fsm_softmax_rows(const fsm_isa *isa, fsm_op op, fsm_dtype dtype, const void *x,
                            ptrdiff_t x_row, ptrdiff_t x_step, void *out, ptrdiff_t out_row,
                            ptrdiff_t out_step, ptrdiff_t rows, ptrdiff_t n, int threads);

/* The problem that fsm_softmax_rows makes of its arguments, but for `isa` and `threads`. Nothing is
 * checked. For callers that want to add operands, or to run a plan slice by slice. */
void fsm_describe_rows(fsm_problem *problem, fsm_op op, fsm_dtype dtype, const void *x,
                       ptrdiff_t x_row, ptrdiff_t x_step, void *out, ptrdiff_t out_row,
                       ptrdiff_t out_step, ptrdiff_t rows, ptrdiff_t n);

/* Attention over C-contiguous arrays: a block of queries, all the keys that it may see.
 *
 *     isa, threads     as for fsm_softmax_rows
 *     dtype            a floating type, of q, k, v and out
 *     q                [heads, queries, depth]
 *     k, v             [kv_heads, keys, depth], [kv_heads, keys, v_depth]
 *     out              [heads, queries, v_depth]; overlaps no input
 *     lse              [heads, queries]: the logarithm of each query's denominator, float (double if
 *                      dtype is FSM_F64); or NULL
 *     heads            0 or a multiple of kv_heads, at least 1: head h attends to h / (heads /
 *                      kv_heads)
 *     depth            at least 1; the other sizes at least 0
 *     scale            finite in the compute type; often 1 / sqrt(depth)
 *     causal, offset   if causal is not 0, query i sees key j if j <= i + offset
 *
 * FSM_DONE, FSM_NOMEM or FSM_INVALID: a number is not as above, an array that has elements is NULL.
 * For other strides, masks and so on fill an fsm_attention. */
fsm_status fsm_attention_heads(const fsm_isa *isa, fsm_dtype dtype, const void *q, const void *k,
                               const void *v, void *out, void *lse, ptrdiff_t heads,
                               ptrdiff_t kv_heads, ptrdiff_t queries, ptrdiff_t keys,
                               ptrdiff_t depth, ptrdiff_t v_depth, double scale, int causal,
                               ptrdiff_t offset, int threads);

/* ---- what there is ---- */

/* ISAs, best first. fsm_isa_at(i) is NULL past the end; only those that this CPU can run are
 * listed. */
const fsm_isa *fsm_isa_at(int i);
const char *fsm_isa_name(const fsm_isa *isa);
void fsm_exp_f32(const fsm_isa *isa, float *out, const float *x,
                 ptrdiff_t n); /* the internal exp, x <= 0 */
void fsm_exp_f64(const fsm_isa *isa, double *out, const double *x, ptrdiff_t n); /* for its tests */
/* The rate of FMA, for benchmarks: as many in a row as `count` steps of a matrix product, on this
 * thread, in registers. Returns how many operations they were, an FMA being two. */
double fsm_multiply_add_f32(const fsm_isa *isa, ptrdiff_t count);

/* Threads. */
int fsm_usable_cpus(void);  /* min(affinity, cgroup quota), at least 1 */
int fsm_has_openmp(void);   /* 0: every call computes alone */
int fsm_openmp_limit(void); /* an OpenMP limit lowered since the library was loaded, else INT_MAX */

/* ---- from other extension modules ---- */

/* fastsoftmax._core gives away pointers to
 *
 *     softmax_rows      fsm_softmax_rows         compute_softmax      fsm_compute_softmax
 *     attention_heads   fsm_attention_heads      compute_attention    fsm_compute_attention
 *
 * in the capsules of its __pyx_capi__, as any Cython module does. In Cython `from fastsoftmax cimport softmax_rows` finds them; in C, with Python.h included before
 * this header,
 *
 *     fsm_softmax_rows_function *rows = (fsm_softmax_rows_function *)fsm_import("softmax_rows");
 *
 * once, holding Python's lock: NULL with a Python exception set if it fails. The pointer may be
 * called without the lock, and is good for as long as the process lives. Structs may change from one
 * minor version to the next: what fills one has to be built again. */
typedef fsm_status fsm_softmax_rows_function(const fsm_isa *, fsm_op, fsm_dtype, const void *,
                                             ptrdiff_t, ptrdiff_t, void *, ptrdiff_t, ptrdiff_t,
                                             ptrdiff_t, ptrdiff_t, int);
typedef fsm_status fsm_attention_heads_function(const fsm_isa *, fsm_dtype, const void *,
                                                const void *, const void *, void *, void *,
                                                ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                                                ptrdiff_t, ptrdiff_t, double, int, ptrdiff_t, int);
typedef fsm_status fsm_compute_softmax_function(const fsm_problem *);
typedef fsm_status fsm_compute_attention_function(const fsm_attention *);

#ifdef Py_PYTHON_H
static inline void *fsm_import(const char *name) {
    void *function = NULL;
    PyObject *module = PyImport_ImportModule("fastsoftmax._core");
    PyObject *table = module ? PyObject_GetAttrString(module, "__pyx_capi__") : NULL;
    PyObject *capsule = table ? PyMapping_GetItemString(table, name) : NULL;
    if (capsule) function = PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule));
    Py_XDECREF(capsule);
    Py_XDECREF(table);
    Py_XDECREF(module);
    return function;
}
#endif

#endif
