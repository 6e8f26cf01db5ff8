# cython: language_level=3
"""From Cython: what is cimported are C functions, called without the GIL."""

from fastsoftmax cimport (
    FSM_DONE, FSM_F32, FSM_NOMEM, FSM_SOFTMAX, attention_heads, fsm_status, softmax_rows,
)
from libc.math cimport sqrt


cdef int check(fsm_status status) except -1 nogil:
    if status != FSM_DONE:
        with gil:
            raise MemoryError if status == FSM_NOMEM else ValueError(f"status {<int>status}")
    return 0


def route(const float[:, :] logits, float[:, :] weights):
    """Put the softmax of each row of logits into weights; any strides. How often each column was
    largest."""
    cdef Py_ssize_t r, c, best
    if (weights.shape[0], weights.shape[1]) != (logits.shape[0], logits.shape[1]):
        raise ValueError("logits and weights must have the same shape")
    counts = [0] * logits.shape[1]
    if logits.size == 0:
        return counts
    with nogil:
        check(softmax_rows(NULL, FSM_SOFTMAX, FSM_F32, &logits[0, 0], logits.strides[0],
                           logits.strides[1], &weights[0, 0], weights.strides[0],
                           weights.strides[1], logits.shape[0], logits.shape[1], 1))
    for r in range(weights.shape[0]):
        best = 0
        for c in range(1, weights.shape[1]):
            if weights[r, c] > weights[r, best]:
                best = c
        counts[best] += 1
    return counts


def attend(const float[:, :, ::1] q, const float[:, :, ::1] k, const float[:, :, ::1] v,
           float[:, :, ::1] out, float[:, ::1] lse, bint causal=False, Py_ssize_t offset=0,
           int threads=1):
    """Attention of a block of queries, not empty, to its keys: [heads, positions, columns]."""
    if not (k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1] and q.shape[2] == k.shape[2]
            and (out.shape[0], out.shape[1], out.shape[2]) == (q.shape[0], q.shape[1], v.shape[2])
            and (lse.shape[0], lse.shape[1]) == (q.shape[0], q.shape[1])):
        raise ValueError("shapes do not fit")
    with nogil:
        check(attention_heads(NULL, FSM_F32, &q[0, 0, 0], &k[0, 0, 0], &v[0, 0, 0], &out[0, 0, 0],
                              &lse[0, 0], q.shape[0], k.shape[0], q.shape[1], k.shape[1],
                              q.shape[2], v.shape[2], 1 / sqrt(<double>q.shape[2]), causal, offset,
                              threads))
