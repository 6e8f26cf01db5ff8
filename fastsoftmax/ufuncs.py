"""softmax, log_softmax and logsumexp as ufuncs of NumPy, for libraries that work with ufuncs.

``softmax`` and ``log_softmax`` have the signature ``(n)->(n)``, ``logsumexp`` ``(n)->()``. They
give the bits of :func:`fastsoftmax.softmax`, :func:`fastsoftmax.log_softmax` and
:func:`fastsoftmax.logsumexp` along one axis, by the same kernels, on as many threads, and take what
every generalized ufunc takes: ``axis``, ``axes``, ``out``, ``dtype``, ``casting``, ``keepdims``.

**When to use which.** The functions of the package are the main interface: several axes, ``bias``,
``where``, ``temperature``, weights, mixed types in one pass, in place without a copy, and any
array-like, which they turn into an ndarray. Use the ufuncs for what must stay what it is: NumPy
lets an argument with ``__array_ufunc__`` take over, so that

- a dask array stays lazy, and its chunks are computed by its workers; the axis must be one chunk;
- ``xarray.apply_ufunc(ufuncs.softmax, x, input_core_dims=[["class"]],
  output_core_dims=[["class"]], dask="parallelized", output_dtypes=[x.dtype])`` keeps dimensions and
  coordinates;
- subclasses of ndarray, such as those with units, decide for themselves.

Awkward Array hands a ufunc the numbers of all lists at once, which is right for ``np.exp`` and not
for a softmax of each list: these ufuncs refuse that, with a TypeError (with NumPy 2.2 or later;
before, a ufunc can have no attributes, and the result is that of one long list).
:mod:`fastsoftmax.awkward` has the functions for jagged arrays, and makes these ufuncs work list by
list on lists that have a name: Awkward lets nobody overload a ufunc for lists that have none.

What differs otherwise: ``logsumexp`` is that of the last axis, not of all; x needs a dimension; an
``out`` that overlaps the input, also x itself, costs a copy; masked arrays are not refused, but
what they mask takes part.

Importing this module imports ml_dtypes if it is installed, for its bfloat16.

>>> import numpy as np
>>> from fastsoftmax import ufuncs
>>> isinstance(ufuncs.softmax, np.ufunc), ufuncs.softmax.signature
(True, '(n)->(n)')
>>> ufuncs.softmax(np.array([[0, 0], [0, 0]], np.float32), axis=0)
array([[0.5, 0.5],
       [0.5, 0.5]], dtype=float32)
"""

import sys

import numpy as np

from ._core import _log_softmax_ufunc as log_softmax
from ._core import _logsumexp_ufunc as logsumexp
from ._core import _register_bfloat16
from ._core import _softmax_ufunc as softmax

__all__ = ["log_softmax", "logsumexp", "softmax"]

try:
    from ml_dtypes import bfloat16
except ImportError:  # then no array has the type
    pass
else:
    _register_bfloat16(np.dtype(bfloat16))


def _refuse_flattened_lists(ufunc):
    """Make the ufunc raise where Awkward Array has taken the numbers out of their lists.

    All that Awkward asks the ufunc before it does so is which types it takes, by this method. The
    attribute hides it, and is the method to everybody else.
    """

    def resolve_dtypes(*args, **kwargs):
        if sys._getframe(1).f_globals.get("__name__", "").startswith("awkward."):
            raise TypeError(
                f"fastsoftmax.ufuncs.{ufunc.__name__} would take the numbers of all lists for one "
                f"row; use fastsoftmax.awkward.{ufunc.__name__}, or give the lists a name "
                "(fastsoftmax.awkward.register)"
            )
        return type(ufunc).resolve_dtypes(ufunc, *args, **kwargs)

    ufunc.resolve_dtypes = resolve_dtypes


for _ufunc in (softmax, log_softmax, logsumexp):
    if hasattr(_ufunc, "__dict__"):  # NumPy 2.2
        _refuse_flattened_lists(_ufunc)
