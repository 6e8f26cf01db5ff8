# Copyright (c) the fastsoftmax developers. SPDX-License-Identifier: BSD-3-Clause
"""What every function computes, written to be read: NumPy in high precision, no speed, no C.

Parameters mean what they mean in the public functions. In addition ``precise`` names the type in
which the oracle calculates and returns: float64 tells how far a float32 result is off, longdouble
(where it is wider) a float64 one. Nothing is rounded to the result's type; ``dtype`` only takes
part in the choice of the compute type. `ulp_error` and `attention_bound` compare.

The one rounding that belongs to softmax and its kin is that of the logits. With r = 1/temperature,

    z = fma(x, r, bias)        rounded once, to the compute type: float32 or float64

and the functions are, mathematically, functions of z over the entries that take part.

>>> import numpy as np
>>> softmax([1.0, 2.0, 3.0]).round(4)
array([0.09  , 0.2447, 0.6652])
>>> softmax([1.0, 2.0, 3.0], temperature=2).round(3)
array([0.186, 0.307, 0.506])
"""

import functools
import math
from fractions import Fraction

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

__all__ = [
    "attention",
    "attention_bound",
    "attention_varlen",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "merge_attention",
    "softmax",
    "softmax_backward",
    "softmin",
    "ulp_error",
]

# Significant bits, and the exponent of the smallest normal number.
_FORMATS = {
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float32": (24, -126),
    "float64": (53, -1022),
}

# Attention adds up so many keys before it combines what it has with the next so many.
_KEY_BLOCK = 64


def _quiet(function):
    """No floating-point warnings: infinities and NaN are ordinary values here."""

    @functools.wraps(function)
    def quiet(*args, **kwargs):
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return quiet


# --- the public functions -------------------------------------------------------------------------


@_quiet
def softmax(
    x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, precise=np.float64
):
    """``exp(z) / sum(exp(z))``; exactly 0 where an entry takes no part.

    An entry that is NaN or +inf, and a row of which all that takes part is -inf, make NaN of
    everything in the row that takes part.

    >>> softmax([1.0, 1.0, np.nan], where=[True, True, False])
    array([0.5, 0.5, 0. ])
    >>> softmax([[np.inf, 0.0], [-np.inf, 0.0]])
    array([[nan, nan],
           [ 0.,  1.]])
    >>> softmax([1.0, 2.0], bias=[-np.inf, -np.inf])
    array([0., 0.])
    """
    z, part, axes = _logits(x, axis, bias, where, temperature, dtype)
    m, _, e = _from_max(z.astype(precise), axes)
    y = np.where(np.isfinite(m), e / _sum(e, axes), np.nan)
    return np.where(part, y, precise(0))[()]


@_quiet
def log_softmax(
    x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, precise=np.float64
):
    """``z - log(sum(exp(z)))``; -inf where an entry takes no part.

    >>> log_softmax([0.0, -40.0])  # the larger one is -log1p(exp(-40)): tiny, but not 0
    array([-4.24835426e-18, -4.00000000e+01])
    >>> log_softmax([0.0, 0.0, np.nan], where=[True, True, False]).round(4)
    array([-0.6931, -0.6931,    -inf])
    """
    z, part, axes = _logits(x, axis, bias, where, temperature, dtype)
    m, d, e = _from_max(z.astype(precise), axes)
    y = np.where(np.isfinite(m), d - _log_of_sum(d, e, axes), np.nan)
    return np.where(part, y, -precise(np.inf))[()]


@_quiet
def softmin(
    x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, precise=np.float64
):
    """Softmax of -x / temperature + bias.

    >>> softmin([1.0, 2.0, 3.0]).round(4)
    array([0.6652, 0.2447, 0.09  ])
    """
    z, part, axes = _logits(x, axis, bias, where, temperature, dtype, sign=-1)
    return softmax(z, axes, where=part, precise=precise)


@_quiet
def logsumexp(
    x,
    /,
    axis=None,
    *,
    b=None,
    where=None,
    keepdims=False,
    dtype=None,
    return_sign=False,
    precise=np.float64,
):
    """``log(sum(b * exp(x)))``; with ``return_sign`` log|sum| and the sum's sign.

    An entry whose weight is 0 takes no part. No entries: -inf, with sign 0. A negative sum is NaN
    unless its sign is asked for. Terms smaller than float64's smallest number times the exp of the
    largest x are lost: weights of such a range need ``precise=np.longdouble``.

    >>> logsumexp([[1000.0, 1000.0], [-np.inf, -np.inf]], axis=1)
    array([1000.69314718,          -inf])
    >>> logsumexp([0.0, np.log(3)], b=[1, -1])
    np.float64(nan)
    >>> [float(v) for v in logsumexp([1.0, 1.0], b=[1, -1], return_sign=True)]
    [-inf, 0.0]
    """
    z, part, axes = _logits(x, axis, None, where, None, dtype)
    if b is None:
        m, d, e = _from_max(z.astype(precise), axes)
        value = np.where(np.isfinite(m), m + _log_of_sum(d, e, axes), m)
        sign = np.where(np.isnan(value), value, value > -np.inf)
    else:
        m, total = _weighted_sum(z, b, part, axes, precise)
        value, sign = m + np.log(abs(total)), np.sign(total)
        if not return_sign:
            value = np.where(total < 0, precise(np.nan), value)
    if not keepdims:
        value, sign = np.squeeze(value, axes), np.squeeze(sign, axes)
    return (value[()], sign.astype(precise)[()]) if return_sign else value[()]


@_quiet
def softmax_backward(grad, y, /, axis=-1, *, temperature=None, precise=np.float64):
    """``r * y * (grad - sum(grad * y))``: the gradient with respect to y turned into that for x.

    y = 0 took no part: its grad is not summed, its gradient is 0.

    >>> softmax_backward([1.0, 0.0, np.nan], [0.5, 0.5, 0.0])
    array([ 0.25, -0.25,  0.  ])
    """
    g, y, r, axes = _gradients(grad, y, axis, temperature, precise)
    part = y != 0
    total = _sum(np.where(part, g * y, 0), axes)
    return np.where(part, r * y * (g - total), precise(0))[()]


@_quiet
def log_softmax_backward(grad, y, /, axis=-1, *, temperature=None, precise=np.float64):
    """``r * (grad - exp(y) * sum(grad))``, where y is the result of log_softmax.

    y = -inf took no part: its grad is not summed, its gradient is 0.

    >>> log_softmax_backward([1.0, 0.0, np.nan], [np.log(0.5), np.log(0.5), -np.inf])
    array([ 0.5, -0.5,  0. ])
    """
    g, y, r, axes = _gradients(grad, y, axis, temperature, precise)
    part = y != -np.inf
    total = _sum(np.where(part, g, 0), axes)
    return np.where(part, r * (g - np.exp(y) * total), precise(0))[()]


@_quiet
def attention(q, k, v, /, *, return_lse=False, return_weights=False, **options):
    """``sum(weights * v)`` over the keys that a query sees, where weights is softmax of the scores.

    Bias, sinks and slopes are rounded to the compute type first; nothing else is rounded.

    A query that sees nothing gives 0, and -inf or its sink as the lse. One that sees a score of NaN
    or +inf, or scores of -inf only and has no sink, or has a sink of NaN or +inf, gives NaN: also
    as the weights of the keys that it sees. The keys and values that it does not see have no part
    in anything.

    >>> k, v = np.array([[0.0], [np.log(3)], [np.nan]]), np.array([[1.0], [5.0], [np.nan]])
    >>> attention(np.ones((3, 1)), k, v, is_causal=True).round(12)
    array([[ 1.],
           [ 4.],
           [nan]])
    >>> attention([[1.0]], k, v, kv_lengths=2, sinks=[np.log(4)]).round(12)
    array([[2.]])
    >>> attention([[1.0]], k, v, mask=[False, False, False], return_lse=True, return_weights=True)
    (array([[0.]]), array([-inf]), array([[0., 0., 0.]]))
    """
    a = _Attention(q, k, v, **options)
    weights, lse = _weigh(sum(a.terms), a.visible, a.sinks)
    return a.results(_mix(weights, a.visible, a.v), lse, weights, return_lse, return_weights)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, /, *, return_lse=False, **options):
    """Attention of each sequence for itself, one after the other.

    >>> x = np.array([[[0.0]], [[1.0]], [[2.0]]])
    >>> attention_varlen(x, x, x, [0, 2, 3], [0, 1, 3])[:, 0, 0].round(3)
    array([0.   , 0.   , 1.881])
    """
    starts = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    lengths = [np.diff(s) for s in starts]
    lead = (len(lengths[0]),)
    scores = *lead, q.shape[1], *(n.max(initial=0) for n in lengths)
    precise = options.get("precise", np.float64)
    out, lse = np.empty((*q.shape[:2], v.shape[2]), precise), np.empty(q.shape[:2], precise)
    for i, (n_queries, n_keys) in enumerate(zip(*lengths, strict=True)):
        rows, keys = (slice(s[i], s[i + 1]) for s in starts)
        own = dict(options)
        for name in {"mask", "bias"} & {n for n in options if options[n] is not None}:
            padded = _broadcast(np.asarray(options[name]), scores, name, "the padded scores")
            own[name] = padded[i, :, :n_queries, :n_keys]
        for name in {"q_offset", "kv_lengths"} & {n for n in options if options[n] is not None}:
            own[name] = np.broadcast_to(options[name], lead)[i]
        arrays = (x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys]))
        results = attention(*arrays, **own, return_lse=True)
        out[rows], lse[rows] = (x.swapaxes(0, 1) for x in results)
    return (out, lse) if return_lse else out


@_quiet
def merge_attention(out_a, lse_a, out_b, lse_b, /, *, precise=np.float64):
    """Attention over two sets of keys from the results for each.

    That is attention over two keys whose scores are the lse. One of -inf is not seen.

    >>> merge_attention([[1.0]], [0.0], [[5.0]], [np.log(3)])
    (array([[4.]]), array([1.38629436]))
    >>> merge_attention([[1.0]], [0.5], [[np.nan]], [-np.inf])
    (array([[1.]]), array([0.5]))
    """
    out_a, out_b = _array(out_a, "out_a"), _array(out_b, "out_b")
    lse_a, lse_b = _array(lse_a, "lse_a"), _array(lse_b, "lse_b")
    shapes = [x.shape for x in (out_a, lse_a, out_b, lse_b)]
    if shapes[:2] != shapes[2:] or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(f"shapes of out_a, lse_a, out_b and lse_b do not match: {shapes}")
    v = np.stack([x.astype(_compute_type(x.dtype)) for x in (out_a, out_b)], -2).astype(precise)
    scores = np.stack([lse_a, lse_b], -1).astype(precise)
    visible = scores != -np.inf
    weights, lse = _weigh(scores, visible)
    return _mix(weights[..., None, :], visible[..., None, :], v)[..., 0, :], lse[()]


@_quiet
def attention_bound(q, k, v, /, *, return_lse=False, return_weights=False, **options):
    """How far `attention` may be off in the compute type: for each element of what it returns.

    For out that is ::

        u * (2 * D * |scale| * max(sum(|q * k|)) + c + 2 * max(|other terms|)) * sum(weights * |v|)

    where u is 2^-24 (float64: 2^-53), c counts the steps of a sum over blocks of keys, and the
    other terms of a score are bias, alibi, what softcap made of q.k, and the sink. A key that has
    no weight has no part in their maximum: a bias of -1e9 is no reason to be off. For weights:
    without v. For the lse: ``u * (the same brackets + 4 * max(1, |lse|))``.
    """
    a = _Attention(q, k, v, **options)
    weights, lse = _weigh(sum(a.terms), a.visible, a.sinks)
    dots = abs(a.scale) * (abs(a.q) @ abs(a.k).swapaxes(-1, -2))
    dots = np.where(a.visible & np.isfinite(dots), dots, 0)
    others = sum(map(abs, a.terms if a.softcap else a.terms[1:]), np.zeros_like(dots))
    others = np.where(weights > 0, others, 0)
    sinks = np.where(np.exp(a.sinks - lse[..., None]) > 0, abs(a.sinks), 0)
    steps = 2 * (_KEY_BLOCK + 4 * math.ceil(a.k.shape[-2] / _KEY_BLOCK)) + 16
    dots, others = (np.max(x, -1, keepdims=True, initial=0) for x in (dots, others))
    errors = a.unit * (2 * a.q.shape[-1] * dots + steps + 2 * np.maximum(others, sinks))
    lse = errors[..., 0] + a.unit * 4 * np.maximum(1, abs(lse))
    out = errors * _mix(weights, a.visible, abs(a.v))
    return a.results(out, lse, errors * weights, return_lse, return_weights)


@_quiet
def ulp_error(got, true, dtype=None):
    """``|got - true|`` in units of the last place that dtype (got's) has at the true value.

    Below the smallest normal number the unit is the smallest subnormal. The same special value, or
    inf for a number that rounds to it, is right (0); any other pair with a special value is wrong
    by inf.

    >>> ulp_error(np.float32([1, 3, np.inf, np.nan]), [1 + 2.0**-24, 3 - 2.0**-22, 1e39, 0])
    array([0.5, 1. , 0. , inf])
    """
    got, true = np.asarray(got), np.asarray(true)
    wide = np.result_type(np.float64, true.dtype)
    bits, lowest = _FORMATS[np.dtype(got.dtype if dtype is None else dtype).name]
    got, true = np.broadcast_arrays(got.astype(wide), true.astype(wide))
    exponent = np.where(true == 0, lowest, np.frexp(true)[1] - 1)
    last_place = np.maximum(exponent, lowest) - (bits - 1)
    error = np.ldexp(abs(got - true), -last_place).astype(np.float64)
    # 2^(2 - lowest) is the first power of two out of range; half an ulp below it, inf is nearest.
    to_inf = np.ldexp(2 - wide.type(2) ** -bits, 1 - lowest)
    same = (np.isnan(got) & np.isnan(true)) | (got == true)
    same |= np.isinf(got) & (abs(true) >= to_inf) & (np.sign(got) == np.sign(true))
    finite = np.isfinite(got) & np.isfinite(true)
    return np.where(same, 0.0, np.where(finite, error, np.inf))[()]


# --- arguments ------------------------------------------------------------------------------------


def _logits(x, axis, bias, where, temperature, dtype, sign=1):
    """Return z in the compute type, -inf where an entry takes no part; which do; the axes."""
    x = _array(x, "x")
    compute = _compute_type(x.dtype, x.dtype if dtype is None else _result_type(dtype))
    axes = _axes(axis, x.ndim)
    z, r = x.astype(compute), sign * _reciprocal(temperature, x.shape, axes, compute)
    part = np.ones(x.shape, bool)
    if bias is None:
        z = z * r
    else:
        bias = _array(bias, "bias")
        if bias.dtype == bool:
            raise TypeError("bias is added to x and must be a number, got bool: pass where=")
        c = _broadcast(bias, x.shape, "bias").astype(compute)
        z, part = _fma(z, np.broadcast_to(r, x.shape), c), c != -np.inf
    if where is not None:
        where = _array(where, "where")
        if where.dtype != bool:
            raise TypeError(f"where must be bool, got {where.dtype}")
        part = part & _broadcast(where, x.shape, "where")
    return np.where(part, z, compute(-np.inf)), part, axes


def _gradients(grad, y, axis, temperature, precise):
    """Return grad and y as ``precise``; r = 1/temperature as the compute type has it; the axes."""
    grad, y = _array(grad, "grad"), _array(y, "y")
    if grad.shape != y.shape:
        raise ValueError(f"grad and y must have the same shape, got {grad.shape} and {y.shape}")
    compute, axes = _compute_type(grad.dtype, y.dtype), _axes(axis, y.ndim)
    r = _reciprocal(temperature, y.shape, axes, compute)
    # By way of the compute type: a cast from bfloat16 straight to longdouble need not exist.
    g, y = (a.astype(compute).astype(precise) for a in (grad, y))
    return g, y, r.astype(precise), axes


def _array(a, name):
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be a MaskedArray: pass where=~mask")
    a = np.asarray(a)
    if a.dtype.kind not in "biu" and a.dtype.name not in _FORMATS:
        supported = ", ".join([*_FORMATS, "integers", "bool"])
        raise TypeError(f"{name} must be one of {supported}, got {a.dtype}")
    return a


def _broadcast(a, shape, name, to="x"):
    try:
        return np.broadcast_to(a, shape)
    except ValueError:
        message = f"{name} of shape {a.shape} does not broadcast to {to} of shape {shape}"
        raise ValueError(message) from None


def _result_type(dtype):
    if np.dtype(dtype).name not in _FORMATS:
        raise TypeError(f"dtype must be one of {', '.join(_FORMATS)}, got {np.dtype(dtype)}")
    return np.dtype(dtype)


def _compute_type(*dtypes):
    """Float32 for the halves and float32; float64 as soon as anything else is among them."""
    narrow = all(d.name in ("float16", "bfloat16", "float32") for d in dtypes)
    return np.float32 if narrow else np.float64


def _axes(axis, ndim):
    if axis is None or (ndim == 0 and axis in (0, -1)):
        return tuple(range(ndim))
    return normalize_axis_tuple(axis, ndim)


def _reciprocal(temperature, shape, axes, compute):
    """Return 1/temperature, rounded to float64 and then to the compute type."""
    t = np.asarray(1 if temperature is None else temperature, np.float64)
    r = np.asarray((1 / t).astype(compute))
    if not np.all((t > 0) & np.isfinite(t) & (r > 0) & np.isfinite(r)):
        raise ValueError(f"temperature and 1/temperature must be finite and > 0, got {temperature}")
    _broadcast(t, shape, "temperature")
    if any(t.shape[a - len(shape)] != 1 for a in axes if len(shape) - a <= t.ndim):
        raise ValueError(f"temperature must have length 1 along axis, got shape {t.shape}")
    return r


# --- attention ------------------------------------------------------------------------------------


class _Attention:
    """The arguments of attention, made numbers of type ``precise``, and what follows at once.

    k and v have as many heads as q. The ``terms`` add up to the scores; the first is q.k, scaled
    and capped. ``visible`` has the shape of the scores, ``shape`` is how the caller sees it.
    """

    def __init__(
        self, q, k, v, *, mask=None, bias=None, is_causal=False, q_offset=0, kv_lengths=None,
        window=None, scale=None, softcap=None, sinks=None, alibi_slopes=None, precise=np.float64,
    ):  # fmt: skip
        q, k, v, compute, lead, self.shape = _attention_arrays(q, k, v)

        def numbers(x, *name_and_shape):
            return _option(x, *name_and_shape, "fiuV").astype(compute).astype(precise)

        def integers(x, name):
            return _option(x, name, lead, "iu").astype(np.int64)[..., None, None, None]

        self.q, self.k, self.v = (x.astype(compute).astype(precise) for x in (q, k, v))
        self.unit = 2.0**-24 if compute is np.float32 else 2.0**-53
        heads, queries, keys = *q.shape[-3:-1], k.shape[-2]
        j = np.arange(keys)
        p = np.clip(integers(q_offset, "q_offset"), -(2**61), 2**61) + np.arange(queries)[:, None]

        self.scale = precise(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        self.softcap = softcap and precise(softcap)
        dots = self.scale * (self.q @ self.k.swapaxes(-1, -2))
        self.terms = [self.softcap * np.tanh(dots / self.softcap) if softcap else dots]
        if bias is not None:
            self.terms.append(numbers(bias, "bias", self.shape))
        if alibi_slopes is not None:
            slopes = numbers(alibi_slopes, "alibi_slopes", (heads,))[:, None, None]
            self.terms.append(-slopes * abs(p - j).astype(precise))
        sinks = [-np.inf] * heads if sinks is None else sinks
        self.sinks = numbers(sinks, "sinks", (heads,))[:, None, None]

        self.visible = np.ones((*lead, heads, queries, keys), bool)
        left, right = window or (None, None)
        if is_causal:
            self.visible &= j <= p
        if left is not None:
            self.visible &= p - j <= left
        if right is not None:
            self.visible &= j - p <= right
        if kv_lengths is not None:
            self.visible &= j < integers(kv_lengths, "kv_lengths")
        if mask is not None:
            self.visible &= _option(mask, "mask", self.shape, "b")
        if bias is not None:
            self.visible &= self.terms[1] != -np.inf

    def results(self, out, lse, weights, return_lse, return_weights):
        """Return out, or the tuple of what is asked for; without the dimension of a lone head."""
        results = [out.reshape(*self.shape[:-1], out.shape[-1])]
        if return_lse:
            results.append(lse.reshape(self.shape[:-1]))
        if return_weights:
            results.append(weights.reshape(self.shape))
        return tuple(results) if len(results) > 1 else results[0]


def _attention_arrays(q, k, v):
    """Return q, k, v with a dimension of as many heads; compute type; lead; shape of weights."""
    q, k, v = map(_array, (q, k, v), "qkv")
    if not q.dtype.name == k.dtype.name == v.dtype.name or q.dtype.name not in _FORMATS:
        types = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise TypeError(f"q, k and v must have the same floating-point type, got {types}")
    if min(q.ndim, k.ndim, v.ndim) < 2:
        raise ValueError(f"q, k and v need 2 dimensions, got {q.ndim}, {k.ndim} and {v.ndim}")
    one_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v))
    (heads, queries, depth), (kv_heads, keys) = q.shape[-3:], v.shape[-3:-1]
    if k.shape[-3:] != (kv_heads, keys, depth) or not depth or not kv_heads or heads % kv_heads:
        raise ValueError(f"q, k and v do not match: shapes {q.shape}, {k.shape} and {v.shape}")
    k, v = (np.repeat(x, heads // kv_heads, axis=-3) for x in (k, v))
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    shape = (queries, keys) if one_head else (*lead, heads, queries, keys)
    return q, k, v, _compute_type(q.dtype), lead, shape


def _option(x, name, shape, kinds):
    """Return x, an array of one of the kinds, broadcast to shape. A bfloat16 is of the kind V."""
    x = _array(x, name)
    if x.dtype.kind not in kinds:
        instead = {"mask": ": pass bias=", "bias": ": pass mask="}.get(name, "")
        raise TypeError(f"{name} must not be {x.dtype}{instead}")
    return _broadcast(x, shape, name, "the scores or their heads")


def _weigh(scores, visible, sinks=-np.inf):
    """Return softmax over the last axis of what is visible and a sink; log of its denominator."""
    scores = np.where(visible, scores, scores.dtype.type(-np.inf))
    sinks = np.broadcast_to(sinks, (*scores.shape[:-1], 1)).astype(scores.dtype)
    axes = (scores.ndim - 1,)
    m, d, e = _from_max(np.concatenate([scores, sinks], -1), axes)
    weights = np.where(np.isfinite(m), e / _sum(e, axes), np.nan)[..., :-1]
    lse = np.where(np.isfinite(m), m + _log_of_sum(d, e, axes), m)[..., 0]
    return np.where(visible, weights, scores.dtype.type(0)), lse


def _mix(weights, visible, v):
    """Return ``weights @ v``, but 0 times a NaN or infinity that is not visible is 0."""
    finite = np.isfinite(v)
    out = weights @ np.where(finite, v, 0)
    special = np.where(finite, 0, v)
    for j in np.flatnonzero(~finite.all((*range(v.ndim - 2), v.ndim - 1))):
        terms = weights[..., j, None] * special[..., j, None, :]
        out = out + np.where(visible[..., j, None], terms, 0)
    return out + 0  # not -0


# --- sums of exponentials -------------------------------------------------------------------------


def _from_max(z, axes):
    """Return m = max(z), d = z - m, and exp(z - m), for which d alone is too short.

    Half an ulp of d = -700 is 512 half-ulps of 1, and so many would exp(d) be off.
    """
    m = np.max(z, axes, keepdims=True, initial=-np.inf)
    d, rest = _two_sum(z, -m)
    e = np.exp(d)
    return m, d, e + e * np.where(np.isfinite(rest), rest, 0)


def _log_of_sum(d, e, axes):
    """Return log(sum(e)), e = 1 at the maxima, without the cancellation in log(1 + tiny)."""
    maxima = _sum((d == 0).astype(e.dtype), axes)
    return np.log(maxima) + np.log1p(_sum(np.where(d == 0, 0, e), axes) / maxima)


def _sum(terms, axes):
    """Sum over axes, which keep length 1. NumPy adds in pairs, but only along the last axis."""
    kept = [a for a in range(terms.ndim) if a not in axes]
    length = math.prod(terms.shape[a] for a in axes)
    rows = terms.transpose(*kept, *axes).reshape([terms.shape[a] for a in kept] + [length])
    return np.expand_dims(np.ascontiguousarray(rows).sum(-1), tuple(sorted(axes)))


def _weighted_sum(x, b, part, axes, precise):
    """Return m and sum(b * exp(x - m)): its terms may cancel, so they are added exactly."""
    b = _broadcast(_array(b, "b"), x.shape, "b").astype(x.dtype).astype(precise)
    part = part & (b != 0)
    finite = part & np.isfinite(x)
    x = x.astype(precise)
    m = np.max(x, axes, keepdims=True, initial=-np.inf, where=finite)
    m = np.where(np.isfinite(m), m, 0)
    # What infinities and NaN make of a term does not depend on how far exp(x) is from 1.
    special = b * np.where(finite, 1, np.exp(x))
    d, rest = _two_sum(np.where(finite, x, m), -m)
    terms = np.where(np.isfinite(special), b * (np.exp(d) * (1 + rest)), special)
    terms = np.where(part, np.where(np.isfinite(x), terms, special), 0)
    total = _sum(terms, axes)
    for row in np.ndindex(total.shape):
        index = tuple(slice(None) if a in axes else i for a, i in enumerate(row))
        if np.isfinite(terms[index]).all():
            total[row] = _exact_sum(terms[index].ravel(), precise)
    return m, total


def _exact_sum(terms, precise):
    """Sum with math.fsum: exact, but float64 only, so wider terms are cut in two, as is the sum."""
    _, k = np.frexp(np.max(abs(terms), initial=0))
    terms = np.ldexp(terms, -k)  # the largest below 1, so that wider exponents do not matter either
    high = terms.astype(np.float64)
    pieces = [*high.tolist(), *(terms - high).astype(np.float64).tolist()]
    total = math.fsum(pieces)
    return np.ldexp(precise(total) + precise(math.fsum([*pieces, -total])), k)


# --- z, rounded once ------------------------------------------------------------------------------


def _fma(x, r, c):
    """Return x * r + c, rounded once to the type of the arguments: float32 or float64."""
    if x.dtype == np.float32:
        # The product of two 24-bit numbers is exact in float64, and rounding the sum to odd makes
        # the second rounding, to float32, come out as if it were the only one.
        return _sum_to_odd(x.astype(np.float64) * r, c.astype(np.float64)).astype(np.float32)
    # Boldo & Melquiond, "Emulation of a FMA and correctly rounded sums" (2008): x * r + c as an
    # unevaluated sum, of which all but the last addition is exact or rounded to odd.
    product, product_rest = _two_product(x, r)
    low, low_rest = _two_sum(c, product_rest)
    high, high_rest = _two_sum(product, low)
    z = np.array(high + _sum_to_odd(low_rest, high_rest))
    # That holds while no step leaves the range of exponents. Elsewhere: exact fractions, one by
    # one. Infinities and NaN: as IEEE arithmetic has them.
    finite = np.isfinite(x) & np.isfinite(c)
    size, biggest = abs(product), np.maximum(np.maximum(abs(x), abs(r)), abs(c))
    inside = (biggest < 2.0**990) & (size < 2.0**990) & ((size > 2.0**-960) | (x == 0))
    for i in np.flatnonzero(finite & ~inside):
        z.flat[i] = _fma_of_fractions(x.flat[i], r.flat[i], c.flat[i])
    return np.where(finite, z, np.where(np.isfinite(x), 0, x * r) + c)


def _fma_of_fractions(x, r, c):
    exact = Fraction(x) * Fraction(r) + Fraction(c)
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _two_sum(a, b):
    """Return the rounded sum and what was lost: s + rest = a + b exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a, b):
    """Return the rounded product and what was lost, in float64 (Dekker; halves by Veltkamp)."""

    def halves(v):
        t = v * (2.0**27 + 1)
        high = t - (t - v)
        return high, v - high

    p, (a1, a2), (b1, b2) = a * b, halves(a), halves(b)
    return p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2)


def _sum_to_odd(a, b):
    """Return a + b in float64; if it is not exact, the neighbour whose last bit is 1.

    A number with an odd last bit is neither a number of a shorter type nor halfway between two:
    it tells the rounding that follows on which side of them the exact sum lies.
    """
    s, rest = _two_sum(a, b)
    inexact = (rest < 0) | (rest > 0)
    even = s.view(np.int64) & 1 == 0
    return np.where(inexact & even, np.nextafter(s, np.copysign(np.inf, rest)), s)
