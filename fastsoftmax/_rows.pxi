# Rows that are no rows of an ndarray, for fastsoftmax.awkward and fastsoftmax.dask: a part of
# _core.pyx, whose helpers it shares.

_OF_ROWS = {"softmax": FSM_SOFTMAX, "log_softmax": FSM_LOG_SOFTMAX, "logsumexp": FSM_LOGSUMEXP}


def _of_lists(name, x, starts):
    """softmax, log_softmax or logsumexp of each x[starts[i]:starts[i + 1]], an array of one
    dimension: of as many elements as x, or one for each list. The bits are those of a call for
    each. Short lists are done one by one on this thread, a long one on all."""
    cdef fsm_problem problem
    cdef fsm_op op = _OF_ROWS[name]
    cdef fsm_status status = FSM_DONE
    cdef ndarray a = np.ascontiguousarray(_as_array(x, "x")), y
    if not FSM_F16 <= _code(a.dtype) <= FSM_F64:
        a = a.astype(np.float64)
    cdef ndarray checked = _as_starts(starts, "starts", a.size, "elements")
    cdef const int64_t *start = <const int64_t *>PyArray_DATA(checked)
    cdef fsm_dtype dtype = <fsm_dtype><int>_code(a.dtype)
    cdef ptrdiff_t i = 0, lists = checked.size - 1, n = 0, done, size = a.itemsize
    cdef bint one_each = op == FSM_LOGSUMEXP
    cdef char *from_at = NULL
    cdef char *to_at = NULL
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


cdef _enter_parts(fsm_parts *parts, name, ndarray x, ndarray top, ndarray sums, ptrdiff_t whole):
    """Parts of rows; x [rows, n], which C reads as it is, or None."""
    cdef ptrdiff_t rows = top.size
    if sums.size != rows * <int>FSM_PARTS or (x is not None and x.size != rows * x.shape[1]):
        raise ValueError("x, top and sums must have as many rows")
    parts.op = _OF_ROWS[name]
    parts.compute = <fsm_dtype><int>_code(top.dtype)
    parts.isa, parts.threads = _active, get_num_threads()
    parts.rows, parts.n, parts.whole = rows, 0, whole
    parts.max = PyArray_DATA(top)
    parts.sums = <int64_t *>PyArray_DATA(sums)
    parts.x = NULL
    if x is not None:
        parts.n, parts.x = x.shape[1], PyArray_DATA(x)
        parts.x_dtype = <fsm_dtype><int>_code(x.dtype)


def _sums_of_parts(name, x, top, whole):
    """The exact sums of parts of rows of `whole` elements, as int64 [rows, 5], which may be added.

    x [rows, n] is float64 if top is; top [rows], float32 or float64, are the maxima of the whole
    rows."""
    cdef fsm_parts parts
    x, top = np.ascontiguousarray(x), np.ascontiguousarray(top)
    sums = np.empty((top.size, <int>FSM_PARTS), np.int64)
    _enter_parts(&parts, name, x, top, sums, whole)
    with nogil:
        fsm_parts_sum(&parts)
    return sums


def _results_of_parts(name, x, top, sums, whole, dtype):
    """The results of parts of rows, from the sums of all parts of each: [rows, n], of logsumexp,
    which takes None for x, [rows]."""
    cdef fsm_parts parts
    top, sums = np.ascontiguousarray(top), np.ascontiguousarray(sums)
    x = None if x is None else np.ascontiguousarray(x)
    y = np.empty(np.shape(top if x is None else x), dtype)
    _enter_parts(&parts, name, x, top, sums, whole)
    parts.out, parts.out_dtype = PyArray_DATA(y), <fsm_dtype><int>_code(y.dtype)
    with nogil:
        fsm_parts_map(&parts)
    return y
