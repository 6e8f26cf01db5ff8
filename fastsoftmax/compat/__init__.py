"""The functions of fastsoftmax under the names and signatures of other libraries.

Code that uses the function on the left works on NumPy arrays, without its library, when its import
says ``fastsoftmax.compat.scipy`` or ``fastsoftmax.compat.torch`` instead:

========================================  ======================================
``scipy.special``                         :mod:`fastsoftmax.compat.scipy`
``torch.nn.functional`` (and ``torch``)   :mod:`fastsoftmax.compat.torch`
========================================  ======================================

Each module begins with the list of what differs. Neither imports the library that it stands in for,
and ``import fastsoftmax`` imports neither.

Arguments are whatever NumPy can read without a copy: an ndarray, an object with ``__array__`` (a
PyTorch tensor on the CPU, a pandas or xarray object), one with the buffer protocol, one that has
nothing but DLPack, on the CPU; or a list of numbers. Results are ndarrays, and NumPy scalars where
they have no dimensions.

>>> from array import array
>>> from fastsoftmax.compat.scipy import softmax
>>> softmax(array("d", [0.0, 0.0]))
array([0.5, 0.5])

A PyTorch tensor of bfloat16 has no ``__array__``: NumPy does not know the type. ml_dtypes does, and
the bits are the same, so this line makes it an array, without a copy, and the next one a tensor of
the result::

    x = t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    t = torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)

A tensor that requires a gradient is refused, as PyTorch does it: pass ``t.detach()``.
"""
