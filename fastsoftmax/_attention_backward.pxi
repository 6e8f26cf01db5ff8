# attention_backward: a part of _core.pyx, whose helpers it shares.

cdef _as_result(value, name, shape, dtype, forward):
    """What the forward pass returned, or its gradient: of that shape and dtype."""
    array = _as_floating(value, name)
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}{forward}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}{forward}, got {array.shape}")
    return array


cdef _attention_backward(grad_out, q, k, v, out, lse, mask, bias, bint causal, q_offset, kv_lengths,
                         window, scale, softcap, sinks, slopes, bint with_dbias, bint with_dsinks):
    cdef fsm_attention problem
    cdef int ndim
    for wanted, given, name in ((with_dbias, bias, "bias"), (with_dsinks, sinks, "sinks")):
        if wanted and given is None:
            raise ValueError(f"return_d{name} needs {name}, got None")
    # Converted once: what has a gradient has its shape.
    q, k, v = _as_positions(q, "q"), _as_positions(k, "k"), _as_positions(v, "v")
    compute = _compute_dtype(q.dtype, None, None)
    bias = None if bias is None else _as_floats(bias, "bias", compute, "mask")
    sinks = None if sinks is None else _as_floats(sinks, "sinks", compute)
    arrays, lead, rows, scores, _ = _enter_attention(
        &problem, q, k, v, mask, bias, causal, q_offset, kv_lengths, window, scale, softcap, sinks,
        slopes, None)
    dtype, ndim = arrays[0].dtype, problem.ndim
    shape = rows + (problem.v_depth,)
    grad_out = _as_result(grad_out, "grad_out", shape, dtype, ", as the out of attention is")
    out = _as_result(out, "out", shape, dtype, ", as attention returns it")
    lse = _as_result(lse, "lse", rows, compute, ", as attention returns it with return_lse")

    # Gradients have the shapes of their arguments: what was broadcast is added up.
    wanted = []
    for which, argument in ((FSM_ATTN_DQ, q), (FSM_ATTN_DK, k), (FSM_ATTN_DV, v)):
        array = np.zeros(np.shape(argument), compute)
        wanted.append((array, dtype))
        with_head = _with_heads(array)
        _enter(&problem.operand[<int>which],
               np.broadcast_to(with_head, lead + with_head.shape[-3:]), ndim + 3)
    problem.operand[<int>FSM_ATTN_DBIAS].data = problem.operand[<int>FSM_ATTN_DSINKS].data = NULL
    if with_dbias:
        array = np.zeros(np.shape(bias), np.float64)
        wanted.append((array, bias.dtype))
        _enter(&problem.operand[<int>FSM_ATTN_DBIAS], np.broadcast_to(array, scores), ndim + 3)
    if with_dsinks:
        array = np.zeros(np.shape(sinks), np.float64)
        wanted.append((array, sinks.dtype))
        _enter(&problem.operand[<int>FSM_ATTN_DSINKS], array, ndim + 1)
    _enter(&problem.operand[<int>FSM_ATTN_OUT], out, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_LSE], lse, ndim + 2)
    _enter(&problem.operand[<int>FSM_ATTN_GRAD_OUT], grad_out, ndim + 3)
    _run_attention_backward(&problem)
    gradients = ()
    with np.errstate(all="ignore"):
        for array, kind in wanted:
            gradients += (array.astype(kind, copy=False),)
    return gradients


cdef int _run_attention_backward(fsm_attention *problem) except -1:
    """As _run."""
    cdef fsm_attention_backward_plan *plan
    cdef fsm_status status
    problem.isa = _active
    problem.threads = get_num_threads()
    status = fsm_attention_backward_new(&plan, problem)
    if status == FSM_NOMEM:
        raise MemoryError("fastsoftmax: no memory for scratch")
    try:
        while status == FSM_AGAIN:
            with nogil:
                status = fsm_attention_backward_run(plan)
            PyErr_CheckSignals()
    finally:
        fsm_attention_backward_free(plan)
    return 0


def attention_backward(grad_out, q, k, v, out, lse, /, *, mask=None, bias=None, is_causal=False,
                       q_offset=0, kv_lengths=None, window=None, scale=None, softcap=None,
                       sinks=None, alibi_slopes=None, return_dbias=False, return_dsinks=False):
    """Gradients of :func:`attention` with respect to q, k and v, and to bias and sinks if wanted.

    As in the forward pass no matrix of the size of the scores is stored: they are computed again,
    block by block, from q, k and lse.

    Parameters
    ----------
    grad_out : array_like, [..., H, Q, Dv]
        Gradient with respect to out, of its shape and dtype.
    q, k, v : array_like
        As in the forward call.
    out, lse : array_like, [..., H, Q, Dv] and [..., H, Q]
        What the forward call returned, with ``return_lse=True``.
    mask, bias, is_causal, q_offset, kv_lengths, window, scale, softcap, sinks, alibi_slopes
        As in the forward call.
    return_dbias : bool, default False
        Also return the gradient with respect to bias.
    return_dsinks : bool, default False
        Also return the gradient with respect to sinks.

    Returns
    -------
    dq, dk, dv[, dbias][, dsinks] : tuple of ndarrays
        Each of the shape and dtype of its argument (of the compute type for a bias or sinks of
        integers): what was broadcast, or shared by several heads, is added up.

        A query that sees nothing has the gradient 0 and adds nothing to others; what a query does
        not see, NaN included, changes none of its gradients, nor does the query change theirs.

    Raises
    ------
    TypeError, ValueError
        As for :func:`attention`; for grad_out, out or lse of another dtype or shape than the
        forward call returned; for a gradient wanted of what is not given.

    See Also
    --------
    attention

    Notes
    -----
    With the weights ``p = exp(scores - lse)`` and ``delta = sum(grad_out * out)``, the gradient of
    the scores (and of bias) is ``p * (grad_out @ v.T - delta)``. Calculated in float32 for all
    types but float64. Memory besides the results: some blocks for each thread, and for float16 and
    bfloat16 the results once in float32; dbias is added up in float64.
    ``reference_gradients.attention_backward_bound`` has the bound of the error.

    The bits do not depend on the number of threads.

    References
    ----------
    Dao, Fu, Ermon, Rudra & Re, "FlashAttention: Fast and Memory-Efficient Exact Attention with
    IO-Awareness" (2022), Algorithm 4.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import attention, attention_backward
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, grad_out = rng.standard_normal((4, 8, 5, 16))  # each 8 heads, 5 positions
    >>> out, lse = attention(q, k, v, is_causal=True, return_lse=True)
    >>> dq, dk, dv = attention_backward(grad_out, q, k, v, out, lse, is_causal=True)

    The derivative in a direction, against a small step in it:

    >>> step = rng.standard_normal(q.shape)
    >>> moved = attention(q + 1e-6 * step, k, v, is_causal=True)
    >>> np.allclose(np.sum(dq * step), np.sum(grad_out * (moved - out)) / 1e-6, rtol=1e-4)
    True
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _attention_backward(grad_out, q, k, v, out, lse, mask, bias,
                                   _as_flag(is_causal, "is_causal"), q_offset, kv_lengths, window,
                                   scale, softcap, sinks, alibi_slopes,
                                   _as_flag(return_dbias, "return_dbias"),
                                   _as_flag(return_dsinks, "return_dsinks"))
    finally:
        fesetenv(&callers)
