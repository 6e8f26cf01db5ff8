"""Softmax and attention over dask arrays: larger than memory, on many machines.

Lazy: the functions here build graphs of dask's own building blocks, in which each task is a call of
fastsoftmax on one chunk. Needs the extra ``fastsoftmax[dask]``.

Where every row lies in one chunk, a result has the bits of the same call on the whole array. Where
the axis is chunked, a row is read twice: for the maximum and the sum of exponentials of each chunk,
merged in a tree, and for the result. It is calculated in float64 throughout and rounded once. So
float16, bfloat16 and float32 results are within 0.51 ulp of the exact ones, but float64 results
only within 8 ulp, and last bits depend on the chunks, as sums of float64 do.

Threads: the tasks run side by side, so each of them uses one thread, whatever ``set_num_threads``
says, and no more threads run than dask has. For few, large tasks let each use more, and have dask
run fewer: ``dask.config.set({"fastsoftmax.num-threads": 4})`` while the graph is built; workers'
threads times this number should not exceed the CPUs.

>>> import dask.array as da, numpy as np
>>> import fastsoftmax.dask as fsd
>>> x = da.random.default_rng(0).standard_normal((4, 1000), chunks=(2, 300))
>>> y = fsd.softmax(x)
>>> y.chunks == x.chunks, bool(np.allclose(y.sum(axis=1).compute(), 1))
(True, True)
"""

import functools

import dask
import dask.array as da
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from . import _core

__all__ = ["attention", "log_softmax", "logsumexp", "softmax"]

# Of a part of a row: its maximum, and the sum of exp(x - maximum), which is 0 without an entry
# above -inf and means nothing if the maximum is NaN or inf.
_STATE = np.dtype([("max", np.float64), ("sum", np.float64)])


def softmax(x, /, axis=-1, *, temperature=None, dtype=None):
    """Softmax along an axis of a dask array, which may be chunked.

    Parameters
    ----------
    x : dask array
        Logits, of a dtype that :func:`fastsoftmax.softmax` takes.
    axis : int, tuple of ints or None, default -1
        The axis or axes along which the result sums to 1; None means all.
    temperature : float, optional
        Divides the logits; finite and > 0.
    dtype : dtype, optional
        Type of the result. Default: that of x, float64 for integers.

    Returns
    -------
    dask array
        Of the shape and the chunks of x, with the special values of :func:`fastsoftmax.softmax`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`fastsoftmax.softmax`, when the graph is built; TypeError also if x is not a
        dask array.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastsoftmax.dask as fsd
    >>> fsd.softmax(da.asarray([1.0, 2.0, 3.0]).rechunk(2)).compute().round(4)
    array([0.09  , 0.2447, 0.6652])
    """
    return _rows(_core.softmax, _softmax_of, x, axis, temperature, dtype)


def log_softmax(x, /, axis=-1, *, temperature=None, dtype=None):
    """Logarithm of softmax along an axis of a dask array, which may be chunked.

    Parameters
    ----------
    x, axis, temperature, dtype
        As for :func:`softmax`.

    Returns
    -------
    dask array
        As for :func:`softmax`. Where the axis is chunked the error is at most 8 * 2**-53 *
        ``max(1, max|x|, |result|)`` before rounding.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastsoftmax.dask as fsd
    >>> fsd.log_softmax(da.asarray([1.0, 2.0, 3.0]).rechunk(2)).compute().round(4)
    array([-2.4076, -1.4076, -0.4076])
    """
    return _rows(_core.log_softmax, _log_softmax_of, x, axis, temperature, dtype)


def logsumexp(x, /, axis=None, *, keepdims=False, dtype=None):
    """Logarithm of the sum of exponentials along an axis of a dask array, which may be chunked.

    Parameters
    ----------
    x : dask array
        As for :func:`softmax`.
    axis : int, tuple of ints or None, default None
        The axis or axes to sum over; None means all.
    keepdims : bool, default False
        Leave the reduced axes in the result, with length 1.
    dtype : dtype, optional
        As for :func:`softmax`.

    Returns
    -------
    dask array
        Without the axes, unless keepdims. The error is that of :func:`log_softmax`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastsoftmax.dask as fsd
    >>> float(fsd.logsumexp(da.asarray([1000.0, 1000.0]).rechunk(1)).compute().round(4))
    1000.6931
    """
    axes, result = _checked(x, axis, None, dtype)
    state = _state_of_rows(x, axes, None, _threads())
    y = da.map_blocks(_logsumexp_of, state, result, dtype=result, meta=_meta(state, result))
    return y if keepdims else y[tuple(0 if d in axes else slice(None) for d in range(x.ndim))]


def attention(
    q, k, v, /, *, is_causal=False, q_offset=0, window=None, scale=None, softcap=None, sinks=None,
    alibi_slopes=None,
):  # fmt: skip
    """Attention over dask arrays whose sequences may be chunked.

    Every chunk of queries meets every chunk of keys in a call of :func:`fastsoftmax.attention`,
    at its place in the sequence; the results are joined by :func:`fastsoftmax.merge_attention`.

    Parameters
    ----------
    q, k, v : dask array, [..., H, Q, D], [..., G, K, D] and [..., G, K, Dv]
        As for :func:`fastsoftmax.attention`, with the same leading dimensions, of which those of k
        and v take the chunks of q. Any chunks of Q and K; heads and columns are made one chunk.
    is_causal, window, scale, softcap, sinks, alibi_slopes
        As for :func:`fastsoftmax.attention`.
    q_offset : int, default 0
        As for :func:`fastsoftmax.attention`, of the first query of the whole array.

    Returns
    -------
    dask array, [..., H, Q, Dv]
        In the dtype of q, with the chunks of q.

    Raises
    ------
    TypeError, ValueError
        As for :func:`fastsoftmax.attention`, when the graph is built; TypeError also for what is
        not a dask array.

    Notes
    -----
    With K in one chunk the bits are those of one call. Else the parts are calculated and merged in
    the type of the calculation, float32 or float64, and rounded once; besides the bound of
    :func:`fastsoftmax.attention`, the error is at most ``n * 2**-22 * max(1, abs(lse)) *
    max(abs(v))`` (float64: ``n * 2**-51``) for n levels of the tree of merges.

    Examples
    --------
    >>> import dask.array as da, numpy as np
    >>> import fastsoftmax, fastsoftmax.dask as fsd
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 50, 16), np.float32)
    >>> y = fsd.attention(*(da.asarray(a).rechunk((8, 20, 16)) for a in (q, k, v)), is_causal=True)
    >>> np.allclose(y.compute(), fastsoftmax.attention(q, k, v, is_causal=True), atol=1e-6)
    True
    """
    for array, name in ((q, "q"), (k, "k"), (v, "v")):
        _check_dask(array, name)
        if array.ndim < 3:
            raise ValueError(f"{name} must have shape [..., heads, positions, columns], got "
                             f"{array.shape}")  # fmt: skip
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError("the dimensions of q, k and v before the heads must be the same, got "
                         f"{q.shape}, {k.shape} and {v.shape}")  # fmt: skip
    if isinstance(q_offset, bool) or not isinstance(q_offset, int | np.integer):
        raise TypeError(f"q_offset must be an integer, got {type(q_offset).__name__}")
    options = {"is_causal": is_causal, "window": window, "scale": scale, "softcap": softcap,
               "sinks": sinks, "alibi_slopes": alibi_slopes}  # fmt: skip
    # One position of each finds out what is wrong with the rest.
    one = [
        np.zeros((*a.shape[-3:-2], min(1, a.shape[-2]), a.shape[-1]), a.dtype) for a in (q, k, v)
    ]
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of keys, got {k.shape}, {v.shape}")
    _core.attention(*one, **options)

    lead = q.ndim - 3
    whole = {lead: -1, lead + 2: -1}
    q = q.rechunk(whole)
    leading = dict(enumerate(q.chunks[:lead]))
    k = k.rechunk(whole | leading)
    v = v.rechunk(whole | leading | {lead + 1: k.chunks[-2]})
    sizes = k.chunks[-2]
    single = len(sizes) == 1
    real = np.float64 if q.dtype == np.float64 else np.float32
    letters = tuple(range(lead))
    head, query, column, packed, kv_head, key, v_column = range(lead, lead + 7)
    positions = np.cumsum([0, *q.chunks[-2][:-1]]) + int(q_offset)
    positions = da.from_array(positions, chunks=1)
    parts = []
    for first, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        keys = slice(first, first + size)
        attend = functools.partial(
            _attend, first=first, single=single, threads=_threads(), **options
        )
        parts.append(
            da.blockwise(
                attend,
                (*letters, head, query, packed),
                q, (*letters, head, query, column),
                k[..., keys, :], (*letters, kv_head, key, column),
                v[..., keys, :], (*letters, kv_head, key, v_column),
                positions, (query,),
                new_axes={packed: v.shape[-1] + (not single)},
                concatenate=True,
                align_arrays=False,
                dtype=q.dtype if single else real,
                meta=np.empty((0,) * q.ndim, q.dtype if single else real),
            )
        )  # fmt: skip
        options["sinks"] = None  # they count once
    if single:
        return parts[0]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        left = parts[len(parts) // 2 * 2 :]
        merged = [
            da.map_blocks(_merge, a, b, _threads(), dtype=real, meta=a._meta) for a, b in pairs
        ]
        parts = merged + left
    return parts[0][..., :-1].astype(q.dtype)


# --- rows -----------------------------------------------------------------------------------------


def _threads():
    return int(dask.config.get("fastsoftmax.num-threads", 1))


def _check_dask(x, name):
    if not isinstance(x, da.Array):
        raise TypeError(f"{name} must be a dask array, got {type(x).__name__}")


def _checked(x, axis, temperature, dtype):
    """Return the axes and the dtype of the result, if the arguments are right."""
    _check_dask(x, "x")
    if temperature is not None and np.ndim(temperature):
        raise ValueError(f"temperature must be a number, got shape {np.shape(temperature)}")
    one = np.zeros((1,) * x.ndim, x.dtype)
    result = _core.softmax(one, axis, temperature=temperature, dtype=dtype).dtype
    axes = range(x.ndim) if axis is None else axis if x.ndim else ()
    return normalize_axis_tuple(tuple(axes) if not np.isscalar(axes) else axes, x.ndim), result


def _meta(x, dtype):
    return np.empty((0,) * x.ndim, dtype)


def _rows(function, last_pass, x, axis, temperature, dtype):
    axes, result = _checked(x, axis, temperature, dtype)
    threads, meta = _threads(), _meta(x, result)
    if all(x.numblocks[d] == 1 for d in axes):
        options = {"temperature": temperature, "dtype": result}
        return x.map_blocks(_call, function, axes, threads, options, dtype=result, meta=meta)
    state = _state_of_rows(x, axes, temperature, threads)
    return da.map_blocks(
        last_pass, x, state, axes, temperature, result, threads, dtype=result, meta=meta
    )


def _call(x, function, axes, threads, options):
    with _core.num_threads(threads):
        return function(x, axes, **options)


def _state_of_rows(x, axes, temperature, threads):
    return da.reduction(
        x,
        chunk=functools.partial(_state, temperature=temperature, threads=threads),
        combine=_merge_states,
        aggregate=_merge_states,
        axis=axes,
        keepdims=True,
        dtype=_STATE,
        meta=_meta(x, _STATE),
    )


def _logits(x, temperature):
    """x / temperature, as fastsoftmax has it in float64."""
    x = np.asarray(x).astype(np.float64)
    return x if temperature is None else x * (1 / float(temperature))


def _state(x, axis, keepdims, temperature, threads):
    """The state of each row of a chunk."""
    return _part(x, axis, temperature, threads)[1]


def _part(x, axis, temperature, threads):
    """Softmax of each row of a chunk, and its state: exp(0) = 1 made the largest, 1 / sum."""
    z = _logits(x, temperature)
    y = _call(z, _core.softmax, axis, threads, {})
    top = np.max(y, axis, keepdims=True, initial=0)
    state = np.zeros(top.shape, _STATE)
    state["max"] = np.max(z, axis, keepdims=True, initial=-np.inf)
    with np.errstate(all="ignore"):
        np.divide(1, top, out=state["sum"], where=np.isfinite(state["max"]))
    return y, state


def _merge_states(states, axis, keepdims):
    merged = np.zeros(np.max(states["max"], axis, keepdims=True, initial=0).shape, _STATE)
    merged["max"] = np.max(states["max"], axis, keepdims=True, initial=-np.inf)
    merged["sum"] = np.sum(_weight(states, merged["max"]), axis, keepdims=True)
    return merged


def _weight(state, top):
    """The sum of a part as a part of a row whose maximum is `top`; 0 if it has nothing above -inf.

    exp(d) would be off by what d loses: |d| / 2 ulp (the two-sum is Knuth's).
    """
    with np.errstate(all="ignore"):
        d = state["max"] - top
        t = d - state["max"]
        lost = (state["max"] - (d - t)) - (top + t)
        weight = state["sum"] * np.exp(d) * (1 + np.where(np.isfinite(lost), lost, 0))
    return np.where(state["max"] == -np.inf, 0, weight)


def _softmax_of(x, state, axes, temperature, dtype, threads):
    y, own = _part(x, axes, temperature, threads)
    with np.errstate(all="ignore"):
        y *= _weight(own, state["max"]) / state["sum"]
        y[np.broadcast_to(own["max"] == -np.inf, y.shape)] = 0
        np.copyto(y, np.nan, where=~np.isfinite(state["max"]))
        return y.astype(dtype)


def _log_softmax_of(x, state, axes, temperature, dtype, threads):
    with np.errstate(all="ignore"):
        y = _logits(x, temperature) - state["max"] - np.log(state["sum"])
        np.copyto(y, np.nan, where=~np.isfinite(state["max"]))
        return y.astype(dtype)


def _logsumexp_of(state, dtype):
    with np.errstate(all="ignore"):
        lse = state["max"] + np.log(state["sum"])
        return np.where(np.isfinite(state["max"]), lse, state["max"]).astype(dtype)


# --- attention ------------------------------------------------------------------------------------


def _attend(q, k, v, position, *, first, single, threads, **options):
    """Out of a chunk of queries and one of keys; with the lse as one more column unless single."""
    options["q_offset"] = int(position[0]) - first
    if single:
        with _core.num_threads(threads):
            return _core.attention(q, k, v, **options)
    real = np.float64 if q.dtype == np.float64 else np.float32
    q, k, v = (a.astype(real, copy=False) for a in (q, k, v))
    result = np.empty((*q.shape[:-1], v.shape[-1] + 1), real)
    with _core.num_threads(threads):
        _, result[..., -1] = _core.attention(
            q, k, v, **options, out=result[..., :-1], return_lse=True
        )
    return result


def _merge(a, b, threads):
    result = np.empty_like(a)
    with _core.num_threads(threads):
        out, lse = _core.merge_attention(a[..., :-1], a[..., -1], b[..., :-1], b[..., -1])
    result[..., :-1], result[..., -1] = out, lse
    return result
