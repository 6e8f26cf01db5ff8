"""From Numba: the address of a C function that Cython exports, called by compiled code."""

from ctypes import CFUNCTYPE, c_int, c_ssize_t, c_void_p

import numba
import numpy as np
from numba.extending import get_cython_function_address

SOFTMAX, LOG_SOFTMAX, LOGSUMEXP = range(3)  # fsm_op in fastsoftmax.h
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = range(4)  # fsm_dtype

# fsm_softmax_rows; its first argument, a pointer that is 0 here, is declared as an integer.
_rows = c_void_p, c_ssize_t, c_ssize_t
softmax_rows = CFUNCTYPE(
    c_int, c_ssize_t, c_int, c_int, *_rows, *_rows, c_ssize_t, c_ssize_t, c_int
)(get_cython_function_address("fastsoftmax._core", "softmax_rows"))


@numba.njit(nogil=True)
def entropy(logits):
    """The entropy in nats of each row of logits, float64 of any strides."""
    rows, n = logits.shape
    log_p = np.empty((rows, n))
    status = softmax_rows(
        0,
        LOG_SOFTMAX,
        FLOAT64,
        logits.ctypes,
        logits.strides[0],
        logits.strides[1],
        log_p.ctypes,
        log_p.strides[0],
        log_p.strides[1],
        rows,
        n,
        1,
    )
    if status != 0:
        raise ValueError("fastsoftmax failed")
    return -(np.exp(log_p) * log_p).sum(1)
