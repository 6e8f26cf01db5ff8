# attention and merge_attention: a part of _core.pyx, whose helpers they share.

from libc.math cimport sqrt

_INT64 = np.iinfo(np.int64)
_FARTHEST = 2**61  # offsets are clipped to it, so that C can add keys and windows to them
_WIDEST = 2**62    # a window that reaches every key, from any offset


# ---- arguments ----

cdef _as_floating(value, name):
    """As _as_array, but only the floating types."""
    cdef ndarray array = _as_array(value, name)
    _float_code(array.dtype, name)
    return array


cdef _as_positions(value, name):
    """An array [..., heads, positions, columns], or [positions, columns]."""
    array = _as_floating(value, name)
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape [..., heads, positions, columns] or "
                         f"[positions, columns], got {array.shape}")
    return array


cdef _with_heads(array):
    return array[None] if array.ndim == 2 else array


cdef _leading(q, k, v):
    """The dimensions before the heads that q, k and v have together, if they fit."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError("q, k and v must have the same dtype, got "
                        f"{q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[-3] != v.shape[-3]:
        wrong = "k and v must have the same number of heads"
    elif k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        wrong = "k and v must have at least 1 head, and q a multiple of their number of heads"
    elif k.shape[-2] != v.shape[-2]:
        wrong = "k and v must have the same number of keys"
    elif q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        wrong = "q and k must have the same number of columns, at least 1"
    elif q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        return q.shape[:-3]
    else:
        try:
            return np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        except (ValueError, RuntimeError):  # the latter: more than 32, of different shapes
            wrong = "the dimensions of q, k and v before the heads must broadcast together"
    raise ValueError(f"{wrong}; of shape [..., heads, positions, columns], q has {q.shape}, k has "
                     f"{k.shape}, v has {v.shape}")


cdef _as_integers(value, name, kind):
    """An array of integers; no numbers at all, which are float64 to NumPy, will do. A copy: what is
    checked stays in range, whoever writes to the array meanwhile."""
    array = _converted(value, name).copy()
    empty = array.dtype.kind == "f" and array.size == 0
    if _is_masked(value) or not (empty or array.dtype.kind in "iu"):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__} of dtype {array.dtype}")
    return array


cdef _as_addresses(value, name, lead, least, most):
    """int64, clipped: a single number, or an array broadcast to the leading dimensions."""
    array = None
    if isinstance(value, int) and not isinstance(value, bool):  # of any size
        low = high = value
    else:
        array = _as_integers(value, name, "an integer or an array of integers")
        low, high = (array.min(), array.max()) if array.size else (least, most)
    if low < least or high > most:
        raise ValueError(f"{name} must be from {least} to {most}, got "
                         f"{low if low < least else high}")
    if array is None:
        return np.asarray(min(max(value, -_FARTHEST), _FARTHEST), np.int64)
    array = array.astype(np.int64, copy=False)
    if low < -_FARTHEST or high > _FARTHEST:
        array = np.asarray(array.clip(-_FARTHEST, _FARTHEST))
    return _broadcast(array, lead, name, "the leading dimensions") if array.ndim else array


cdef _as_number(value, name, compute):
    array = _converted(value, name)
    if (array.ndim or _code(array.dtype) < 0 or array.dtype.kind == "b"
            or _is_masked(value)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    with np.errstate(all="ignore"):
        finite = np.isfinite(compute.type(array))
    if not finite:
        raise ValueError(f"{name} must be finite in {compute}, got {float(array)}")
    return float(array)


cdef _as_window(window):
    """How many keys to the left and right of its position a query sees; -1: all."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError("window must be None or a pair (left, right), got "
                        f"{type(window).__name__} {window!r:.40}")
    sides = []
    for side in window:
        try:
            if isinstance(side, (bool, np.bool_)):
                raise TypeError
            reach = None if side is None else index(side)
        except TypeError:
            raise TypeError("window must hold integers >= 0 or None, got "
                            f"{window!r:.40}") from None
        if reach is not None and reach < 0:
            raise ValueError(f"window must hold integers >= 0 or None, got {window!r:.40}")
        sides.append(-1 if reach is None else min(reach, _WIDEST))
    return sides


cdef _per_head(value, name, heads, compute):
    """One number for each head, in the compute type."""
    array = _as_floats(value, name, compute)
    if np.shape(array) != (heads,):
        raise ValueError(f"{name} must have shape ({heads},), one number for each head, got "
                         f"{np.shape(array)}")
    with np.errstate(all="ignore"):
        return np.asarray(array, compute)


# ---- attention ----

cdef _enter_attention(fsm_attention *problem, q, k, v, mask, bias, bint causal, q_offset,
                      kv_lengths, window, scale, softcap, sinks, slopes, out):
    """Checks the arguments and enters them, as they are when `out` is written to. Returns the
    arrays, which must outlive the problem, `out` the last of them; the leading dimensions; the
    shapes of the rows and of the scores, as the caller sees them; the compute type."""
    cdef int d, ndim
    cdef ndarray y = _as_out(out)
    q, k, v = _as_positions(q, "q"), _as_positions(k, "k"), _as_positions(v, "v")
    one_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = _with_heads(q), _with_heads(k), _with_heads(v)
    lead = _leading(q, k, v)
    compute = _compute_dtype(q.dtype, None, None)
    heads, queries, depth = q.shape[-3:]
    kv_heads, keys, v_depth = v.shape[-3:]
    rows = lead + (queries,) if one_head else lead + (heads, queries)
    scores = rows + (keys,)
    if y is not None:
        if y.dtype != q.dtype:
            raise TypeError(f"out must have the dtype of q, {q.dtype}, got {y.dtype}")
        _check_out(y, rows + (v_depth,))

    if mask is not None:
        mask = _as_mask(mask, "mask", "; numbers to add to the scores go into bias=")
        mask = _broadcast(mask, scores, "mask", "the shape of the scores")
    if bias is not None:
        bias = _as_floats(bias, "bias", compute, "mask")
        bias = _broadcast(bias, scores, "bias", "the shape of the scores")
    q_offset = _as_addresses(q_offset, "q_offset", lead, _INT64.min, _INT64.max)
    if kv_lengths is not None:
        kv_lengths = _as_addresses(kv_lengths, "kv_lengths", lead, 0, keys)
    if sinks is not None:
        sinks = _per_head(sinks, "sinks", heads, compute)
    if slopes is not None:
        slopes = _per_head(slopes, "alibi_slopes", heads, compute)
    problem.left, problem.right = _as_window(window)
    problem.scale = 1 / sqrt(depth) if scale is None else _as_number(scale, "scale", compute)
    problem.softcap = 0 if softcap is None else _as_number(softcap, "softcap", compute)
    if softcap is not None and not compute.type(problem.softcap) > 0:
        raise ValueError(f"softcap must be > 0 in {compute}, got {float(softcap)}")
    problem.causal = causal

    ndim = problem.ndim = len(lead)
    for d in range(ndim):
        problem.shape[d] = lead[d]
    problem.compute = <fsm_dtype><int>_code(compute)
    problem.heads, problem.queries, problem.depth = heads, queries, depth
    problem.kv_heads, problem.keys, problem.v_depth = kv_heads, keys, v_depth
    arrays = []
    for array, name in ((q, "q"), (k, "k"), (v, "v")):
        if array.shape[:-3] != lead:
            array = _broadcast(array, lead + array.shape[-3:], name, "the leading dimensions")
        arrays.append(array)
    arrays += mask, bias, q_offset, kv_lengths, sinks, slopes
    for d in range(len(arrays)):
        arrays[d] = _apart(arrays[d], y, False)
    q, k, v, mask, bias, q_offset, kv_lengths, sinks, slopes = arrays
    arrays.append(y)
    _enter(&problem.operand[<int>FSM_ATTN_Q], q, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_K], k, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_V], v, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_MASK], mask, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_BIAS], bias, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_OFFSET], q_offset, ndim)
    _enter(&problem.operand[<int>FSM_ATTN_LENGTHS], kv_lengths, ndim)
    _enter(&problem.operand[<int>FSM_ATTN_SINKS], sinks, ndim + 1)
    _enter(&problem.operand[<int>FSM_ATTN_SLOPES], slopes, ndim + 1)
    return arrays, lead, rows, scores, compute


cdef _attention(q, k, v, mask, bias, bint causal, q_offset, kv_lengths, window, scale, softcap,
                sinks, slopes, out, bint with_lse, bint with_weights):
    cdef fsm_attention problem
    cdef int ndim
    arrays, lead, rows, scores, compute = _enter_attention(
        &problem, q, k, v, mask, bias, causal, q_offset, kv_lengths, window, scale, softcap, sinks,
        slopes, out)
    dtype, ndim = arrays[0].dtype, problem.ndim
    y = np.empty(rows + (problem.v_depth,), dtype) if out is None else arrays[-1]
    lse = np.empty(rows, compute) if with_lse else None
    weights = np.empty(scores, dtype) if with_weights else None
    _enter(&problem.operand[<int>FSM_ATTN_OUT], y, ndim + 3)
    _enter(&problem.operand[<int>FSM_ATTN_LSE], lse, ndim + 2)
    _enter(&problem.operand[<int>FSM_ATTN_WEIGHTS], weights, ndim + 3)
    _run_attention(&problem)
    first = y if out is None else out
    results = (first,)
    for array in (lse, weights):
        if array is not None:
            results += (array,)
    return results if len(results) > 1 else first


cdef int _run_attention(fsm_attention *problem, const int64_t *q_starts=NULL,
                        const int64_t *k_starts=NULL) except -1:
    """As _run."""
    cdef fsm_attention_plan *plan
    cdef fsm_status status
    problem.isa = _active
    problem.threads = get_num_threads()
    status = fsm_attention_packed_new(&plan, problem, q_starts, k_starts)
    if status == FSM_NOMEM:
        raise MemoryError("fastsoftmax: no memory for scratch")
    try:
        while status == FSM_AGAIN:
            with nogil:
                status = fsm_attention_run(plan)
            PyErr_CheckSignals()
    finally:
        fsm_attention_free(plan)
    return 0


def attention(q, k, v, /, *, mask=None, bias=None, is_causal=False, q_offset=0, kv_lengths=None,
              window=None, scale=None, softcap=None, sinks=None, alibi_slopes=None, out=None,
              return_lse=False, return_weights=False):
    """Attention: ``softmax(scale * q @ k.T) @ v`` over the keys that each query may see.

    The matrix of scores is never stored: the memory it takes beyond the result is small and does
    not grow with the number of queries and keys. Blocks of keys that no query may see are skipped.

    Below, H is the number of heads of q, G that of k and v, Q the number of queries, K that of
    keys, and ``...`` are leading dimensions, such as a batch.

    Parameters
    ----------
    q : array_like, [..., H, Q, D]
        Queries: float16, bfloat16 (of ml_dtypes), float32 or float64. Arrays of any strides are
        read where they lie: pass a tensor [B, L, H, D] as its view ``x.swapaxes(1, 2)``.
    k, v : array_like, [..., G, K, D] and [..., G, K, Dv]
        Keys and values, of the dtype of q. G divides H: head h of q attends to head h // (H // G)
        of k and v. The leading dimensions of q, k and v broadcast. A 2-D array is one head.
    mask : array_like of bool, optional
        Broadcasts to [..., H, Q, K]; a query sees a key where it is True. It is not expanded: a
        padding mask may have the shape [B, 1, 1, K].
    bias : array_like, optional
        Real numbers added to the scores; broadcasts to [..., H, Q, K]. Where it is -inf the query
        does not see the key.
    is_causal : bool, default False
        The query at position p sees the keys up to p only. See q_offset.
    q_offset : int or array_like of int, default 0
        Query i is at position p = i + q_offset and key j at position j. 0 aligns the first query
        with the first key (top-left, as is_causal of PyTorch), K - Q the last query with the last
        key (bottom-right). With a cache of keys it is the number of keys that came before the first
        query. An array broadcasts to the leading dimensions. Beyond 2**61 either way it counts as
        that.
    kv_lengths : int or array_like of int, optional
        From 0 to K: only so many of the keys are visible. An array broadcasts to the leading
        dimensions.
    window : pair of int or None, optional
        (left, right): the query at position p sees the keys from p - left to p + right. None in the
        pair leaves a side open.
    scale : float, optional
        Multiplies the products of q and k; finite. Default: 1 / sqrt(D).
    softcap : float, optional
        A score s becomes softcap * tanh(s / softcap), before bias; finite and > 0.
    sinks : array_like, [H], optional
        Real numbers: for each head one more score, which takes part in the denominator only.
    alibi_slopes : array_like, [H], optional
        Real numbers: for each head, slope * abs(p - j) is subtracted from the score of key j.
        Distances of 2**24 (float64: 2**53) and more are rounded to the type of the calculation.
    out : ndarray, optional
        Where to put the result; of the shape of the result and the dtype of q. It may share memory
        with the input, which is copied then.
    return_lse : bool, default False
        Also return the logarithm of the denominator of each query, for :func:`merge_attention`.
    return_weights : bool, default False
        Also return the softmax weights: an array as large as all scores.

    Returns
    -------
    ndarray, or a tuple of two or three: out[, lse][, weights]
        out [..., H, Q, Dv] in the dtype of q. lse [..., H, Q] in float32, float64 for float64.
        weights [..., H, Q, K] in the dtype of q, exactly 0 where a query does not see a key. If q,
        k and v are all 2-D, without the dimension H.

        A query depends only on the keys and values that it sees: NaN elsewhere changes nothing, NaN
        seen gives NaN. A query that sees nothing is all zeros, with lse -inf (or its sink).

    Raises
    ------
    TypeError
        For dtypes that are not supported or differ, a masked array, numbers as mask, bool as bias,
        q_offset or kv_lengths not integers, a window that is not a pair of integers or None, out of
        another dtype.
    ValueError
        For shapes that do not fit, kv_lengths out of range, a negative window, a scale that is not
        finite, a softcap that is not finite and > 0, out read-only or overlapping itself.

    See Also
    --------
    merge_attention : The result for two sets of keys from the results for each.
    softmax : The weights alone, from scores of your own.

    Notes
    -----
    This function is for when you need the result alone. Use :func:`softmax`, with its ``bias`` and
    ``where``, if you need the weights (to look at or to change them) or have a score function that
    the options here do not make: ``softmax(scores) @ v``.

    float32: the error is at most ``2**-24 * S * sum(w * abs(v))``, where w are the exact weights
    and ``S = 2 * D * abs(scale) * max(abs(q) @ abs(k)) + 2 * (64 + 4 * ceil(K / 64)) + 16``, plus
    twice the largest bias, ALiBi term or softcap, and once more the ALiBi term of a distance that
    has to be rounded; for a single query (Q = 1) with 128 in the place of 64. float64: the same
    with ``2**-53``. float16 and bfloat16: the calculation is in float32, rounded once, so the
    result is within 1 ulp of that. This holds as long as the products of q and k and the sums of
    ``exp(score - largest) * v``, which are divided in the end, do not overflow that type; bias is
    rounded to it first.

    Where :func:`isa` is "amx", bfloat16 is multiplied in its tiles: the products are exact, their
    sums are float32, but the weights of v have 16 bits, which adds ``2**-17 * sum(w * abs(v))`` to
    the bound, and what is below ``2**-126`` counts as 0, as input, product, sum or weight:
    another ``2**-125 * (K + sum(abs(v)))``. ``FASTSOFTMAX_ISA=avx512`` is as above, and slower.

    The bits of a query's result do not depend on threads, batch, heads, strides, or the other
    queries, except that a single query (Q = 1) is calculated in another order: both results are
    within the bound above.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import attention, softmax
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 5, 16), np.float32)  # each 8 heads, 5 positions
    >>> y = attention(q, k, v)
    >>> weights = softmax(q @ k.swapaxes(-1, -2) / 4)
    >>> np.allclose(y, weights @ v, atol=1e-5)
    True

    The first query of causal attention sees one key, the last one all of them. With a cache, the
    queries still to be done follow the positions that have been:

    >>> y = attention(q, k, v, is_causal=True)
    >>> np.allclose(y[:, 0], v[:, 0], atol=1e-5)
    True
    >>> np.allclose(attention(q[:, 3:], k, v, is_causal=True, q_offset=3), y[:, 3:], atol=1e-5)
    True

    Two sequences in a batch, of which the second has 3 keys and padding:

    >>> batch = np.stack([q, q]), np.stack([k, k]), np.stack([v, v])
    >>> y = attention(*batch, kv_lengths=[5, 3])
    >>> padding = np.arange(5) < np.array([5, 3])[:, None, None, None]
    >>> np.array_equal(y, attention(*batch, mask=padding))
    True
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _attention(q, k, v, mask, bias, _as_flag(is_causal, "is_causal"), q_offset,
                          kv_lengths, window, scale, softcap, sinks, alibi_slopes, out,
                          _as_flag(return_lse, "return_lse"),
                          _as_flag(return_weights, "return_weights"))
    finally:
        fesetenv(&callers)


# ---- merge_attention ----

cdef _merge(out_a, lse_a, out_b, lse_b):
    cdef fsm_merge problem
    cdef int d, ndim
    cdef ptrdiff_t row = 0
    out_a, out_b = _as_floating(out_a, "out_a"), _as_floating(out_b, "out_b")
    lse_a, lse_b = _as_floating(lse_a, "lse_a"), _as_floating(lse_b, "lse_b")
    if out_a.dtype != out_b.dtype:
        raise TypeError("out_a and out_b must have the same dtype, got "
                        f"{out_a.dtype} and {out_b.dtype}")
    shape = out_a.shape
    if not shape or shape != out_b.shape:
        raise ValueError("out_a and out_b must have the same shape, [..., columns], got "
                         f"{shape} and {out_b.shape}")
    compute = _compute_dtype(out_a.dtype, None, None)
    for lse, name in ((lse_a, "lse_a"), (lse_b, "lse_b")):
        if lse.dtype != compute:
            raise TypeError(f"{name} must be {compute}, as attention returns it for "
                            f"{out_a.dtype}, got {lse.dtype}")
        if lse.shape != shape[:-1]:
            raise ValueError(f"{name} must have the shape of out_a and out_b without the last "
                             f"dimension, {shape[:-1]}, got {lse.shape}")

    out, lse = np.empty(shape, out_a.dtype), np.empty(shape[:-1], compute)
    ndim = problem.ndim = len(shape) - 1
    for d in range(ndim):
        problem.shape[d] = shape[d]
    problem.columns = shape[ndim]
    problem.compute = <fsm_dtype><int>_code(compute)
    problem.isa = _active
    problem.threads = get_num_threads()
    _enter(&problem.operand[<int>FSM_MERGE_OUT_A], out_a, ndim + 1)
    _enter(&problem.operand[<int>FSM_MERGE_LSE_A], lse_a, ndim)
    _enter(&problem.operand[<int>FSM_MERGE_OUT_B], out_b, ndim + 1)
    _enter(&problem.operand[<int>FSM_MERGE_LSE_B], lse_b, ndim)
    _enter(&problem.operand[<int>FSM_MERGE_OUT], out, ndim + 1)
    _enter(&problem.operand[<int>FSM_MERGE_LSE], lse, ndim)
    while row >= 0:
        with nogil:
            row = fsm_merge_attention(&problem, row)
        PyErr_CheckSignals()
    return out, lse if lse.ndim else lse[()]


def merge_attention(out_a, lse_a, out_b, lse_b, /):
    """Attention over two sets of keys, from the results of :func:`attention` for each.

    So the keys may come in parts: from a cache and from the prompt, or from several machines.

    Parameters
    ----------
    out_a, out_b : array_like, [..., Dv]
        Results of attention with the same queries: of one shape and one dtype, one of float16,
        bfloat16, float32 and float64.
    lse_a, lse_b : array_like, [...]
        What return_lse gave with them: float32, float64 for float64.

    Returns
    -------
    out, lse : tuple of two ndarrays (lse of a single row: a NumPy scalar)
        ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = out_a * exp(lse_a - lse) + out_b *
        exp(lse_b - lse)``, of the shapes and dtypes of the input. A part with lse -inf, whose query
        saw nothing, contributes nothing, whatever its out holds; if both are, the row is zeros, and
        -inf. A NaN in lse_a or lse_b makes the row NaN.

    Raises
    ------
    TypeError
        For dtypes that are not supported or do not go together, a masked array.
    ValueError
        For shapes that do not go together.

    See Also
    --------
    attention

    Notes
    -----
    Give sinks to one of the two calls of attention only, or they count twice, and q_offset as each
    part of the keys asks for: its keys are counted from 0.

    If the two lse together are off by e, the result is off by up to ``e / 4 * abs(out_a - out_b)``,
    besides the errors of out_a and out_b themselves. As with attention, its bits depend on the
    row's input alone.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import attention, merge_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 5, 16), np.float32)  # each 8 heads, 5 positions
    >>> a = attention(q, k[:, :3], v[:, :3], return_lse=True)
    >>> b = attention(q, k[:, 3:], v[:, 3:], return_lse=True)
    >>> out, lse = merge_attention(*a, *b)
    >>> np.allclose(out, attention(q, k, v), atol=1e-5)
    True
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _merge(out_a, lse_a, out_b, lse_b)
    finally:
        fesetenv(&callers)
