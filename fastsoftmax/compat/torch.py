"""Functions on NumPy arrays with the signatures of ``torch.nn.functional`` and ``torch``.

softmax, log_softmax, softmin, gumbel_softmax, cross_entropy and scaled_dot_product_attention are
those of ``torch.nn.functional``, logsumexp is that of ``torch``.

What differs from PyTorch:

- Arguments are read as NumPy arrays, results are ndarrays, dtypes are NumPy's. There are no
  gradients: fastsoftmax has functions for them.
- dim is required; the dimension that ``torch.nn.functional`` guesses, with a warning, is refused.
- With a narrower dtype the input is not rounded to it first: only the result is.
- Integers give float64. PyTorch refuses them without dtype, and logsumexp makes them float32.
- Random numbers come from NumPy: gumbel_softmax takes rng, a seed or a numpy.random.Generator. Its
  hard samples are exactly 0 and 1.
- In attention a query depends on what it sees alone: a NaN in a key or value that is hidden changes
  nothing. attn_mask together with is_causal=True is an error, as PyTorch documents and does not
  always check. attn_mask may have any floating dtype. There is no dropout.
- cross_entropy takes the numbers of classes as target, not probabilities.
- Exceptions are TypeError, ValueError, numpy.exceptions.AxisError and NotImplementedError, where
  PyTorch mostly raises RuntimeError.
"""

import re
from operator import index

import numpy as np

from .. import _core

__all__ = [
    "cross_entropy",
    "gumbel_softmax",
    "log_softmax",
    "logsumexp",
    "scaled_dot_product_attention",
    "softmax",
    "softmin",
]


def softmax(input, dim, dtype=None):
    """Softmax along a dimension, as in PyTorch: :func:`fastsoftmax.softmax`.

    Parameters
    ----------
    input : array_like
        Logits.
    dim : int
        The dimension along which the result sums to 1.
    dtype : dtype, optional
        Type of the result; default: that of input, float64 for integers. The calculation takes the
        wider of the two types.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape of input.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> F.softmax(np.array([1, 2, 3], np.float16), dim=-1, dtype=np.float32)
    array([0.09003057, 0.24472848, 0.66524094], dtype=float32)
    """
    return _core.softmax(_array(input), _index(dim), dtype=dtype)


def log_softmax(input, dim, dtype=None):
    """Logarithm of softmax along a dimension, as in PyTorch: :func:`fastsoftmax.log_softmax`.

    Parameters
    ----------
    input, dim, dtype
        As for :func:`softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape of input.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> F.log_softmax(np.array([1000.0, 1.0]), dim=0)
    array([   0., -999.])
    """
    return _core.log_softmax(_array(input), _index(dim), dtype=dtype)


def softmin(input, dim, dtype=None):
    """Softmax of -input along a dimension, as in PyTorch: :func:`fastsoftmax.softmin`.

    Parameters
    ----------
    input, dim, dtype
        As for :func:`softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape of input.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> F.softmin(np.array([1.0, 2.0, 3.0]), dim=0).round(4)
    array([0.6652, 0.2447, 0.09  ])
    """
    return _core.softmin(_array(input), _index(dim), dtype=dtype)


def logsumexp(input, dim, keepdim=False):
    """Logarithm of a sum of exponentials, as ``torch.logsumexp``: :func:`fastsoftmax.logsumexp`.

    Parameters
    ----------
    input : array_like
        Exponents.
    dim : int or sequence of ints
        The dimension or dimensions to sum over.
    keepdim : bool, default False
        Leave the reduced dimensions in the result, with length 1.

    Returns
    -------
    ndarray or NumPy scalar
        The logarithm: -inf for an empty sum.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> F.logsumexp(np.zeros((2, 4)), dim=1, keepdim=True).round(4)
    array([[1.3863],
           [1.3863]])
    """
    if dim is None:
        raise TypeError("dim must be an integer or a sequence of integers, got None")
    axis = tuple(map(_index, dim)) if isinstance(dim, (tuple, list)) else _index(dim)
    return _core.logsumexp(_array(input), axis, keepdims=keepdim)


def gumbel_softmax(logits, tau=1, hard=False, eps=1e-10, dim=-1, *, rng=None):
    """Sample from the Gumbel-softmax distribution, as in PyTorch: softmax((logits + noise) / tau).

    Parameters
    ----------
    logits : array_like
        Logarithms of probabilities, not necessarily normalised; -inf is never drawn.
    tau : float, default 1
        Temperature: finite and > 0.
    hard : bool, default False
        Return one-hot samples: 1 where the sample is largest, else 0.
    eps : float
        Not used, as in PyTorch.
    dim : int, default -1
        The dimension along which the samples sum to 1.
    rng : int, numpy.random.Generator or other argument of numpy.random.default_rng, optional
        The source of random numbers. Default: a new one, seeded by the system.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape and dtype of logits; float64 for integers.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> rng = np.random.default_rng(0)
    >>> samples = F.gumbel_softmax(np.log([[0.2, 0.3, 0.5]] * 10_000), hard=True, rng=rng)
    >>> samples.mean(axis=0).round(1)
    array([0.2, 0.3, 0.5])
    """
    logits = _core._as_array(logits, "logits")
    try:
        tau = float(tau)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"tau must be a number, got {tau!r:.40}") from error
    if not 0 < tau < np.inf:
        raise ValueError(f"tau must be finite and > 0, got {tau}")
    try:
        generator = np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"rng must be None, a seed or a numpy.random.Generator, got {rng!r:.40}"
        ) from error
    noise = generator.gumbel(size=logits.shape)
    with np.errstate(all="ignore"):  # softmax refuses a tau whose reciprocal overflows
        noise = noise / tau
    names = {"temperature": "tau", "x": "logits"}
    y = _renamed(names, _core.softmax, logits, _index(dim), bias=noise, temperature=tau)
    if not _core._as_flag(hard, "hard") or y.ndim == 0 or y.size == 0:
        return y
    one_hot = np.zeros_like(y)
    np.put_along_axis(one_hot, y.argmax(dim, keepdims=True), 1, dim)
    return one_hot + 0 * y  # rows of NaN stay NaN


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """Cross entropy of classes, as in PyTorch: :func:`fastsoftmax.cross_entropy`.

    Parameters
    ----------
    input : array_like, [C], [N, C] or [N, C, ...]
        Logits.
    target : array_like of int, [], [N] or [N, ...]
        The class of each row.
    weight : array_like, [C], optional
        A number for each class, by which the loss is multiplied.
    size_average, reduce : None
        What PyTorch deprecated in favour of reduction: refused.
    ignore_index : int, default -100
        Rows with this target are ignored.
    reduction : {"mean", "sum", "none"}
        As for :func:`fastsoftmax.cross_entropy`.
    label_smoothing : float, default 0.0
        As for :func:`fastsoftmax.cross_entropy`.

    Returns
    -------
    ndarray or NumPy scalar
        "none": of the shape of target, else a scalar.

    Raises
    ------
    NotImplementedError
        For a target of probabilities.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> F.cross_entropy(np.zeros((2, 4)), np.array([0, 3])).round(4)
    np.float64(1.3863)
    """
    if size_average is not None or reduce is not None:
        raise TypeError("size_average and reduce are deprecated in PyTorch: pass reduction=")
    target = target if _core._is_masked(target) else _core._converted(target, "target")
    if target.dtype.kind == "f" and target.size:
        raise NotImplementedError("target must hold classes; probabilities are not supported")
    input = _array(input)
    axis = 0 if input.ndim == 1 else 1
    return _renamed(
        {"logits": "input", "labels": "target"}, _core.cross_entropy, input, target, axis,
        weight=weight, reduction=reduction, ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def scaled_dot_product_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """Attention, as in PyTorch: :func:`fastsoftmax.attention`.

    Parameters
    ----------
    query : array_like, [..., H, L, E]
        Queries, of one of the floating types.
    key, value : array_like, [..., H, S, E] and [..., H, S, Ev]
        Keys and values, of the dtype of query. Dimensions before the last two broadcast.
    attn_mask : array_like of bool or floats, optional
        Broadcasts to [..., H, L, S]. Of bool: a query sees a key where it is True. Of floats: added
        to the scores.
    dropout_p : float, default 0.0
        Must be 0.
    is_causal : bool, default False
        Query i sees the keys up to i only (top-left). Not together with attn_mask.
    scale : float, optional
        Multiplies the products of query and key. Default: 1 / sqrt(E).
    enable_gqa : bool, default False
        The number of heads of key and value, the same for both, may be any divisor of that of
        query; head h attends to head h // (H // G) of the G heads.

    Returns
    -------
    ndarray, [..., H, L, Ev]
        In the dtype of query. A query that sees nothing gives zeros.

    Raises
    ------
    NotImplementedError
        If dropout_p is not 0.
    TypeError
        For dtypes that are not supported or differ, an attn_mask of integers.
    ValueError
        For shapes that do not fit, heads that differ without enable_gqa, attn_mask together with
        is_causal.

    Examples
    --------
    >>> import numpy as np
    >>> import fastsoftmax.compat.torch as F
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 8, 5, 16), np.float32)  # batch, heads, positions, size
    >>> y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> y.shape
    (2, 8, 5, 16)
    >>> mask = np.tril(np.ones((5, 5), bool))
    >>> np.allclose(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-6)
    True
    """
    is_causal = _core._as_flag(is_causal, "is_causal")
    enable_gqa = _core._as_flag(enable_gqa, "enable_gqa")
    if not (isinstance(dropout_p, (int, float, np.number)) and dropout_p == 0):
        raise NotImplementedError(
            f"dropout_p must be 0, got {dropout_p!r:.80}: dropout is for training, fastsoftmax has "
            "none"
        )
    named = {"query": query, "key": key, "value": value}
    q, k, v = (_core._as_array(array, name) for name, array in named.items())
    if not enable_gqa and not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        q, k, v = _broadcast_heads(q, k, v)
    scores = {}
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True exclude each other")
        mask = _core._as_array(attn_mask, "attn_mask")
        if mask.dtype.kind in "iu":
            raise TypeError(f"attn_mask must be of bool or floats, got {mask.dtype}")
        scores["mask" if mask.dtype == bool else "bias"] = mask
    names = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "bias": "attn_mask"}
    return _renamed(names, _core.attention, q, k, v, **scores, is_causal=is_causal, scale=scale)


def _renamed(names, function, *arguments, **options):
    """Call a function of ours; in its errors arguments have the names that the caller gave them."""
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # AxisError names none
            raise
        words = r"\b(" + "|".join(names) + r")\b"
        message = re.sub(words, lambda word: names[word[0]], str(error))
        raise type(error)(message) from None


def _array(input):
    return _core._as_array(input, "input")


def _index(dim):
    try:
        return index(dim)
    except TypeError:
        raise TypeError(f"dim must be an integer, got {dim!r:.40}") from None


def _broadcast_heads(*qkv):
    """Views of the same heads and leading dimensions."""
    try:
        lead = np.broadcast_shapes(*(array.shape[:-2] for array in qkv))
    except (ValueError, RuntimeError):  # the latter: more than 32 dimensions
        shapes = ", ".join(str(array.shape) for array in qkv)
        raise ValueError(
            "query, key and value must have the same number of heads, unless enable_gqa=True, and "
            f"leading dimensions that broadcast, got shapes {shapes}"
        ) from None
    return (np.broadcast_to(array, lead + array.shape[-2:]) for array in qkv)
