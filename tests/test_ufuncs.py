"""fastsoftmax.ufuncs: genuine ufuncs, with the bits of the functions of the package.

What dask, xarray and Awkward Array make of them is in test_ecosystem.py.
"""

import pickle
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from common import BF16, F16, F32, F64, FLOATS, assert_same_bits, normal, unaligned

import fastsoftmax as fs
from fastsoftmax import _core, ufuncs

PAIRS = [(getattr(ufuncs, name), getattr(fs, name)) for name in ufuncs.__all__]
pairs = pytest.mark.parametrize(("ufunc", "function"), PAIRS, ids=ufuncs.__all__)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# --- what they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ufuncs.__all__)
def test_they_are_ufuncs(name):
    ufunc = getattr(ufuncs, name)
    assert type(ufunc) is np.ufunc and ufunc.__name__ == name
    assert ufunc.signature == ("(n)->()" if name == "logsumexp" else "(n)->(n)")
    assert (ufunc.nin, ufunc.nout, ufunc.identity) == (1, 1, None)
    assert ufunc.types == ["d->d", "f->f", "e->e"]  # the order decides what integers become
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickle asks every module that is loaded for the name
        assert pickle.loads(pickle.dumps(ufunc)) is ufunc


def test_import_is_on_demand():
    code = """
import sys, fastsoftmax
assert not {"fastsoftmax.ufuncs", "ml_dtypes"} & set(sys.modules)
sys.modules["ml_dtypes"] = None  # as if it were not installed
from fastsoftmax import ufuncs
print(ufuncs.softmax([0.0, 0.0]), ufuncs.logsumexp([-1.0]))
"""
    done = run(code)
    assert (done.stdout.strip(), done.stderr) == ("[0.5 0.5] -1.0", "")


@pairs
def test_types(ufunc, function):
    for dtype in FLOATS:
        assert ufunc(np.ones(3, dtype)).dtype == dtype
    for dtype in "?bBhHiIlLqQ":
        x = np.array([1, 0, 1], dtype)
        assert_same_bits(ufunc(x), function(x), dtype)
        assert ufunc(x).dtype == F64
    assert ufunc([1, 2]).dtype == ufunc([1.5, 2]).dtype == F64
    for bad in (np.longdouble([1]), np.array([1j]), np.array([1.0, None]), np.array(["a"])):
        if bad.dtype != F64:
            with pytest.raises(TypeError):
                ufunc(bad)
    x = normal((3, 17), F16)
    assert_same_bits(ufunc(x, dtype=F32), function(x, -1, dtype=F32))
    assert_same_bits(ufunc(x.astype(BF16), dtype=F32), function(x.astype(BF16), -1, dtype=F32))
    with pytest.raises(TypeError):
        _core._register_bfloat16(F32)


# --- bits -----------------------------------------------------------------------------------------

SHAPES = [(1,), (7,), (3, 5), (20, 16), (4, 1025), (2, 3, 4, 5), (2, 18_000)]


@pairs
@every_dtype
def test_same_bits(isa, ufunc, function, dtype):
    for shape in SHAPES:
        x = normal(shape, dtype)
        x.flat[0] = -np.inf
        views = (x, x.T, x[::-1], x[..., ::-2], np.asfortranarray(x), unaligned(x),
                 np.broadcast_to(x, (2, *shape)), np.broadcast_to(x[..., :1], shape))  # fmt: skip
        for view in views:
            for axis in range(view.ndim):
                assert_same_bits(ufunc(view, axis=axis), function(view, axis), (shape, axis))
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 3)):
        x = np.empty(shape, dtype)
        assert_same_bits(ufunc(x), function(x, -1), shape)


@pairs
def test_arguments_of_every_ufunc(isa, ufunc, function):
    x = normal((6, 40), F32)
    want = function(x, -1)
    out = np.empty_like(want)
    assert ufunc(x, out=out) is out
    assert_same_bits(out, want)
    wide = np.full((*want.shape, 2), 7, F32)
    ufunc(x, out=wide[..., 1])
    assert_same_bits(wide[..., 1], want)
    assert (wide[..., 0] == 7).all()
    axes = [0, ()] if function is fs.logsumexp else [0, 0]
    assert_same_bits(ufunc(x, axes=axes), function(x, 0))
    if function is fs.logsumexp:
        kept = ufunc(x, axis=0, keepdims=True)
        assert_same_bits(kept, function(x, 0, keepdims=True))
        assert type(ufunc(x[0])) is np.float32
    else:
        y = x.copy()
        assert_same_bits(ufunc(y, out=y), want, "in place")
        y = x.copy()
        ufunc(y[:-1], out=y[1:])
        assert_same_bits(y[1:], want[:-1], "overlap")
    assert_same_bits(ufunc(x.astype(">f4")), want, "byte-swapped")
    with pytest.raises(ValueError):
        ufunc(x, out=np.empty((5, 5), F32))
    with pytest.raises(ValueError):
        ufunc(np.float32(1))
    with pytest.raises(TypeError):
        ufunc(x, x, x)


@pairs
@every_dtype
def test_no_warning(isa, ufunc, function, dtype):
    """Not of an inexact, subnormal, infinite or invalid result; NumPy would raise."""
    top = float(np.finfo(F16).max) if dtype == F16 else 1e38
    rows = np.array([[np.nan, 1, 2], [np.inf, 1, 2], [np.inf, -np.inf, 0], [-np.inf] * 3,
                     [0, -95, -104], [0, -700, -740], [top, -top, 0], [0, -11, -17]])  # fmt: skip
    x = rows.astype(dtype)
    with np.errstate(all="raise"):
        assert_same_bits(ufunc(x), function(x, -1))
        long = np.repeat(x, 20_000, 1)
        assert_same_bits(ufunc(long), function(long, -1))


# --- threads and signals --------------------------------------------------------------------------


@pairs
def test_threads(isa, ufunc, function):
    for shape in ((1, 400_000), (3000, 100)):
        x = normal(shape, F32)
        want = function(x, -1)
        for n in (1, 2, 5):
            with fs.num_threads(n):
                assert_same_bits(ufunc(x), want, n)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not fs.show_config("dicts")["openmp"], reason="built without OpenMP")
@pytest.mark.parametrize(("threads", "more"), [(1, 0), (3, 2)])
def test_num_threads_is_respected(threads, more):
    code = f"""
import os, numpy as np, fastsoftmax as fs
from fastsoftmax import ufuncs
x = np.ones((1000, 1000), np.float32)
before = len(os.listdir("/proc/self/task"))
with fs.num_threads({threads}):
    ufuncs.softmax(x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = run(code)
    assert done.stdout.strip() == str(more), done.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")
def test_a_signal_handler_runs_during_a_long_call():
    """And its exception ends the call, whatever loops are left."""
    row = normal(200_000, F64)
    x = np.broadcast_to(row, (2, 10_000, 2, row.size))[:, ::2]  # seconds of work, no memory

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with fs.num_threads(1):
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                ufuncs.logsumexp(x)
            took = time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert took < 1, f"the handler ran after {took:.2f} s"
    assert_same_bits(ufuncs.logsumexp(x[0, :2, 0]), np.repeat(fs.logsumexp(row), 2))


# --- the protocol ---------------------------------------------------------------------------------


@pairs
def test_array_ufunc_takes_over(ufunc, function):
    class Lazy:
        def __array_ufunc__(self, got, method, *inputs, **kwargs):
            return got, method, inputs, kwargs

    lazy = Lazy()
    assert ufunc(lazy, axis=0) == (ufunc, "__call__", (lazy,), {"axis": 0})

    class Tagged(np.ndarray):
        pass

    x = normal((2, 3), F32)
    assert type(ufunc(x.view(Tagged))) is Tagged
