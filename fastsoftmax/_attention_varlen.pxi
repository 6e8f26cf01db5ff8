# attention_varlen: a part of _core.pyx, whose helpers it shares.

cdef ndarray _as_starts(value, name, total, tokens):
    """int64, contiguous: where each packed sequence begins, and where the last one ends."""
    array = _as_integers(value, name, "an array of integers")
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {array.shape}")
    if array[0] != 0 or array[-1] != total:
        raise ValueError(f"{name} must begin with 0 and end with {total}, the number of {tokens}, "
                         f"got {array[0]} and {array[-1]}")
    if (array[1:] < array[:-1]).any():
        at = (array[1:] < array[:-1]).argmax()
        raise ValueError(f"{name} must not decrease, got {array[at]} and then {array[at + 1]}")
    return np.ascontiguousarray(array, np.int64)


cdef _longest(starts):
    return int(np.diff(starts).max(initial=0))


cdef _batch(packed, n, longest):
    heads = packed.swapaxes(0, 1)[:, :longest]
    return np.broadcast_to(heads, (n, *heads.shape))


cdef _unless_shared(value, name, out):
    """value, or a copy of it if it shares memory with out."""
    if out is None or value is None or isinstance(value, int) or _is_masked(value):
        return value
    array = _converted(value, name)
    return array.copy() if np.may_share_memory(array, out) else array


cdef _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias, bint causal, q_offset,
                       kv_lengths, window, scale, softcap, sinks, slopes, out, bint with_lse):
    cdef fsm_attention problem
    cdef ndarray q_starts, k_starts, held = _as_out(out)
    packed = []
    for array, name in ((q, "q"), (k, "k"), (v, "v")):
        array = _as_floating(array, name)
        if array.ndim != 3:
            raise ValueError(f"{name} must have shape [total, heads, columns], got {array.shape}")
        packed.append(array)
    q, k, v = packed
    q_starts = _as_starts(cu_seqlens_q, "cu_seqlens_q", q.shape[0], "queries")
    k_starts = _as_starts(cu_seqlens_k, "cu_seqlens_k", k.shape[0], "keys")
    if k.shape[0] != v.shape[0]:
        raise ValueError("k and v must have the same number of keys; of shape [total, heads, "
                         f"columns], k has {k.shape}, v has {v.shape}")
    if q_starts.size != k_starts.size:
        raise ValueError("cu_seqlens_q and cu_seqlens_k must have the same length, sequences + 1, "
                         f"got {q_starts.size} and {k_starts.size}")
    shape = q.shape[:2] + v.shape[2:]
    if out is not None:
        if held.dtype != q.dtype:
            raise TypeError(f"out must have the dtype of q, {q.dtype}, got {held.dtype}")
        _check_out(held, shape)
        shared = []
        for value, name in ((q, "q"), (k, "k"), (v, "v"), (mask, "mask"), (bias, "bias"),
                            (q_offset, "q_offset"), (kv_lengths, "kv_lengths"), (sinks, "sinks"),
                            (slopes, "alibi_slopes")):
            shared.append(_unless_shared(value, name, held))
        q, k, v, mask, bias, q_offset, kv_lengths, sinks, slopes = shared

    # To the checks this is a batch in which every sequence is as long as the longest. C moves the
    # first query and key of each to where it begins, and stops where it ends.
    n = q_starts.size - 1
    steps = q.strides[0], k.strides[0], v.strides[0]
    longest_q, longest_k = _longest(q_starts), _longest(k_starts)
    q, k, v = _batch(q, n, longest_q), _batch(k, n, longest_k), _batch(v, n, longest_k)
    arrays, _, _, _, compute = _enter_attention(
        &problem, q, k, v, mask, bias, causal, q_offset, kv_lengths, window, scale, softcap, sinks,
        slopes, None)
    # Broadcast dimensions of one element have no stride; but there may be sequences behind it.
    problem.operand[<int>FSM_ATTN_Q].strides[2] = steps[0]
    problem.operand[<int>FSM_ATTN_K].strides[2] = steps[1]
    problem.operand[<int>FSM_ATTN_V].strides[2] = steps[2]
    if kv_lengths is not None:
        lengths, keys = np.broadcast_to(arrays[6], (n,)), np.diff(k_starts)
        if (lengths > keys).any():
            at = (lengths > keys).argmax()
            raise ValueError("kv_lengths must be from 0 to the number of keys of each sequence, "
                             f"got {lengths[at]} for sequence {at}, which has {keys[at]}")
    y = np.empty(shape, q.dtype) if out is None else held
    lse = np.empty(shape[:2], compute) if with_lse else None
    _enter(&problem.operand[<int>FSM_ATTN_OUT], y.swapaxes(0, 1), 4)
    _enter(&problem.operand[<int>FSM_ATTN_LSE], None if lse is None else lse.swapaxes(0, 1), 3)
    problem.operand[<int>FSM_ATTN_WEIGHTS].data = NULL
    _run_attention(&problem, <const int64_t *>PyArray_DATA(q_starts),
                   <const int64_t *>PyArray_DATA(k_starts))
    first = y if out is None else out
    return (first, lse) if with_lse else first


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, /, *, mask=None, bias=None,
                     is_causal=False, q_offset=0, kv_lengths=None, window=None, scale=None,
                     softcap=None, sinks=None, alibi_slopes=None, out=None, return_lse=False):
    """Attention within each of several sequences of any lengths, packed one behind the other.

    As :func:`attention` for each sequence, to the bit, without padding and in one call, whose
    threads share the work evenly whatever the lengths are.

    Below, N is the number of sequences, H the number of heads of q, and G that of k and v.

    Parameters
    ----------
    q : array_like, [total_q, H, D]
        The queries of all sequences: float16, bfloat16 (of ml_dtypes), float32 or float64; any
        strides.
    k, v : array_like, [total_k, G, D] and [total_k, G, Dv]
        The keys and values of all sequences, of the dtype of q. G divides H.
    cu_seqlens_q, cu_seqlens_k : array_like of int, [N + 1]
        Cumulative lengths: sequence i has the queries from cu_seqlens_q[i] to cu_seqlens_q[i + 1],
        and likewise its keys. Both begin with 0, do not decrease, and end with total_q and total_k.
        A sequence may have no queries or no keys.
    mask, bias : array_like, optional
        As for :func:`attention` in a padded batch: they broadcast to [N, H, Q, K], where Q and K
        are the queries and keys of the longest sequences. A shorter sequence uses the first rows
        and columns of its own.
    is_causal : bool, default False
        The query at position p sees the keys of its sequence up to p only. See q_offset.
    q_offset : int or array_like of int, [N], default 0
        The position of each sequence's first query, its first key being at 0. The queries of
        sequences that have more keys than queries come last, as in flash-attn, with
        ``np.diff(cu_seqlens_k) - np.diff(cu_seqlens_q)``.
    kv_lengths : int or array_like of int, [N], optional
        Only so many of each sequence's keys are visible (seqused_k in flash-attn).
    window, scale, softcap, sinks, alibi_slopes
        As for :func:`attention`, the same for all sequences.
    out : ndarray, [total_q, H, Dv], optional
        Where to put the result; of the dtype of q. It may share memory with the input, which is
        copied then.
    return_lse : bool, default False
        Also return the logarithm of the denominator of each query.

    Returns
    -------
    ndarray, or a tuple of two: out[, lse]
        out [total_q, H, Dv] in the dtype of q. lse [total_q, H], which is how
        :func:`merge_attention` takes it (flash-attn has its transpose), in float32, float64 for
        float64.

    Raises
    ------
    TypeError
        As for :func:`attention`, and for cumulative lengths that are not integers.
    ValueError
        As for :func:`attention`, and for cumulative lengths that do not begin with 0, decrease, end
        elsewhere, or are not as many for keys as for queries.

    See Also
    --------
    attention : One sequence, or a batch of the same length.

    Notes
    -----
    The weights are not returned: they would be ragged. Call :func:`attention` for a sequence whose
    weights you want to see. As there, a single query (a sequence of Q = 1) is calculated in another
    order than several, and the bounds of the error are the same.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import attention, attention_varlen
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 9, 4, 16), np.float32)  # 9 positions, 4 heads
    >>> starts = [0, 5, 5, 9]  # three sequences, of 5, 0 and 4 positions
    >>> y = attention_varlen(q, k, v, starts, starts, is_causal=True)
    >>> last = (x[5:].swapaxes(0, 1) for x in (q, k, v))
    >>> np.array_equal(y[5:], attention(*last, is_causal=True).swapaxes(0, 1))
    True
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, mask, bias,
                                 _as_flag(is_causal, "is_causal"), q_offset, kv_lengths, window,
                                 scale, softcap, sinks, alibi_slopes, out,
                                 _as_flag(return_lse, "return_lse"))
    finally:
        fesetenv(&callers)
