"""softmax, log_softmax and logsumexp with the signatures of ``scipy.special``.

What differs from SciPy:

- Results are as accurate as fastsoftmax promises. SciPy's may be off by 67 ulp in float32 and by
  514 in float64 on common distributions.
- float16 and bfloat16 are computed in float32 and keep their type. In SciPy sums of float16
  overflow at 65504, softmax of 1000 equal values of bfloat16 sums to 3.9, logsumexp of them is
  float64 or, with ml_dtypes 0.7, a TypeError.
- Integers of any size and bool give float64. In SciPy the type of softmax and log_softmax depends
  on the size, unsigned integers wrap around and bool is refused.
- Along an axis of length 0 softmax and log_softmax are empty, where SciPy raises; the sign of an
  empty logsumexp is 0, not -1.
- log_softmax of a row with +inf is NaN, as softmax of it is; in SciPy its finite entries are -inf.
- In logsumexp a weight of 0 always hides what a holds, and the result is -inf if all are 0; with
  SciPy infinity and NaN show through where the result is not finite. Where exp(a) underflows, an
  infinite weight gives an infinite sum and a negative one a negative sum, NaN without return_sign;
  in SciPy NaN and a sum of 0.
- logsumexp of a scalar is a scalar even with keepdims, not an array of shape (1,).
- complex, longdouble and masked arrays raise TypeError.

There are no floating-point warnings here.
"""

import numpy as np

from .. import _core

__all__ = ["log_softmax", "logsumexp", "softmax"]

_WEAK = bool, int, float  # Python's numbers, which do not change the type of an array


def softmax(x, axis=None):
    """Softmax, as ``scipy.special.softmax``: :func:`fastsoftmax.softmax`, by default of all of x.

    Parameters
    ----------
    x : array_like
        Logits.
    axis : int, tuple of ints or None, default None
        The axis or axes along which the result sums to 1; None means all.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape and dtype of x; float64 for integers.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax.compat.scipy import softmax
    >>> softmax(np.array([[0.0, 0.0], [0.0, 0.0]]))
    array([[0.25, 0.25],
           [0.25, 0.25]])
    >>> softmax(np.array([[0.0, 0.0], [0.0, 0.0]]), axis=1)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    return _core.softmax(x, axis)


def log_softmax(x, axis=None):
    """Logarithm of softmax, as ``scipy.special.log_softmax``: :func:`fastsoftmax.log_softmax`.

    Parameters
    ----------
    x, axis
        As for :func:`softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        As for :func:`softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax.compat.scipy import log_softmax
    >>> log_softmax(np.array([1000.0, 1.0]))
    array([   0., -999.])
    """
    return _core.log_softmax(x, axis)


def logsumexp(a, axis=None, b=None, keepdims=False, return_sign=False):
    """``log(sum(b * exp(a)))``, as ``scipy.special.logsumexp``: :func:`fastsoftmax.logsumexp`.

    Parameters
    ----------
    a : array_like
        Exponents.
    axis : int, tuple of ints or None, default None
        The axis or axes to sum over; None means all.
    b : array_like, optional
        Weights, of either sign, or bool. a and b broadcast together. An entry whose weight is 0
        takes no part, whatever a holds there.
    keepdims : bool, default False
        Leave the reduced axes in the result, with length 1.
    return_sign : bool, default False
        Return the pair (log|sum|, sign).

    Returns
    -------
    ndarray or NumPy scalar, or a tuple of two
        The logarithm: -inf for an empty sum, NaN for a negative one unless return_sign. With
        return_sign also the sign: 1, -1, 0 for a sum of 0, NaN for NaN. Of the dtype that a and b
        promote to, float64 for integers; of bfloat16 if a is.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax.compat.scipy import logsumexp
    >>> float(logsumexp(np.arange(10)).round(4))
    9.4586
    >>> value, sign = logsumexp([1, 2], b=[1, -1], return_sign=True)
    >>> float(value.round(4)), float(sign)
    (1.5413, -1.0)
    >>> logsumexp([[0.0, np.nan], [0.0, 0.0]], axis=1, b=[1, 0])
    array([0., 0.])
    """
    if b is None:
        a = _core._as_array(a, "a")
        return _core.logsumexp(a, axis, keepdims=keepdims, return_sign=return_sign)
    x, w = _core._as_array(a, "a"), _core._as_array(b, "b")
    try:
        dtype = _promoted((a, x), (b, w))
        x, w = np.broadcast_arrays(x, w)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            "a and b must have dtypes and shapes that go together, got "
            f"{x.dtype} {x.shape} and {w.dtype} {w.shape}"
        ) from error
    weights = {"where" if w.dtype == bool else "b": w}
    return _core.logsumexp(
        x, axis, **weights, keepdims=keepdims, dtype=dtype, return_sign=return_sign
    )


def _promoted(*pairs):
    """The floating type that pairs (argument, its array) promote to; None if there is none."""
    dtypes = [array.dtype for value, array in pairs if type(value) not in _WEAK]
    if not dtypes or dtypes[0].name == "bfloat16":  # which NumPy promotes with few others
        return next(iter(dtypes), None)
    dtype = np.result_type(*dtypes)
    return None if dtype.kind in "biu" else dtype
