"""softmax, log_softmax and logsumexp of the lists of Awkward Array, whatever their lengths are.

Each innermost list is a row: its result has the bits of :func:`fastsoftmax.softmax` of that list
alone. Needs Awkward Array, which it does not install.

**The ufuncs.** Awkward hands a ufunc the numbers of all lists at once, which is right for
``np.exp`` and wrong for a softmax of each list; and it lets nobody overload a ufunc for plain
lists, but only for lists or records that have a name. So ``ufuncs.softmax`` of plain lists raises a
TypeError. Call the functions here; or, for code that calls :mod:`fastsoftmax.ufuncs`,
:func:`register` a name and give it to the lists:

>>> import awkward as ak, numpy as np
>>> import fastsoftmax.awkward
>>> from fastsoftmax import ufuncs
>>> fastsoftmax.awkward.register()
>>> logits = ak.with_parameter([[1.0, 2.0, 3.0], [], [4.0, 4.0]], "__list__", "logits")
>>> np.round(ufuncs.softmax(logits / 2), 3).tolist()
[[0.186, 0.307, 0.506], [], [0.5, 0.5]]
"""

import awkward as ak
import numpy as np

from . import _core, ufuncs

__all__ = ["log_softmax", "logsumexp", "register", "softmax"]


def softmax(x, axis=-1):
    """Softmax of each of the innermost lists, as ``ak.softmax``.

    Parameters
    ----------
    x : ak.Array or what can become one
        Logits in lists of any lengths and depth: float16, float32 or float64; integers and bool are
        taken as float64. Numbers that are missing (None) take no part.
    axis : int, default -1
        Must be -1, the innermost lists.

    Returns
    -------
    ak.Array
        As x, with missing numbers and lists where x has them.

    Raises
    ------
    ValueError
        For another axis.
    TypeError
        For numbers that are not supported, records, strings or unions.

    Examples
    --------
    >>> import fastsoftmax.awkward
    >>> fastsoftmax.awkward.softmax([[0.0, 0.0], [], [1.0, None, 1.0, 1.0, 1.0]]).tolist()
    [[0.5, 0.5], [], [0.25, None, 0.25, 0.25, 0.25]]
    """
    return _of_lists("softmax", x, axis)


def log_softmax(x, axis=-1):
    """Logarithm of softmax of each of the innermost lists.

    Parameters
    ----------
    x, axis
        As for :func:`softmax`.

    Returns
    -------
    ak.Array
        As for :func:`softmax`.

    Raises
    ------
    ValueError, TypeError
        As for :func:`softmax`.

    Examples
    --------
    >>> import fastsoftmax.awkward
    >>> fastsoftmax.awkward.log_softmax([[1000.0, 1.0], [7.0]]).tolist()
    [[0.0, -999.0], [0.0]]
    """
    return _of_lists("log_softmax", x, axis)


def logsumexp(x, axis=-1):
    """Logarithm of the sum of exponentials of each of the innermost lists.

    Parameters
    ----------
    x, axis
        As for :func:`softmax`.

    Returns
    -------
    ak.Array, or a NumPy scalar of an x without lists
        A number for each list, -inf of an empty one.

    Raises
    ------
    ValueError, TypeError
        As for :func:`softmax`.

    Examples
    --------
    >>> import fastsoftmax.awkward
    >>> fastsoftmax.awkward.logsumexp([[1000.0], [], [0.0]]).tolist()
    [1000.0, -inf, 0.0]
    """
    return _of_lists("logsumexp", x, axis)


def register(name="logits"):
    """Let the ufuncs of :mod:`fastsoftmax.ufuncs` work list by list on lists of a name.

    Adds to ``ak.behavior``, as others' ``register_awkward`` do. Lists of the name keep it through
    every ufunc; to the others it makes no difference.

    Parameters
    ----------
    name : str, default "logits"
        What ``ak.with_parameter(x, "__list__", name)`` gives to the innermost lists of x.

    Examples
    --------
    >>> import awkward as ak
    >>> import fastsoftmax.awkward
    >>> from fastsoftmax import ufuncs
    >>> fastsoftmax.awkward.register("scores")
    >>> scores = ak.with_parameter([[0.0], [], [1.0, 1.0]], "__list__", "scores")
    >>> ufuncs.softmax(scores).tolist()
    [[1.0], [], [0.5, 0.5]]
    """

    def overload(ufunc, method, inputs, kwargs):
        if ufunc in _OF_UFUNC and method == "__call__":
            return _OF_UFUNC[ufunc](*inputs, **kwargs)
        plain = [
            ak.with_parameter(x, "__list__", None) if isinstance(x, ak.Array) else x for x in inputs
        ]
        result = getattr(ufunc, method)(*plain, **kwargs)
        several = result if isinstance(result, tuple) else (result,)
        named = tuple(ak.with_parameter(y, "__list__", name) for y in several)
        return named if isinstance(result, tuple) else named[0]

    ak.behavior[np.ufunc, name] = overload


_OF_UFUNC = {
    ufuncs.softmax: softmax,
    ufuncs.log_softmax: log_softmax,
    ufuncs.logsumexp: logsumexp,
}


def _of_lists(name, x, axis):
    """Apply a function to the innermost lists."""
    if axis != -1:
        raise ValueError(f"axis must be -1, the innermost lists, got {axis!r}")
    x = ak.Array(x)
    if ak.backend(x) != "cpu":
        raise TypeError(f"x must be on the backend cpu, got {ak.backend(x)}")
    if x.ndim == 1:
        return _of_lists(name, x[np.newaxis], -1)[0]
    return ak.transform(lambda layout, **_: _of_node(name, layout), x)


def _of_node(name, layout):
    """What becomes of a node of the layout; None if the lists are farther down."""
    if layout.is_record or layout.is_union or layout.parameter("__array__") is not None:
        raise TypeError(f"x must hold lists of numbers, got {ak.type(layout)}")
    if layout.is_numpy:  # of several dimensions
        return ak.contents.NumpyArray(getattr(_core, name)(layout.data, -1))
    if not layout.is_list:
        return None
    # Packed: of slices Awkward keeps what lies behind them, of picked records all, and which.
    layout = layout.to_ListOffsetArray64(True).to_packed()
    content, starts, places = layout.content, np.asarray(layout.offsets), None
    if content.is_option and content.purelist_depth == 1:
        there = content.mask_as_bool(valid_when=True)
        before = np.concatenate([[0], np.cumsum(there)])
        places = ak.index.Index64(np.where(there, before[:-1], -1))
        content, starts = content.project(), before[starts]
    if content.is_unknown:
        content = content.to_NumpyArray(np.float64)
    if not content.is_numpy or content.data.ndim > 1:
        return None
    y = _core._of_lists(name, content.data, starts)
    y = ak.contents.NumpyArray(y)
    if name == "logsumexp":
        return y
    if places is not None:
        y = ak.contents.IndexedOptionArray(places, y)
    return ak.contents.ListOffsetArray(layout.offsets, y, parameters=layout.parameters)
