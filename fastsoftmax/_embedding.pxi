# What compiled code of other people calls and finds: a part of _core.pyx. Cython exports these
# functions in __pyx_capi__; fastsoftmax.h says what they do. All they add is the ISA in use.

cdef fsm_status compute_softmax(const fsm_problem *problem) noexcept nogil:
    cdef fsm_problem chosen
    if problem.isa != NULL:
        return fsm_compute_softmax(problem)
    chosen = problem[0]
    chosen.isa = _active
    return fsm_compute_softmax(&chosen)


cdef fsm_status compute_attention(const fsm_attention *problem) noexcept nogil:
    cdef fsm_attention chosen
    if problem.isa != NULL:
        return fsm_compute_attention(problem)
    chosen = problem[0]
    chosen.isa = _active
    return fsm_compute_attention(&chosen)


cdef fsm_status softmax_rows(
        const fsm_isa *isa, fsm_op op, fsm_dtype dtype, const void *x, ptrdiff_t x_row,
        ptrdiff_t x_step, void *out, ptrdiff_t out_row, ptrdiff_t out_step, ptrdiff_t rows,
        ptrdiff_t n, int threads) noexcept nogil:
    return fsm_softmax_rows(_active if isa == NULL else isa, op, dtype, x, x_row, x_step, out,
                            out_row, out_step, rows, n, threads)


cdef fsm_status attention_heads(
        const fsm_isa *isa, fsm_dtype dtype, const void *q, const void *k, const void *v, void *out,
        void *lse, ptrdiff_t heads, ptrdiff_t kv_heads, ptrdiff_t queries, ptrdiff_t keys,
        ptrdiff_t depth, ptrdiff_t v_depth, double scale, int causal, ptrdiff_t offset,
        int threads) noexcept nogil:
    return fsm_attention_heads(_active if isa == NULL else isa, dtype, q, k, v, out, lse, heads,
                               kv_heads, queries, keys, depth, v_depth, scale, causal, offset,
                               threads)


def get_include():
    """Return the folder that holds ``fastsoftmax.h``, for the compiler of other extension modules.

    Returns
    -------
    str
        To be passed as one of ``include_dirs``. The header says how C code gets pointers to the
        functions; Cython code finds them by ``from fastsoftmax cimport softmax_rows``.

    Examples
    --------
    >>> import os, fastsoftmax
    >>> os.path.exists(os.path.join(fastsoftmax.get_include(), "fastsoftmax.h"))
    True
    """
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "include")
    if os.path.isdir(installed):
        return installed
    return os.path.join(os.path.dirname(package), "src_c")  # built in place
