# Rows of any lengths, one behind the other, for fastsoftmax.awkward: a part of _core.pyx.

_OF_LISTS = {"softmax": FSM_SOFTMAX, "log_softmax": FSM_LOG_SOFTMAX, "logsumexp": FSM_LOGSUMEXP}


def _of_lists(name, x, starts):
    """softmax, log_softmax or logsumexp of each x[starts[i]:starts[i + 1]], an array of one
    dimension: of as many elements as x, or one for each list. The bits are those of a call for
    each. Short lists are done one by one on this thread, a long one on all."""
    cdef fsm_problem problem
    cdef fsm_op op = _OF_LISTS[name]
    cdef fsm_status status = FSM_DONE
    cdef ndarray a = np.ascontiguousarray(_as_array(x, "x", None)), y
    if not FSM_F16 <= _code(a.dtype) <= FSM_F64:
        a = a.astype(np.float64)
    cdef ndarray checked = _as_starts(starts, "starts", a.size, "elements")
    cdef const int64_t *start = <const int64_t *>PyArray_DATA(checked)
    cdef fsm_dtype dtype = <fsm_dtype><int>_code(a.dtype)
    cdef ptrdiff_t i = 0, lists = checked.size - 1, n = 0, done, size = a.itemsize
    cdef bint one_each = op == FSM_LOGSUMEXP
    cdef char *from_at
    cdef char *to_at
    y = np.empty(lists if one_each else a.size, a.dtype)
    while i < lists:
        with nogil:
            done = 0
            while i < lists and done < 1 << 20:  # a millisecond or so
                n = start[i + 1] - start[i]
                from_at = <char *>PyArray_DATA(a) + start[i] * size
                to_at = <char *>PyArray_DATA(y) + (i if one_each else start[i]) * size
                if not fsm_is_small(n):
                    break
                status = fsm_softmax_rows(_active, op, dtype, from_at, 0, size, to_at, 0, size, 1,
                                          n, 1)
                if status == FSM_NOMEM:
                    break
                i += 1
                done += n + 64
        if status == FSM_NOMEM:
            raise MemoryError("fastsoftmax: no memory for scratch")
        PyErr_CheckSignals()
        if i < lists and not fsm_is_small(n):
            fsm_describe_rows(&problem, op, dtype, from_at, 0, size, to_at, 0, size, 1, n)
            _run(&problem)
            i += 1
    return y
