# The C API, src_c/fastsoftmax.h, as Cython sees it.
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t


cdef extern from "fastsoftmax.h" nogil:
    enum:
        FSM_MAX_NDIM

    ctypedef enum fsm_dtype:
        FSM_F16, FSM_BF16, FSM_F32, FSM_F64
        FSM_I8, FSM_I16, FSM_I32, FSM_I64
        FSM_U8, FSM_U16, FSM_U32, FSM_U64

    ctypedef enum fsm_op:
        FSM_SOFTMAX, FSM_LOG_SOFTMAX, FSM_LOGSUMEXP, FSM_LOGSUMEXP_WEIGHTED
        FSM_SOFTMAX_BACKWARD, FSM_LOG_SOFTMAX_BACKWARD
        FSM_CROSS_ENTROPY, FSM_CROSS_ENTROPY_BACKWARD

    ctypedef enum fsm_status:
        FSM_DONE, FSM_AGAIN, FSM_NOMEM, FSM_INVALID

    ctypedef enum fsm_operand:
        FSM_X, FSM_Y, FSM_BIAS, FSM_WHERE, FSM_SCALE, FSM_OUT, FSM_SIGN
        FSM_LABEL, FSM_GRAD, FSM_OPERAND_COUNT

    ctypedef struct fsm_isa:
        pass

    ctypedef struct fsm_plan:
        pass

    ctypedef struct fsm_array:
        char *data
        fsm_dtype dtype
        ptrdiff_t *strides

    ctypedef struct fsm_problem:
        fsm_op op
        fsm_dtype compute
        int ndim
        int threads
        const fsm_isa *isa
        ptrdiff_t *shape
        unsigned char *reduced
        fsm_array *operand

    fsm_status fsm_plan_new(fsm_plan **plan, const fsm_problem *problem)
    fsm_status fsm_plan_run(fsm_plan *plan)
    void fsm_plan_free(fsm_plan *plan)

    void fsm_softmax_small(const fsm_isa *isa, fsm_dtype dtype, int log, const void *x, void *out,
                           ptrdiff_t rows, ptrdiff_t n)
    int fsm_is_small(ptrdiff_t elements)

    enum:
        FSM_PARTS

    ctypedef struct fsm_parts:
        fsm_op op
        fsm_dtype compute, x_dtype, out_dtype
        const fsm_isa *isa
        int threads
        ptrdiff_t rows, n, whole
        const void *x
        const void *max
        int64_t *sums
        void *out

    void fsm_parts_sum(const fsm_parts *parts)
    void fsm_parts_map(const fsm_parts *parts)

    ctypedef enum fsm_attention_operand:
        FSM_ATTN_Q, FSM_ATTN_K, FSM_ATTN_V, FSM_ATTN_MASK, FSM_ATTN_BIAS, FSM_ATTN_OFFSET
        FSM_ATTN_LENGTHS, FSM_ATTN_SINKS, FSM_ATTN_SLOPES, FSM_ATTN_OUT, FSM_ATTN_LSE
        FSM_ATTN_WEIGHTS, FSM_ATTN_GRAD_OUT, FSM_ATTN_DQ, FSM_ATTN_DK, FSM_ATTN_DV, FSM_ATTN_DBIAS
        FSM_ATTN_DSINKS

    ctypedef struct fsm_attention:
        fsm_dtype compute
        int ndim
        int threads
        const fsm_isa *isa
        ptrdiff_t *shape
        ptrdiff_t heads, kv_heads, queries, keys, depth, v_depth
        fsm_array *operand
        double scale, softcap
        int causal
        ptrdiff_t left, right

    ctypedef struct fsm_attention_plan:
        pass

    fsm_status fsm_attention_packed_new(fsm_attention_plan **plan, const fsm_attention *problem,
                                        const int64_t *q_starts, const int64_t *k_starts)
    fsm_status fsm_attention_run(fsm_attention_plan *plan)
    void fsm_attention_free(fsm_attention_plan *plan)

    ctypedef struct fsm_attention_backward_plan:
        pass

    fsm_status fsm_attention_backward_new(fsm_attention_backward_plan **plan,
                                          const fsm_attention *problem)
    fsm_status fsm_attention_backward_run(fsm_attention_backward_plan *plan)
    void fsm_attention_backward_free(fsm_attention_backward_plan *plan)

    ctypedef enum fsm_merge_operand:
        FSM_MERGE_OUT_A, FSM_MERGE_LSE_A, FSM_MERGE_OUT_B, FSM_MERGE_LSE_B
        FSM_MERGE_OUT, FSM_MERGE_LSE

    ctypedef struct fsm_merge:
        fsm_dtype compute
        int ndim
        int threads
        const fsm_isa *isa
        ptrdiff_t *shape
        ptrdiff_t columns
        fsm_array *operand

    ptrdiff_t fsm_merge_attention(const fsm_merge *problem, ptrdiff_t begin)

    fsm_status fsm_compute_softmax(const fsm_problem *problem)
    fsm_status fsm_compute_attention(const fsm_attention *problem)
    fsm_status fsm_softmax_rows(
        const fsm_isa *isa, fsm_op op, fsm_dtype dtype, const void *x, ptrdiff_t x_row,
        ptrdiff_t x_step, void *out, ptrdiff_t out_row, ptrdiff_t out_step, ptrdiff_t rows,
        ptrdiff_t n, int threads)
    void fsm_describe_rows(
        fsm_problem *problem, fsm_op op, fsm_dtype dtype, const void *x, ptrdiff_t x_row,
        ptrdiff_t x_step, void *out, ptrdiff_t out_row, ptrdiff_t out_step, ptrdiff_t rows,
        ptrdiff_t n)
    fsm_status fsm_attention_heads(
        const fsm_isa *isa, fsm_dtype dtype, const void *q, const void *k, const void *v, void *out,
        void *lse, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t queries, ptrdiff_t keys,
        ptrdiff_t depth, ptrdiff_t v_depth, double scale, int causal, ptrdiff_t offset, int threads)

    const fsm_isa *fsm_isa_at(int i)
    const char *fsm_isa_name(const fsm_isa *isa)
    void fsm_exp_f32(const fsm_isa *isa, float *out, const float *x, ptrdiff_t n)
    void fsm_exp_f64(const fsm_isa *isa, double *out, const double *x, ptrdiff_t n)
    double fsm_multiply_add_f32(const fsm_isa *isa, ptrdiff_t count)

    int fsm_usable_cpus()
    int fsm_has_openmp()
    int fsm_openmp_limit()


# What other modules may call: the functions of that header without "fsm_", _embedding.pxi.
cdef fsm_status compute_softmax(const fsm_problem *problem) noexcept nogil
cdef fsm_status compute_attention(const fsm_attention *problem) noexcept nogil
cdef fsm_status softmax_rows(
    const fsm_isa *isa, fsm_op op, fsm_dtype dtype, const void *x, ptrdiff_t x_row,
    ptrdiff_t x_step, void *out, ptrdiff_t out_row, ptrdiff_t out_step, ptrdiff_t rows, ptrdiff_t n,
    int threads) noexcept nogil
cdef fsm_status attention_heads(
    const fsm_isa *isa, fsm_dtype dtype, const void *q, const void *k, const void *v, void *out,
    void *lse, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t queries, ptrdiff_t keys,
    ptrdiff_t depth, ptrdiff_t v_depth, double scale, int causal, ptrdiff_t offset,
    int threads) noexcept nogil
