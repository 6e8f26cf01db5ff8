"""The binding: check arguments -> describe the problem -> allocate -> call C -> raise.

The functions below own the semantics: dtypes, axes, broadcasting, overlap, errors. What they hand
to C (fastsoftmax.h) is a set of arrays with strides, broadcast to one shape, and the exact types in
which to compute and to store. This file has the softmax family and the settings. Its parts are
_loss.pxi (cross entropy), _attention.pxi, _attention_varlen.pxi (packed sequences),
_attention_backward.pxi (gradients), _ufuncs.pxi (the loops of the ufuncs), _rows.pxi (rows of any
lengths, parts of rows) and _embedding.pxi (what compiled code of other people calls).
"""

import os
import sys
from contextvars import ContextVar
from operator import index

import numpy as np

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_INCREF, PyObject
from cpython.weakref cimport PyWeakref_NewRef
from libc.math cimport INFINITY
from libc.stdlib cimport llabs
from numpy cimport (
    NPY_ARRAY_OWNDATA, NPY_ARRAY_WRITEABLE, NPY_DOUBLE, NPY_FLOAT, NPY_FLOAT16,
    PyArray_CheckExact, PyArray_DATA, PyArray_DIMS, PyArray_EMPTY, PyArray_FLAGS,
    PyArray_ISCARRAY, PyArray_ISCARRAY_RO, PyArray_ITEMSIZE, PyArray_NDIM, PyArray_SIZE,
    PyArray_STRIDES, PyArray_TYPE, ndarray, npy_intp,
)

cnp.import_array()

cdef const fsm_isa *_active = NULL  # every call runs on this one


# ---- dtypes ----

_INTEGERS = {("i", 1): FSM_I8, ("i", 2): FSM_I16, ("i", 4): FSM_I32, ("i", 8): FSM_I64,
             ("u", 1): FSM_U8, ("u", 2): FSM_U16, ("u", 4): FSM_U32, ("u", 8): FSM_U64}
_FLOATS = "float16, bfloat16, float32 or float64"


cdef int _code(dtype) except -2:
    """The fsm_dtype, -1 if C does not know the type."""
    cdef int num = dtype.num
    if num == NPY_FLOAT:
        return FSM_F32
    if num == NPY_DOUBLE:
        return FSM_F64
    if num == NPY_FLOAT16:
        return FSM_F16
    if dtype.kind == "b":
        return FSM_U8
    if dtype.kind in "iu":
        return _INTEGERS[dtype.kind, dtype.itemsize]
    if dtype.name == "bfloat16" and dtype.itemsize == 2:
        return FSM_BF16
    return -1


cdef int _float_code(dtype, name) except -2:
    cdef int code = _code(dtype)
    if not 0 <= code <= FSM_F64:
        raise TypeError(f"{name} must be {_FLOATS}, got {dtype}")
    return code


cpdef bint _is_masked(value) except -1:
    """Whether it is a MaskedArray; NumPy may not have loaded numpy.ma yet, which takes 10 ms."""
    return isinstance(value, getattr(sys.modules.get("numpy.ma"), "MaskedArray", ()))


cpdef ndarray _converted(value, name):
    """What NumPy makes of an argument, held; its exceptions, and PyTorch's, do not say of which."""
    cdef ndarray array
    try:
        array = np.asarray(value)
        if (array.dtype.kind == "O" and hasattr(value, "__dlpack__")
                and not hasattr(value, "__array__")):
            array = np.from_dlpack(value)
        return _held(array)
    except RecursionError:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError, BufferError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be array_like, got {type(value).__name__}: {error}") from error


cpdef bint _as_flag(value, name) except -1:
    try:
        if not isinstance(value, str):  # "False" is true
            return bool(value)
        cause = None
    except Exception as error:  # an array or a tensor, each with its own
        cause = error
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}") from cause


cdef extern from "numpy/arrayobject.h":
    object PyArray_NewFromDescr(type kind, cnp.dtype dtype, int ndim, npy_intp *shape,
                                npy_intp *strides, void *data, int flags, PyObject *template)


cdef ndarray _view(ndarray array, int ndim, npy_intp *shape, npy_intp *strides, int flags, base):
    """The memory of an array in another shape; it keeps `base`."""
    cdef ndarray view
    cdef cnp.dtype dtype = array.dtype
    Py_INCREF(dtype)  # the next call takes one
    view = PyArray_NewFromDescr(ndarray, dtype, ndim, shape, strides, PyArray_DATA(array),
                                flags & ~NPY_ARRAY_OWNDATA, NULL)
    cnp.set_array_base(view, base)
    return view


cdef ndarray _held(ndarray array):
    """A view whose shape is its own and whose memory stays, whatever another thread, or the code of
    another argument, does to the array meanwhile: NumPy does not resize what has a weak reference,
    not even without refcheck."""
    cdef object owner = array, base = cnp.get_array_base(array)
    while isinstance(base, ndarray):
        owner, base = base, cnp.get_array_base(base)
    kept = array, PyWeakref_NewRef(owner, None)
    return _view(array, PyArray_NDIM(array), PyArray_DIMS(array), PyArray_STRIDES(array),
                 PyArray_FLAGS(array), kept)


cpdef ndarray _as_array(value, name, mask=None):
    """An ndarray of native byte order, of a type that C knows, held. `mask` is the argument for
    masks of its shape."""
    if _is_masked(value):
        hint = f", and {mask}=~mask" if mask else ""
        raise TypeError(f"{name} must not be a MaskedArray; pass its data{hint}")
    array = _converted(value, name)
    if _code(array.dtype) < 0:
        raise TypeError(f"{name} has dtype {array.dtype}; supported are float16, bfloat16, "
                        "float32, float64, integers and bool")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


cdef ndarray _as_floats(value, name, compute, mask=None):
    """The same for a second input: integers become the compute type."""
    array = _as_array(value, name, mask)
    if array.dtype.kind == "b":
        hint = f"; a mask goes into {mask}=" if mask else ""
        raise TypeError(f"{name} must be real numbers, got bool{hint}")
    if array.dtype.kind in "iu":
        array = array.astype(compute)
    return array


cdef _broadcast(ndarray array, tuple shape, name, target="the shape of x"):
    """As np.broadcast_to, which a small call would wait for: it takes 4 us, this 0.2."""
    cdef npy_intp sizes[<int>FSM_MAX_NDIM]
    cdef npy_intp strides[<int>FSM_MAX_NDIM]
    cdef int d, ndim = len(shape), missing = ndim - PyArray_NDIM(array)
    cdef bint fits = missing >= 0
    for d in range(ndim):
        sizes[d] = shape[d]
        strides[d] = 0
        if fits and d >= missing and PyArray_DIMS(array)[d - missing] != 1:
            fits = PyArray_DIMS(array)[d - missing] == sizes[d]
            strides[d] = PyArray_STRIDES(array)[d - missing]
    if not fits:
        raise ValueError(f"{name} has shape {np.shape(array)}, which does not broadcast to "
                         f"{target}, {shape}")
    return _view(array, ndim, sizes, strides, PyArray_FLAGS(array) & ~NPY_ARRAY_WRITEABLE, array)


cdef _as_where(where, shape):
    return None if where is None else _broadcast(_as_mask(where, "where"), shape, "where")


cdef ndarray _as_mask(value, name, hint=""):
    array = _as_array(value, name)
    if array.dtype.kind != "b":
        raise TypeError(f"{name} must have dtype bool, got {array.dtype}{hint}")
    return array


# ---- the parts of a call ----

cdef int _begin(fsm_problem *problem, fsm_op op, ndarray x, axis) except -1:
    """Enters the shape of x and the axis: an integer, a tuple of them, or None for all."""
    cdef int d, ndim = x.ndim
    problem.op = op
    problem.ndim = ndim
    for d in range(<int>FSM_OPERAND_COUNT):
        problem.operand[d].data = NULL
    for d in range(ndim):
        problem.shape[d] = x.shape[d]
        problem.reduced[d] = axis is None
    if axis is None:
        return 0
    for one in axis if isinstance(axis, tuple) else (axis,):
        try:
            one = index(one)
        except TypeError:
            raise TypeError("axis must be an integer, a tuple of integers or None, got "
                            f"{axis!r} ({type(one).__name__})") from None
        if ndim == 0 and one in (0, -1) and not isinstance(axis, tuple):
            continue  # as NumPy's reductions: a scalar is a row of one
        if not -ndim <= one < ndim:
            raise np.exceptions.AxisError(one, ndim)
        d = one + ndim if one < 0 else one
        if problem.reduced[d]:
            raise ValueError(f"axis has a duplicate: {axis!r} for an array of {ndim} dimensions")
        problem.reduced[d] = 1
    return 0


cdef ndarray _as_out(out):
    """out, held before the other arguments are converted: that may run code that changes it."""
    if out is None:
        return None
    if _is_masked(out) or not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    y = _held(out)
    _float_code(y.dtype, "the dtype of out")
    if not y.dtype.isnative:
        raise TypeError(f"out must have native byte order, got {y.dtype!r}")
    return y


cdef _result_dtype(natural, dtype, out):
    """The dtype of the result: that of out, which is held, else `dtype`, else the natural one."""
    if dtype is not None:
        try:
            dtype = np.dtype(dtype)
        except Exception:  # of text that is no dtype NumPy may make any, a SyntaxError, too
            named = isinstance(dtype, str) and dtype == "bfloat16"
            hint = ": import ml_dtypes first" if named else ""
            raise TypeError(f"dtype must be {_FLOATS}, got {dtype!r}{hint}") from None
        _float_code(dtype, "dtype")
        if out is not None and out.dtype != dtype:
            raise TypeError(f"dtype and out differ: dtype={dtype}, out has {out.dtype}")
        return dtype.newbyteorder("=")
    if out is not None:
        return out.dtype
    return natural if 0 <= _code(natural) <= FSM_F64 else np.dtype(np.float64)


cdef _compute_dtype(first, second, result):
    """float64 if one of the types is, or is an integer; else float32."""
    for dtype in (first, second, result):
        if dtype is not None and not FSM_F16 <= _code(dtype) <= FSM_F32:
            return np.dtype(np.float64)
    return np.dtype(np.float32)


cdef _check_out(out, shape):
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, the result has {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; it must be writeable")
    if not (out.flags.c_contiguous or out.flags.f_contiguous) and _overlaps_itself(out):
        raise ValueError("out has elements that share memory with each other")


cdef bint _overlaps_itself(out):
    """Whether two elements share memory: from the smallest stride up, one of them does not step
    over all that the smaller ones reach. May err on the side of True for views that no slicing
    makes."""
    reach = out.itemsize
    for stride, size in sorted(zip(map(abs, out.strides), out.shape)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


cdef _apart(array, out, bint in_place_ok):
    """array, or a copy of it if writing to out could change it before it is read. Element by
    element in place needs none. What is broadcast is copied once."""
    if array is None or out is None or not np.may_share_memory(array, out):
        return array
    same = (array.ctypes.data == out.ctypes.data and array.strides == out.strides
            and array.shape == out.shape and array.dtype == out.dtype)
    if same and in_place_ok:
        return array
    once = ()
    for stride in array.strides:
        once += (slice(1) if stride == 0 else slice(None),)
    return np.broadcast_to(array[once].copy(), array.shape)


_TEMPERATURE = "finite and > 0, and its reciprocal too"


cdef double _rounded(double value, compute) noexcept:
    return value if _code(compute) == FSM_F64 else <float>value


cdef _reciprocal(temperature, shape, compute, fsm_problem *problem, bint negate):
    """+-1/temperature in the compute type, as an array that broadcasts; None if it is 1."""
    cdef int d, offset
    cdef double one
    if temperature is None:
        return np.asarray(-1, compute) if negate else None
    t = _as_floats(temperature, "temperature", np.float64)
    if t.ndim == 0:  # mostly it is a number; to ask NumPy would take longer than a small softmax
        one = float(t)
        if not (0 < one < INFINITY and 0 < _rounded(1 / one, compute) < INFINITY):
            raise ValueError(f"temperature must be {_TEMPERATURE}, got {one}")
        return np.asarray(-1 / one if negate else 1 / one, compute)
    offset = len(shape) - t.ndim
    for d in range(max(offset, 0), len(shape)):
        if problem.reduced[d] and t.shape[d - offset] != 1:
            raise ValueError("temperature must have length 1 along axis, got shape "
                             f"{t.shape} for x of shape {shape}")
    with np.errstate(all="ignore"):  # a signalling NaN warns when it is cast
        t = t.astype(np.float64)
        r = (1 / t).astype(compute)
    bad = ~(np.isfinite(t) & (t > 0) & np.isfinite(r) & (r > 0))
    if bad.any():
        raise ValueError(f"temperature must be {_TEMPERATURE}, got {float(t[bad].flat[0])}")
    r = np.asarray(-r if negate else r, compute)
    return _broadcast(r, shape, "temperature")


cdef void _enter(fsm_array *operand, array, int end) noexcept:
    """Enters an array whose last dimension is number end - 1 of the operand's; dimensions that it
    does not have are broadcast. None means that it is absent."""
    cdef ndarray a
    cdef int d, missing
    operand.data = NULL
    if array is None:
        return
    a = array
    missing = end - a.ndim
    operand.data = <char *>PyArray_DATA(a)
    operand.dtype = <fsm_dtype><int>_code(a.dtype)
    for d in range(end):
        operand.strides[d] = a.strides[d - missing] if d >= missing else 0


cdef void _describe(fsm_problem *problem, fsm_operand which, array) noexcept:
    """Enters an array of the problem's shape."""
    _enter(&problem.operand[<int>which], array, problem.ndim)


cdef void _describe_reduced(fsm_problem *problem, fsm_operand which, array, bint keepdims) noexcept:
    """Enters the result of a reduction: stride 0 along the axis."""
    cdef ndarray a
    cdef int d, kept = 0
    if array is None:
        return
    a = array
    problem.operand[<int>which].data = <char *>PyArray_DATA(a)
    problem.operand[<int>which].dtype = <fsm_dtype><int>_code(a.dtype)
    for d in range(problem.ndim):
        problem.operand[<int>which].strides[d] = 0 if problem.reduced[d] else a.strides[kept]
        kept += keepdims or not problem.reduced[d]


cdef int _run(fsm_problem *problem) except -1:
    """Does the work, without the GIL, in slices of some milliseconds with a look at the signals
    after each."""
    cdef fsm_plan *plan
    cdef fsm_status status
    problem.isa = _active
    problem.threads = get_num_threads()
    status = fsm_plan_new(&plan, problem)
    if status == FSM_NOMEM:
        raise MemoryError("fastsoftmax: no memory for scratch")
    try:
        while status == FSM_AGAIN:
            with nogil:
                status = fsm_plan_run(plan)
            PyErr_CheckSignals()
    finally:
        fsm_plan_free(plan)
    return 0


# ---- the functions ----

cdef ndarray _plain(fsm_op op, x, axis, out):
    """softmax or log_softmax of a C-contiguous array along its last axis, nothing fused; None if it
    is not that. The checks are C: a small call costs little more than being called."""
    cdef ndarray a, y, held_a, held_y
    cdef fsm_problem problem
    cdef fsm_dtype dtype
    cdef int kind, d
    cdef npy_intp n, size, rows, apart, step
    if not PyArray_CheckExact(x):
        return None
    a = x
    kind = PyArray_TYPE(a)
    if kind == NPY_FLOAT:
        dtype = FSM_F32
    elif kind == NPY_DOUBLE:
        dtype = FSM_F64
    elif kind == NPY_FLOAT16:
        dtype = FSM_F16
    else:
        return None
    size = PyArray_SIZE(a)
    if PyArray_NDIM(a) == 0 or size == 0 or not PyArray_ISCARRAY_RO(a):
        return None
    if type(axis) is not int or (axis != -1 and axis != PyArray_NDIM(a) - 1):
        return None
    if out is None:
        y = PyArray_EMPTY(PyArray_NDIM(a), PyArray_DIMS(a), kind, 0)
    else:
        if not PyArray_CheckExact(out):
            return None
        y = out
        if PyArray_TYPE(y) != kind or PyArray_NDIM(y) != PyArray_NDIM(a) or not PyArray_ISCARRAY(y):
            return None
        for d in range(PyArray_NDIM(a)):
            if PyArray_DIMS(y)[d] != PyArray_DIMS(a)[d]:
                return None
        apart = llabs(<char *>PyArray_DATA(y) - <char *>PyArray_DATA(a))
        if y is not a and apart < size * PyArray_ITEMSIZE(a):
            return None
    n = PyArray_DIMS(a)[PyArray_NDIM(a) - 1]
    rows = size // n
    if fsm_is_small(size):
        fsm_softmax_small(_active, dtype, op == FSM_LOG_SOFTMAX, PyArray_DATA(a), PyArray_DATA(y),
                          rows, n)
        return y
    held_a, held_y = _held(a), _held(y)  # small work keeps the GIL
    # To hold them may run the garbage collector, and with it any code.
    if (PyArray_TYPE(held_a) != kind or PyArray_SIZE(held_a) != size
            or PyArray_TYPE(held_y) != kind or PyArray_SIZE(held_y) != size
            or not PyArray_ISCARRAY_RO(held_a) or not PyArray_ISCARRAY(held_y)):
        return None
    step = PyArray_ITEMSIZE(held_a)
    fsm_describe_rows(&problem, op, dtype, PyArray_DATA(held_a), n * step, step,
                      PyArray_DATA(held_y), n * step, step, rows, n)
    _run(&problem)
    return y


cdef extern from "<fenv.h>" nogil:
    ctypedef struct fenv_t:
        pass
    const fenv_t *FE_DFL_ENV
    int fegetenv(fenv_t *environment)
    int fesetenv(const fenv_t *environment)


cdef fenv_t _own_environment() noexcept:
    """Sets the default floating-point modes, so that NumPy's arithmetic on the arguments rounds to
    nearest; the caller's modes and status flags, for fesetenv afterwards. (Not a context manager:
    those of Cython crash when there is no memory for a traceback.)"""
    cdef fenv_t callers
    fegetenv(&callers)
    fesetenv(FE_DFL_ENV)
    return callers


cdef _softmax(fsm_op op, x, axis, bias, where, temperature, dtype, out, bint negate):
    cdef fenv_t callers = _own_environment()
    try:
        return _softmax_any(op, x, axis, bias, where, temperature, dtype, out, negate)
    finally:
        fesetenv(&callers)


cdef _softmax_any(fsm_op op, x, axis, bias, where, temperature, dtype, out, bint negate):
    cdef fsm_problem problem
    cdef ndarray y = _as_out(out), a = _as_array(x, "x", "where")
    shape = np.shape(a)
    _begin(&problem, op, a, axis)
    result = _result_dtype(a.dtype, dtype, y)
    compute = _compute_dtype(a.dtype, None, result)
    problem.compute = <fsm_dtype><int>_code(compute)
    if bias is not None:
        bias = _broadcast(_as_floats(bias, "bias", compute, "where"), shape, "bias")
    where = _as_where(where, shape)
    scale = _reciprocal(temperature, shape, compute, &problem, negate)
    if out is None:
        y = np.empty_like(a, result, subok=False)
    else:
        _check_out(y, shape)
        a = _apart(a, y, True)
        bias = _apart(bias, y, False)
        where = _apart(where, y, False)
    _describe(&problem, FSM_X, a)
    _describe(&problem, FSM_BIAS, bias)
    _describe(&problem, FSM_WHERE, where)
    _describe(&problem, FSM_SCALE, scale)
    _describe(&problem, FSM_OUT, y)
    _run(&problem)
    if out is not None:
        return out
    return y if y.ndim else y[()]


def softmax(x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, out=None):
    """Softmax along an axis: ``exp(z) / sum(exp(z))`` with ``z = x / temperature + bias``.

    Stable for any finite input, computed in float32 (float64 for float64 and integer input)
    whatever the type of x, and rounded once to the type of the result. The bits of a row's result
    depend on the row's values alone: not on the axis, strides, threads, batch or instruction set.

    Parameters
    ----------
    x : array_like
        Logits: float16, bfloat16 (of ml_dtypes), float32 or float64; integers and bool are taken as
        float64.
    axis : int, tuple of ints or None, default -1
        The axis or axes along which the result sums to 1; None means all.
    bias : array_like, optional
        Real numbers added to the scaled logits; broadcasts to the shape of x. An entry whose bias
        is -inf takes no part.
    where : array_like of bool, optional
        Broadcasts to the shape of x. An entry where it is False takes no part.
    temperature : float or array_like, optional
        Divides the logits; finite and > 0. An array broadcasts to the shape of x, with length 1
        along axis.
    dtype : dtype, optional
        Type of the result, one of the four floating types. Default: that of x. The calculation
        takes the wider of the two types.
    out : ndarray, optional
        Where to put the result; of the shape of x and a floating type. It may be x itself.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape of x; a scalar if x has no dimensions. Entries that take no part are exactly 0,
        whatever x holds there, and so is exp(-inf). A row of which nothing takes part is all zeros.
        A row whose entries that take part are all -inf, or have a NaN or +inf among them, is NaN
        there.

    Raises
    ------
    TypeError
        For a dtype that is not supported, a masked array, where not bool, bias bool, dtype and out
        that differ.
    ValueError
        For shapes that do not fit, a temperature that is not finite and > 0, out read-only or
        overlapping itself.
    numpy.exceptions.AxisError
        For an axis that x does not have.

    See Also
    --------
    log_softmax, logsumexp, softmin, softmax_backward

    Notes
    -----
    Largest error: 2 ulp of the exact softmax of z on common distributions and 3.5 on any row for
    float32 and float64, 0.51 ulp for float16 and bfloat16. z is rounded once to the type of the
    calculation, as by a fused multiply-add, and so is bias before: -1e39 is -inf in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import softmax
    >>> softmax(np.array([1.0, 2.0, 3.0])).round(4)
    array([0.09  , 0.2447, 0.6652])
    >>> softmax(np.array([1.0, 2.0, 3.0]), temperature=2).round(3)
    array([0.186, 0.307, 0.506])
    >>> softmax(np.array([[2.0, 5.0, 1.0]]), where=np.array([True, False, True])).round(3)
    array([[0.731, 0.   , 0.269]])
    """
    cdef ndarray y
    if bias is None and where is None and temperature is None and dtype is None:
        y = _plain(FSM_SOFTMAX, x, axis, out)
        if y is not None:
            return y
    return _softmax(FSM_SOFTMAX, x, axis, bias, where, temperature, dtype, out, False)


def log_softmax(x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, out=None):
    """Logarithm of softmax along an axis: ``z - log(sum(exp(z)))`` with ``z = x / temperature +
    bias``.

    More accurate than the logarithm of :func:`softmax`, and finite where that would be ``log(0)``.

    Parameters
    ----------
    x, axis, bias, where, temperature, dtype, out
        As for :func:`softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        Of the shape of x. Entries that take no part are -inf, and so is a row of which nothing
        takes part. NaN rows are those of :func:`softmax`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Notes
    -----
    Largest error: 2 ulp of ``max(1, max|z|, |result|)``; for the dominating entry of a float32 row,
    where the result is close to 0, 4 ulp of the result itself plus n * 2**-45.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import log_softmax
    >>> log_softmax(np.array([1.0, 2.0, 3.0])).round(4)
    array([-2.4076, -1.4076, -0.4076])
    """
    cdef ndarray y
    if bias is None and where is None and temperature is None and dtype is None:
        y = _plain(FSM_LOG_SOFTMAX, x, axis, out)
        if y is not None:
            return y
    return _softmax(FSM_LOG_SOFTMAX, x, axis, bias, where, temperature, dtype, out, False)


def softmin(x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, out=None):
    """Softmin along an axis: the softmax of ``-x / temperature + bias``.

    Parameters
    ----------
    x, axis, bias, where, temperature, dtype, out
        As for :func:`softmax`.

    Returns
    -------
    ndarray or NumPy scalar
        As for :func:`softmax`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import softmin
    >>> softmin(np.array([1.0, 2.0, 3.0])).round(4)
    array([0.6652, 0.2447, 0.09  ])
    """
    return _softmax(FSM_SOFTMAX, x, axis, bias, where, temperature, dtype, out, True)


def logsumexp(x, /, axis=None, *, b=None, where=None, keepdims=False, dtype=None, out=None,
              return_sign=False):
    """Logarithm of a sum of exponentials along an axis: ``log(sum(b * exp(x)))``.

    Parameters
    ----------
    x : array_like
        As for :func:`softmax`.
    axis : int, tuple of ints or None, default None
        The axis or axes to sum over; None means all.
    b : array_like, optional
        Weights of either sign; real numbers that broadcast to the shape of x. An entry whose weight
        is 0, in the type of the calculation, takes no part.
    where : array_like of bool, optional
        Broadcasts to the shape of x. An entry where it is False takes no part.
    keepdims : bool, default False
        Leave the reduced axes in the result, with length 1.
    dtype, out
        As for :func:`softmax`; out has the shape of the result.
    return_sign : bool, default False
        Return the pair (log|sum|, sign).

    Returns
    -------
    ndarray or NumPy scalar, or a tuple of two
        The logarithm: -inf for an empty sum, NaN for a negative one unless return_sign. With
        return_sign also the sign: 1, -1, 0 for a sum of 0, NaN for NaN, in the dtype of the result.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Notes
    -----
    Largest error without b: 2 ulp of ``max(1, max|x|, |result|)``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import logsumexp
    >>> float(logsumexp(np.array([1000.0, 1000.0])).round(4))
    1000.6931
    >>> value, sign = logsumexp(np.array([1.0, 2.0]), b=np.array([1.0, -1.0]), return_sign=True)
    >>> float(value.round(4)), float(sign)
    (1.5413, -1.0)
    """
    cdef fenv_t callers = _own_environment()
    try:
        return _logsumexp(x, axis, b, where, _as_flag(keepdims, "keepdims"), dtype, out,
                          _as_flag(return_sign, "return_sign"))
    finally:
        fesetenv(&callers)


cdef _logsumexp(x, axis, b, where, bint keep, dtype, out, bint signed):
    cdef fsm_problem problem
    cdef int d
    y = _as_out(out)
    cdef ndarray a = _as_array(x, "x", "where")
    shape = np.shape(a)
    _begin(&problem, FSM_LOGSUMEXP if b is None else FSM_LOGSUMEXP_WEIGHTED, a, axis)
    result = _result_dtype(a.dtype, dtype, y)
    compute = _compute_dtype(a.dtype, None, result)
    problem.compute = <fsm_dtype><int>_code(compute)
    if b is not None:
        b = _broadcast(_as_floats(b, "b", compute, "where"), shape, "b")
    where = _as_where(where, shape)
    reduced = ()
    for d in range(a.ndim):
        if keep or not problem.reduced[d]:
            reduced += (1 if problem.reduced[d] else shape[d],)
    if out is None:
        y = np.empty(reduced, result)
    else:
        _check_out(y, reduced)
        a, b, where = _apart(a, y, False), _apart(b, y, False), _apart(where, y, False)
    sign = np.empty(reduced, result) if signed else None
    if a.size == 0:
        y.fill(-np.inf)
        if signed:
            sign.fill(0)
    else:
        _describe(&problem, FSM_X, a)
        _describe(&problem, FSM_Y, b)
        _describe(&problem, FSM_WHERE, where)
        _describe_reduced(&problem, FSM_OUT, y, keep)
        _describe_reduced(&problem, FSM_SIGN, sign if b is not None else None, keep)
        _run(&problem)
        if signed and b is None:  # a sum of exponentials: 1, 0 if it is empty, NaN if it is NaN
            log = y
            if result != compute and np.isneginf(y).any():  # or rounded to -inf
                log = np.empty(reduced, compute)
                _describe_reduced(&problem, FSM_OUT, log, keep)
                _run(&problem)
            sign[...] = log > -np.inf
            np.copyto(sign, y, where=np.isnan(y), casting="same_kind")
    if out is not None:
        y = out
    elif y.ndim == 0:
        y = y[()]
    if signed:
        return y, sign if sign.ndim else sign[()]
    return y


cdef _backward(fsm_op op, grad, y, axis, temperature, out):
    cdef fenv_t callers = _own_environment()
    try:
        return _backward_any(op, grad, y, axis, temperature, out)
    finally:
        fesetenv(&callers)


cdef _backward_any(fsm_op op, grad, y, axis, temperature, out):
    cdef fsm_problem problem
    cdef ndarray dx = _as_out(out), g = _as_array(grad, "grad"), v = _as_array(y, "y")
    shape = np.shape(g)
    if shape != np.shape(v):
        raise ValueError(f"grad and y must have one shape, got {shape} and {np.shape(v)}")
    _begin(&problem, op, g, axis)
    natural = g.dtype
    if v.dtype != natural:  # no promotion of NumPy's relates float16 and bfloat16
        natural = _compute_dtype(g.dtype, v.dtype, None)
    result = _result_dtype(natural, None, dx)
    compute = _compute_dtype(g.dtype, v.dtype, result)
    problem.compute = <fsm_dtype><int>_code(compute)
    scale = _reciprocal(temperature, shape, compute, &problem, False)
    if out is None:
        dx = np.empty_like(g, result, subok=False)
    else:
        _check_out(dx, shape)
        g, v = _apart(g, dx, True), _apart(v, dx, True)
    _describe(&problem, FSM_X, g)
    _describe(&problem, FSM_Y, v)
    _describe(&problem, FSM_SCALE, scale)
    _describe(&problem, FSM_OUT, dx)
    _run(&problem)
    if out is not None:
        return out
    return dx if dx.ndim else dx[()]


def softmax_backward(grad, y, /, axis=-1, *, temperature=None, out=None):
    """Gradient of softmax from its output: ``y * (grad - sum(grad * y)) / temperature``.

    Parameters
    ----------
    grad : array_like
        Gradient with respect to the output y.
    y : array_like
        Output of :func:`softmax`, of the shape of grad.
    axis : int, tuple of ints or None, default -1
        As in the forward call.
    temperature : float or array_like, optional
        As in the forward call.
    out : ndarray, optional
        Where to put the result; it may be grad or y.

    Returns
    -------
    ndarray or NumPy scalar
        Gradient with respect to the logits; its dtype is the promotion of those of grad and y. An
        entry where y is 0 took no part: its gradient is 0, and its grad is not summed, whatever it
        is.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Notes
    -----
    ``grad - sum(grad * y)`` must be finite in the type of the calculation, and divided by the
    temperature, too: else so much of the result is not.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import softmax, softmax_backward
    >>> y = softmax(np.array([1.0, 2.0, 3.0]))
    >>> softmax_backward(np.array([1.0, 0.0, 0.0]), y).round(4)
    array([ 0.0819, -0.022 , -0.0599])
    """
    return _backward(FSM_SOFTMAX_BACKWARD, grad, y, axis, temperature, out)


def log_softmax_backward(grad, y, /, axis=-1, *, temperature=None, out=None):
    """Gradient of log_softmax from its output: ``(grad - exp(y) * sum(grad)) / temperature``.

    Parameters
    ----------
    grad : array_like
        Gradient with respect to the output y.
    y : array_like
        Output of :func:`log_softmax`, of the shape of grad.
    axis, temperature, out
        As for :func:`softmax_backward`.

    Returns
    -------
    ndarray or NumPy scalar
        Gradient with respect to the logits; its dtype is the promotion of those of grad and y. An
        entry where y is -inf took no part: its gradient is 0, and its grad is not summed, whatever
        it is.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As for :func:`softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastsoftmax import log_softmax, log_softmax_backward
    >>> y = log_softmax(np.array([1.0, 2.0, 3.0]))
    >>> log_softmax_backward(np.array([1.0, 0.0, 0.0]), y).round(4)
    array([ 0.91  , -0.2447, -0.6652])
    """
    return _backward(FSM_LOG_SOFTMAX_BACKWARD, grad, y, axis, temperature, out)


include "_loss.pxi"
include "_attention.pxi"
include "_attention_varlen.pxi"
include "_attention_backward.pxi"
include "_ufuncs.pxi"
include "_rows.pxi"
include "_embedding.pxi"


# ---- threads ----

_MOST_THREADS = 1024
_scopes = ContextVar("fastsoftmax.num_threads", default=())  # of the blocks around, innermost last
cdef int _process_threads = 0  # by set_num_threads or the environment; 0: what the machine has
cdef int _usable_cpus = 0      # looked up when it is first needed


cdef int _checked_threads(n) except -1:
    if isinstance(n, bool):
        raise TypeError("n must be an integer, got bool")
    try:
        n = index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {type(n).__name__}") from None
    if not 1 <= n <= _MOST_THREADS:
        raise ValueError(f"n must be from 1 to {_MOST_THREADS}, got {n}")
    return n


def set_num_threads(n, /):
    """Set the number of threads that calls in this process may use.

    Parameters
    ----------
    n : int
        From 1 to 1024; it may exceed the number of CPUs. Small arrays use fewer.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is out of range.

    Examples
    --------
    >>> import fastsoftmax
    >>> before = fastsoftmax.get_num_threads()
    >>> fastsoftmax.set_num_threads(1)
    >>> fastsoftmax.get_num_threads()
    1
    >>> fastsoftmax.set_num_threads(before)
    """
    global _process_threads
    _process_threads = _checked_threads(n)


def get_num_threads():
    """Return the number of threads that a large call made here may use.

    It is that of the innermost :class:`num_threads`, else of :func:`set_num_threads`, else of the
    environment variable ``FASTSOFTMAX_NUM_THREADS`` or ``OMP_NUM_THREADS``, else the number of CPUs
    that affinity and cgroup quota allow; never more than OpenMP has been limited to meanwhile (by
    threadpoolctl, say).

    Returns
    -------
    int

    Examples
    --------
    >>> import fastsoftmax
    >>> with fastsoftmax.num_threads(1):
    ...     fastsoftmax.get_num_threads()
    1
    """
    global _usable_cpus
    cdef tuple scopes = _scopes.get()
    cdef int n = scopes[len(scopes) - 1]._n if scopes else _process_threads
    if n == 0:
        if _usable_cpus == 0:
            _usable_cpus = fsm_usable_cpus()
        n = _usable_cpus
    return min(n, fsm_openmp_limit())


class num_threads:
    """Context manager: the number of threads inside the block, in this thread or task only.

    Parameters
    ----------
    n : int
        As for :func:`set_num_threads`.

    Examples
    --------
    >>> import numpy as np, fastsoftmax
    >>> with fastsoftmax.num_threads(1):
    ...     y = fastsoftmax.softmax(np.zeros((4, 2)))
    """

    def __init__(self, n, /):
        self._n = _checked_threads(n)

    def __enter__(self):
        _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *exc_info):
        # Mostly the last one; not where generators, say, leave their blocks in another order.
        scopes = list(_scopes.get()[::-1])
        if self in scopes:
            scopes.remove(self)
        _scopes.set(tuple(scopes[::-1]))


# ---- instruction sets ----

cdef const fsm_isa *_find_isa(name) except? NULL:
    cdef int i = 0
    while fsm_isa_at(i) != NULL:
        if fsm_isa_name(fsm_isa_at(i)).decode() == name:
            return fsm_isa_at(i)
        i += 1
    raise ValueError(f"no ISA {name!r} on this CPU, which has {', '.join(available_isas())}")


def available_isas():
    """Return the names of the instruction sets that this CPU can run and this build has, best
    first.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> import fastsoftmax
    >>> "scalar" in fastsoftmax.available_isas()
    True
    """
    names = []
    while fsm_isa_at(len(names)) != NULL:
        names.append(fsm_isa_name(fsm_isa_at(len(names))).decode())
    return tuple(names)


def isa():
    """Return the name of the instruction set in use: the best one, or that of ``FASTSOFTMAX_ISA``.

    Returns
    -------
    str

    Examples
    --------
    >>> import fastsoftmax
    >>> fastsoftmax.isa() in fastsoftmax.available_isas()
    True
    """
    return fsm_isa_name(_active).decode()


class _use_isa:
    """Context manager for tests: every call of the process inside the block uses this ISA."""

    def __init__(self, name):
        _find_isa(name)
        self._name = name

    def __enter__(self):
        global _active
        self._before = isa()
        _active = _find_isa(self._name)
        return self

    def __exit__(self, *exc_info):
        global _active
        _active = _find_isa(self._before)


def _exp32(ndarray x, name):
    """The internal exp of x <= 0, float32, for its tests."""
    x, y = np.ascontiguousarray(x, np.float32), np.empty(x.size, np.float32)
    fsm_exp_f32(_find_isa(name), <float *>PyArray_DATA(y), <float *>PyArray_DATA(x), x.size)
    return y


def _exp64(ndarray x, name):
    """The internal exp of x <= 0, float64, for its tests."""
    x, y = np.ascontiguousarray(x, np.float64), np.empty(x.size, np.float64)
    fsm_exp_f64(_find_isa(name), <double *>PyArray_DATA(y), <double *>PyArray_DATA(x), x.size)
    return y


def _multiply_add(ptrdiff_t count, name):
    """How many float32 operations were done: FMAs, for benchmarks to time."""
    cdef double operations
    cdef const fsm_isa *chosen = _find_isa(name)
    with nogil:
        operations = fsm_multiply_add_f32(chosen, count)
    return operations


# ---- configuration ----

def show_config(mode="stdout"):
    """Print, or return, how this build is configured and what it found.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print the configuration, or return it as a dict.

    Returns
    -------
    dict or None
        Keys: version, numpy, isa, available_isas, openmp, num_threads, cpu, cpus.

    Raises
    ------
    ValueError
        For another mode.

    Examples
    --------
    >>> import fastsoftmax
    >>> sorted(fastsoftmax.show_config("dicts"))
    ['available_isas', 'cpu', 'cpus', 'isa', 'num_threads', 'numpy', 'openmp', 'version']
    """
    if not isinstance(mode, str) or mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    config = {
        "version": sys.modules["fastsoftmax"].__version__,
        "numpy": np.__version__,
        "isa": isa(),
        "available_isas": available_isas(),
        "openmp": bool(fsm_has_openmp()),
        "num_threads": get_num_threads(),
        "cpu": _cpu_name(),
        "cpus": fsm_usable_cpus(),
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        print(f"{key + ':':16}{' '.join(value) if isinstance(value, tuple) else value}")


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform
    return platform.processor() or platform.machine()


def _configure():
    """Reads the environment, once, at import."""
    global _active, _process_threads
    _active = fsm_isa_at(0)
    name = os.environ.get("FASTSOFTMAX_ISA")
    if name is not None:
        try:
            _active = _find_isa(name)
        except ValueError:
            raise ImportError(f"FASTSOFTMAX_ISA is {name!r}; this CPU and build accept "
                              f"{', '.join(available_isas())}") from None
    threads = os.environ.get("FASTSOFTMAX_NUM_THREADS")
    if threads is not None:
        try:
            _process_threads = _checked_threads(int(threads))
        except ValueError:
            raise ImportError(f"FASTSOFTMAX_NUM_THREADS is {threads!r}; accepted are integers from "
                              f"1 to {_MOST_THREADS}") from None
    else:  # a list is for nested levels of parallelism
        first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        if first.isdecimal() and 1 <= int(first) <= _MOST_THREADS:
            _process_threads = int(first)
    fsm_openmp_limit()  # from now on, a lower limit counts


_configure()
