# The ufuncs of fastsoftmax.ufuncs: a part of _core.pyx, whose helpers they share.

from cpython.exc cimport PyErr_Occurred, PyErr_SetObject
from numpy cimport (
    PyUFunc_FromFuncAndDataAndSignature, PyUFunc_None, PyUFunc_RegisterLoopForType,
    PyUFuncGenericFunction, import_ufunc,
)

import_ufunc()

cdef struct _loop_data:
    fsm_op op
    fsm_dtype dtype


cdef void _ufunc_loop(char **at, const npy_intp *size, const npy_intp *stride,
                      void *data) noexcept nogil:
    """size and stride: rows, then elements. Called by NumPy without the GIL; it is taken only for
    what is long enough for threads, and then to look for signals. An exception that is left set is
    raised by NumPy."""
    cdef fsm_problem problem
    cdef fsm_op op = (<_loop_data *>data).op
    cdef fsm_dtype dtype = (<_loop_data *>data).dtype
    cdef ptrdiff_t out_step = 0 if op == FSM_LOGSUMEXP else stride[3]
    if fsm_is_small(size[0] * max(size[1], 1)):  # logsumexp has results of no elements, too
        if fsm_softmax_rows(_active, op, dtype, at[0], stride[0], stride[2], at[1], stride[1],
                            out_step, size[0], size[1], 1) == FSM_NOMEM:
            with gil:
                PyErr_SetObject(MemoryError, "fastsoftmax: no memory for scratch")
        return
    fsm_describe_rows(&problem, op, dtype, at[0], stride[0], stride[2], at[1], stride[1], out_step,
                      size[0], size[1])
    with gil:
        if PyErr_Occurred() != NULL:  # in an earlier loop of the same call
            return
        try:
            _run(&problem)
        except BaseException as error:
            PyErr_SetObject(type(error), error)


# NumPy takes the first loop to whose type the input can be cast safely, unless one is its own:
# float64 comes first, so that integers become float64 and int8 not float16.
cdef PyUFuncGenericFunction _loop = <PyUFuncGenericFunction>_ufunc_loop
cdef PyUFuncGenericFunction[3] _loops = [_loop, _loop, _loop]
cdef char[6] _loop_types = [NPY_DOUBLE, NPY_DOUBLE, NPY_FLOAT, NPY_FLOAT, NPY_FLOAT16, NPY_FLOAT16]
cdef _loop_data[3][4] _loop_rows  # of each ufunc and type, the last one bfloat16
cdef void *_loop_row_at[3][3]


cdef _new_ufunc(int which, fsm_op op, const char *name, const char *doc, const char *signature):
    """name, doc and signature must last as long as the ufunc."""
    cdef int i
    for i, dtype in enumerate((FSM_F64, FSM_F32, FSM_F16, FSM_BF16)):
        _loop_rows[which][i].op, _loop_rows[which][i].dtype = op, dtype
        if i < 3:
            _loop_row_at[which][i] = &_loop_rows[which][i]
    return PyUFunc_FromFuncAndDataAndSignature(
        _loops, _loop_row_at[which], _loop_types, 3, 1, 1, PyUFunc_None, <char *>name, <char *>doc,
        0, <char *>signature)


_softmax_ufunc = _new_ufunc(0, FSM_SOFTMAX, b"softmax", b"""\
Softmax of rows: the ufunc of :func:`fastsoftmax.softmax`, with the same bits.

Parameters
----------
x : array_like
    Logits, in rows along the last axis (or `axis`).
out, axis, axes, dtype, ...
    As for every generalized ufunc of NumPy.

Returns
-------
ndarray or NumPy scalar
    Of the shape of x; float64 for integers and bool.

Examples
--------
>>> import numpy as np
>>> from fastsoftmax import ufuncs
>>> ufuncs.softmax(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])).round(4)
array([[0.09  , 0.2447, 0.6652],
       [0.3333, 0.3333, 0.3333]])
""", b"(n)->(n)")
_log_softmax_ufunc = _new_ufunc(1, FSM_LOG_SOFTMAX, b"log_softmax", b"""\
Logarithm of softmax of rows: the ufunc of :func:`fastsoftmax.log_softmax`, with the same bits.

Parameters
----------
x, out, axis, axes, dtype, ...
    As for :data:`fastsoftmax.ufuncs.softmax`.

Returns
-------
ndarray or NumPy scalar
    Of the shape of x; float64 for integers and bool.

Examples
--------
>>> import numpy as np
>>> from fastsoftmax import ufuncs
>>> ufuncs.log_softmax(np.array([1000.0, 1.0]))
array([   0., -999.])
""", b"(n)->(n)")
_logsumexp_ufunc = _new_ufunc(2, FSM_LOGSUMEXP, b"logsumexp", b"""\
Logarithm of the sum of exponentials of rows: the ufunc of :func:`fastsoftmax.logsumexp`, with the
same bits. Of the last axis, where that function takes all of them.

Parameters
----------
x, out, axis, axes, dtype, ...
    As for :data:`fastsoftmax.ufuncs.softmax`.
keepdims : bool, default False
    Leave the axis in the result, with length 1.

Returns
-------
ndarray or NumPy scalar
    Of the shape of x without the axis; float64 for integers and bool. -inf for an empty row.

Examples
--------
>>> import numpy as np
>>> from fastsoftmax import ufuncs
>>> ufuncs.logsumexp(np.zeros((2, 4))).round(4)
array([1.3863, 1.3863])
""", b"(n)->()")


def _register_bfloat16(dtype):
    """Adds loops for bfloat16 to the ufuncs, before they are called for the first time: later NumPy
    might remember that it found none."""
    cdef int which, num = dtype.num
    cdef int[2] types = [num, num]
    if _code(dtype) != FSM_BF16:
        raise TypeError(f"dtype must be bfloat16, got {dtype}")
    for which, ufunc in enumerate((_softmax_ufunc, _log_softmax_ufunc, _logsumexp_ufunc)):
        PyUFunc_RegisterLoopForType(ufunc, num, _loop, types, &_loop_rows[which][3])
