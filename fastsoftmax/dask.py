"""Softmax and attention over dask arrays: larger than memory, on many machines.

Lazy: the functions here build graphs of dask's own building blocks, in which each task is a call of
fastsoftmax on one chunk. Needs the extra ``fastsoftmax[dask]``.

softmax, log_softmax and logsumexp have the bits of the same call on the whole array, however it is
chunked. Where the axis is chunked, each chunk is read three times: for its maximum, for its sum of
exponentials relative to the maximum of the whole row, and for the result; maxima and sums meet in
trees. The sums are exact, in integers, so that no order of adding them can change a bit.

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
import math

import dask
import dask.array as da
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from . import _core

__all__ = ["attention", "log_softmax", "logsumexp", "softmax"]


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
        dask array, ValueError also if the axis has chunks of unknown sizes.

    Examples
    --------
    >>> import dask.array as da
    >>> import fastsoftmax.dask as fsd
    >>> fsd.softmax(da.asarray([1.0, 2.0, 3.0]).rechunk(2)).compute().round(4)
    array([0.09  , 0.2447, 0.6652])
    """
    return _rows("softmax", x, *_checked(x, axis, temperature, dtype), temperature)


def log_softmax(x, /, axis=-1, *, temperature=None, dtype=None):
    """Logarithm of softmax along an axis of a dask array, which may be chunked.

    Parameters
    ----------
    x, axis, temperature, dtype
        As for :func:`softmax`.

    Returns
    -------
    dask array
        As for :func:`softmax`.

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
    return _rows("log_softmax", x, *_checked(x, axis, temperature, dtype), temperature)


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
        Without the axes, unless keepdims.

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
    keepdims = _core._as_flag(keepdims, "keepdims")
    axes, result = _checked(x, axis, None, dtype)
    y = _rows("logsumexp", x, axes, result)
    return y if keepdims else y[tuple(0 if d in axes else slice(None) for d in range(x.ndim))]


def attention(
    q, k, v, /, *, mask=None, bias=None, is_causal=False, q_offset=0, kv_lengths=None, window=None,
    scale=None, softcap=None, sinks=None, alibi_slopes=None,
):  # fmt: skip
    """Attention over dask arrays whose sequences may be chunked.

    Every chunk of queries meets every chunk of keys in a call of :func:`fastsoftmax.attention`,
    at its place in the sequence; the results are joined by :func:`fastsoftmax.merge_attention`.

    Parameters
    ----------
    q, k, v : dask array, [..., H, Q, D], [..., G, K, D] and [..., G, K, Dv]
        As for :func:`fastsoftmax.attention`, with the same leading dimensions, of which those of k
        and v take the chunks of q. Any chunks of Q and K; heads and columns are made one chunk.
    mask, bias : dask array or array_like, optional
        As for :func:`fastsoftmax.attention`, of the whole arrays: they broadcast to [..., H, Q, K],
        and are cut as q and k are.
    is_causal, window, scale, softcap, sinks, alibi_slopes
        As for :func:`fastsoftmax.attention`.
    q_offset : int, default 0
        As for :func:`fastsoftmax.attention`, of the first query of the whole array.
    kv_lengths : int or array_like of int, optional
        As for :func:`fastsoftmax.attention`, of the whole arrays.

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
    With K in one chunk the bits are those of one call, but for chunks of a single query, which is
    calculated in another order. Else the parts are calculated and merged in
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
        if math.isnan(math.prod(array.shape)):
            raise ValueError(f"{name} has chunks of unknown sizes; call its compute_chunk_sizes()")
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError("the dimensions of q, k and v before the heads must be the same, got "
                         f"{q.shape}, {k.shape} and {v.shape}")  # fmt: skip
    if isinstance(q_offset, bool) or not isinstance(q_offset, int | np.integer):
        raise TypeError(f"q_offset must be an integer, got {type(q_offset).__name__}")
    q_offset, offsets = int(q_offset), _core._INT64
    if not offsets.min <= q_offset <= offsets.max:
        raise ValueError(f"q_offset must be from {offsets.min} to {offsets.max}, got {q_offset}")
    # As far as that they all are alike, and positions can be added.
    q_offset = min(max(q_offset, -_core._FARTHEST), _core._FARTHEST)
    options = {"is_causal": is_causal, "window": window, "scale": scale, "softcap": softcap,
               "sinks": sinks, "alibi_slopes": alibi_slopes}  # fmt: skip
    # One position of each finds out what is wrong with the rest.
    one = [
        np.zeros((*a.shape[-3:-2], min(1, a.shape[-2]), a.shape[-1]), a.dtype) for a in (q, k, v)
    ]
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of keys, got {k.shape}, {v.shape}")
    scores = (*q.shape[:-1], k.shape[-2])
    masks = {
        name: _for_scores(array, name, scores)
        for name, array in (("mask", mask), ("bias", bias))
        if array is not None
    }
    hiding = {name: np.ones((1, 1, 1), array.dtype) for name, array in masks.items()}
    _core.attention(*one, **options, **hiding)
    lengths = None if kv_lengths is None else _lengths(kv_lengths, q.shape[:-3], k.shape[-2])

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
    positions = np.cumsum([0, *q.chunks[-2][:-1]]) + q_offset
    positions = da.from_array(positions, chunks=1)
    cut = q.chunks[:-1]  # of scores, but for the keys
    more = []  # arrays that each part gets, and their letters
    if lengths is not None:
        more += da.from_array(lengths, chunks=q.chunks[:lead]), letters
    for name, array in masks.items():
        chunks = [(1,) if n == 1 else c for c, n in zip((*cut, -1), array.shape, strict=True)]
        masks[name] = array.rechunk(dict(enumerate(chunks)))
    names = ["kv_lengths"] * (lengths is not None) + list(masks)
    parts = []
    for first, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False):
        keys = slice(first, first + size)
        attend = functools.partial(
            _attend, names=names, first=first, single=single, threads=_threads(), **options
        )
        hidden = []
        for array in masks.values():
            hidden += (
                array[..., keys] if array.shape[-1] > 1 else array,
                (*letters, head, query, key),
            )
        parts.append(
            da.blockwise(
                attend,
                (*letters, head, query, packed),
                q, (*letters, head, query, column),
                k[..., keys, :], (*letters, kv_head, key, column),
                v[..., keys, :], (*letters, kv_head, key, v_column),
                positions, (query,),
                *more, *hidden,
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
    name = "fastsoftmax.num-threads"
    given = dask.config.get(name, 1)
    try:
        threads = int(given)
        _core.num_threads(threads)  # looks whether it is one
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} of dask.config is {given!r}: {error}") from None
    return threads


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


def _rows(name, x, axes, result, temperature=None):
    """The function of that name; of logsumexp the axes stay, with length 1."""
    threads, meta, reduces = _threads(), _meta(x, result), name == "logsumexp"
    if all(x.numblocks[d] == 1 for d in axes):
        options = {"keepdims": True} if reduces else {"temperature": temperature}
        chunks = (c if d not in axes or not reduces else (1,) for d, c in enumerate(x.chunks))
        return x.map_blocks(
            _call, getattr(_core, name), axes, threads, options | {"dtype": result},
            chunks=tuple(chunks), dtype=result, meta=meta,
        )  # fmt: skip
    whole = math.prod(x.shape[d] for d in axes)
    if math.isnan(whole):
        raise ValueError("x has chunks of unknown sizes along axis; call its compute_chunk_sizes()")
    narrow = x.dtype.name in ("float16", "bfloat16", "float32") and result != np.float64
    compute = np.dtype(np.float32 if narrow else np.float64)

    as_rows = {"axes": axes, "temperature": temperature, "compute": compute}
    row = {"name": name, "whole": whole, "threads": threads}
    letters, part = tuple(range(x.ndim)), x.ndim
    top = da.reduction(
        x,
        chunk=functools.partial(_top, temperature=temperature, compute=compute),
        combine=_largest,
        aggregate=_largest,
        axis=axes,
        keepdims=True,
        dtype=compute,
        meta=_meta(x, compute),
    )
    sums = da.blockwise(
        functools.partial(_sums, as_rows=as_rows, **row), (*letters, part),
        x, letters, top, letters,
        new_axes={part: 5}, adjust_chunks=dict.fromkeys(axes, 1), align_arrays=False,
        dtype=np.int64, meta=np.empty((0,) * (part + 1), np.int64),
    ).sum(axis=axes, keepdims=True)  # fmt: skip
    return da.blockwise(
        functools.partial(_results, as_rows=as_rows, dtype=result, **row), letters,
        *(() if reduces else (x, letters)), top, letters, sums, (*letters, part),
        concatenate=True, align_arrays=False, dtype=result, meta=meta,
    )  # fmt: skip


def _call(x, function, axes, threads, options):
    with _core.num_threads(threads):
        return function(x, axes, **options)


def _scaled(x, temperature, compute):
    """x / temperature as fastsoftmax computes it, and in its type."""
    with np.errstate(all="ignore"):
        x = x.astype(compute, copy=False)
        return x if temperature is None else x * np.asarray(1 / np.float64(temperature), compute)


def _top(x, axis, keepdims, temperature, compute):
    """The maximum of each row of a chunk; that of its quotients, since rounding keeps the order."""
    x = _core._as_array(x, "x").astype(compute, copy=False)
    return _scaled(np.max(x, axis, keepdims=keepdims, initial=-np.inf), temperature, compute)


def _largest(top, axis, keepdims):
    return np.max(top, axis, keepdims=keepdims)


def _as_rows(x, axes, temperature, compute):
    """A chunk with the axes last, and as rows [rows, n] of a type that C takes as it is."""
    x = np.moveaxis(_core._as_array(x, "x"), axes, range(-len(axes), 0))
    if temperature is not None or compute == np.float64:
        x = _scaled(x, temperature, compute)
    n = math.prod(x.shape[x.ndim - len(axes) :])
    return x, x.reshape(x.size // max(1, n), n)


def _sums(x, top, name, whole, threads, as_rows):
    """The exact sum of exp(x - top) of each row of a chunk: integers, in one more dimension."""
    with _core.num_threads(threads):
        sums = _core._sums_of_parts(name, _as_rows(x, **as_rows)[1], top.ravel(), whole)
    return sums.reshape(*top.shape, sums.shape[1])


def _results(*arrays, name, whole, threads, as_rows, dtype):
    """The results of a chunk, if it is given, or else of whole rows."""
    *x, top, sums = arrays
    x, rows = _as_rows(*x, **as_rows) if x else (None, None)
    sums = sums.reshape(top.size, sums.shape[-1])
    with _core.num_threads(threads):
        y = _core._results_of_parts(name, rows, top.ravel(), sums, whole, dtype)
    if x is None:
        return y.reshape(top.shape)
    axes = as_rows["axes"]
    return np.moveaxis(y.reshape(x.shape), range(-len(axes), 0), axes)


# --- attention ------------------------------------------------------------------------------------


def _for_scores(array, name, scores):
    """A mask or bias as a dask array of as many dimensions as the scores have."""
    if not isinstance(array, da.Array):
        array = da.from_array(_core._as_array(array, name), chunks=-1)
    shape = (1,) * (len(scores) - array.ndim) + array.shape
    if len(shape) > len(scores) or any(n not in (1, m) for n, m in zip(shape, scores, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, which does not broadcast to the scores, "
                         f"{scores}")  # fmt: skip
    return array[(np.newaxis,) * (len(scores) - array.ndim)]


def _lengths(kv_lengths, lead, keys):
    """kv_lengths of each leading index."""
    lengths = _core._converted(kv_lengths, "kv_lengths")
    if lengths.dtype.kind not in "iu" or _core._is_masked(kv_lengths):
        raise TypeError(f"kv_lengths must be integers, got {lengths.dtype}")
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= keys:
        raise ValueError(f"kv_lengths must be from 0 to {keys}, the number of keys, got "
                         f"{lengths.min()} to {lengths.max()}")  # fmt: skip
    try:
        return np.broadcast_to(lengths.astype(np.int64), lead)
    except ValueError:
        raise ValueError(f"kv_lengths has shape {lengths.shape}, which does not broadcast to the "
                         f"dimensions before the heads, {lead}") from None  # fmt: skip


def _attend(q, k, v, position, *more, names, first, single, threads, **options):
    """Out of a chunk of queries and one of keys; with the lse as one more column unless single."""
    options["q_offset"] = int(position[0]) - first
    options |= dict(zip(names, more, strict=True))
    if "kv_lengths" in options:
        options["kv_lengths"] = np.clip(options["kv_lengths"] - first, 0, k.shape[-2])
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
