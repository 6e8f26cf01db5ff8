# For other people's Cython: `from fastsoftmax cimport softmax_rows, FSM_SOFTMAX, FSM_F32`. To be
# compiled with include_dirs=[fastsoftmax.get_include()]; fastsoftmax.h there says what each does.
from fastsoftmax._core cimport (
    FSM_ATTN_BIAS, FSM_ATTN_K, FSM_ATTN_LENGTHS, FSM_ATTN_LSE, FSM_ATTN_MASK, FSM_ATTN_OFFSET,
    FSM_ATTN_OUT, FSM_ATTN_Q, FSM_ATTN_SINKS, FSM_ATTN_SLOPES, FSM_ATTN_V, FSM_ATTN_WEIGHTS,
    FSM_BF16, FSM_BIAS, FSM_DONE, FSM_F16, FSM_F32, FSM_F64, FSM_I8, FSM_I16, FSM_I32, FSM_I64,
    FSM_INVALID, FSM_LOG_SOFTMAX, FSM_LOG_SOFTMAX_BACKWARD, FSM_LOGSUMEXP, FSM_LOGSUMEXP_WEIGHTED,
    FSM_MAX_NDIM, FSM_NOMEM, FSM_OUT, FSM_SCALE, FSM_SIGN, FSM_SOFTMAX, FSM_SOFTMAX_BACKWARD,
    FSM_U8, FSM_U16, FSM_U32, FSM_U64, FSM_WHERE, FSM_X, FSM_Y, attention_heads, compute_attention,
    compute_softmax, fsm_array, fsm_attention, fsm_attention_operand, fsm_dtype, fsm_isa, fsm_op,
    fsm_operand, fsm_problem, fsm_status, softmax_rows,
)
