"""fastsoftmax in other people's compiled code: examples/embedding is built and used."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from common import BF16, F16, F32, F64, FLOATS, assert_same_bits, normal, unaligned

import fastsoftmax as fs
from fastsoftmax import _core

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "embedding"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A function that imports a module of the example package, which is built first."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    if not EXAMPLE.is_dir():
        pytest.skip("an installed copy without examples")
    folder = tmp_path_factory.mktemp("embedding")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    # Cython looks for .pxd files on sys.path, which an editable install is not on.
    path = os.pathsep.join([str(Path(fs.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "CFLAGS": "-O1 -Wall -Wextra -Wundef"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastsoftmax.h" not in done.stderr, done.stderr  # no warning of ours
    sys.path.insert(0, str(folder))
    yield lambda name: import_module(f"embedded.{name}")
    sys.path.remove(str(folder))


# --- the C functions themselves, through their pointers -------------------------------------------

SIZE, POINTER, INT = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_int
DONE, INVALID = 0, -2
OPS = {fs.softmax: 0, fs.log_softmax: 1, fs.logsumexp: 2}
CODES = {F16: 0, BF16: 1, F32: 2, F64: 3}


def exported(name, *types):
    """A function of __pyx_capi__, for ctypes."""
    capsule = _core.__pyx_capi__[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.argtypes, get_name.restype = [ctypes.py_object], ctypes.c_char_p
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], POINTER
    return ctypes.CFUNCTYPE(INT, *types)(get(capsule, get_name(capsule)))


ROWS = POINTER, SIZE, SIZE
softmax_rows = exported("softmax_rows", POINTER, INT, INT, *ROWS, *ROWS, SIZE, SIZE, INT)
attention_heads = exported(
    "attention_heads", POINTER, INT, *[POINTER] * 5, *[SIZE] * 6, ctypes.c_double, INT, SIZE, INT
)


def rows(function, x, out=None, threads=1):
    """A function of the package on the rows of x [rows, n], by way of softmax_rows."""
    reduces = function is fs.logsumexp
    if out is None:
        out = np.empty(x.shape[:1] if reduces else x.shape, x.dtype)
    steps = (*out.strides, 12345) if reduces else out.strides
    status = softmax_rows(None, OPS[function], CODES[x.dtype], x.ctypes.data, *x.strides,
                          out.ctypes.data, *steps, *x.shape, threads)  # fmt: skip
    assert status == DONE
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("function", OPS, ids=lambda function: function.__name__)
def test_softmax_rows(isa, function, dtype):
    for shape in ((1, 1), (3, 7), (20, 16), (5, 33), (2, 1025), (2, 18_000)):
        x = normal(shape, dtype)
        x[0, 0] = -np.inf
        views = (x, x.T.copy().T, x[::-1, ::-1], x[:, ::3], unaligned(x),
                 np.broadcast_to(x[:1], shape), np.broadcast_to(x[:, :1], shape))  # fmt: skip
        for view in views:
            want = function(view, -1)
            for threads in (1, 3):
                assert_same_bits(rows(function, view, threads=threads), want, (shape, threads))
        if function is not fs.logsumexp:
            want = function(x)
            assert_same_bits(rows(function, x, x), want, "in place")
    for shape in ((0, 5), (4, 0), (0, 0)):
        x = np.empty(shape, dtype)
        assert_same_bits(rows(function, x), function(x, -1))


def test_softmax_rows_refuses():
    x, out = np.ones((2, 3)), np.full((2, 3), 7.0)
    good = [None, 0, 3, x.ctypes.data, 24, 8, out.ctypes.data, 24, 8, 2, 3, 1]
    for at, values in {1: (-1, 3, 99), 2: (-1, 4, 11, 99), 3: (None,), 6: (None,), 9: (-1,),
                       10: (-1,), 11: (0, -1)}.items():  # fmt: skip
        for value in values:
            assert softmax_rows(*good[:at], value, *good[at + 1 :]) == INVALID, (at, value)
    assert (out == 7).all()
    assert softmax_rows(*good) == DONE
    assert_same_bits(out, fs.softmax(x))


def heads(q, k, v, causal=False, offset=0, threads=1, scale=None, lse=True):
    out = np.empty((*q.shape[:2], v.shape[2]), q.dtype)
    sums = np.empty(q.shape[:2], F64 if q.dtype == F64 else F32)
    at = [a.ctypes.data for a in (q, k, v, out)] + [sums.ctypes.data if lse else None]
    sizes = q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], v.shape[2]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    status = attention_heads(None, CODES[q.dtype], *at, *sizes, scale, causal, offset, threads)
    assert status == DONE
    return out, sums


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_attention_heads(isa, dtype):
    for n_heads, kv, queries, keys, depth, v_depth in (
        (4, 2, 53, 70, 9, 5), (6, 3, 1, 700, 16, 16), (2, 2, 5, 0, 4, 3), (1, 1, 3, 3, 1, 0),
        (0, 1, 3, 3, 2, 2), (2, 1, 0, 4, 2, 2),
    ):  # fmt: skip
        q = normal((n_heads, queries, depth), dtype)
        k, v = normal((kv, keys, depth), dtype), normal((kv, keys, v_depth), dtype, 3.0, "v")
        for causal, offset in ((False, 0), (True, 0), (True, keys - queries), (True, -2),
                               (True, 2**63 - 1), (True, -(2**63))):  # fmt: skip
            want = fs.attention(q, k, v, is_causal=causal, q_offset=offset, return_lse=True)
            for threads in (1, 2):
                got = heads(q, k, v, causal, offset, threads)
                for one, other in zip(got, want, strict=True):
                    assert_same_bits(one, other, (q.shape, causal, offset))
        assert_same_bits(heads(q, k, v, lse=False)[0], fs.attention(q, k, v))


def test_attention_heads_refuses():
    a = np.ones(64, F32)
    at = a.ctypes.data
    out = np.full(64, 7, F32)
    good = [None, 2, at, at, at, out.ctypes.data, None, 2, 1, 3, 4, 5, 3, 0.5, 0, 0, 1]
    for i, values in {1: (4, -1), 2: (None,), 3: (None,), 4: (None,), 5: (None,), 7: (-1, -2),
                      8: (0, -1, 3), 9: (-1,), 10: (-1,), 11: (0, -1), 12: (-1,),
                      13: (np.inf, np.nan, 1e39), 16: (0, -5)}.items():  # fmt: skip
        for value in values:
            assert attention_heads(*good[:i], value, *good[i + 1 :]) == INVALID, (i, value)
    assert (out == 7).all()
    assert attention_heads(*good) == DONE


# --- Cython ---------------------------------------------------------------------------------------


def test_header():
    header = Path(fs.get_include()) / "fastsoftmax.h"
    assert header.is_file()
    for name in _core.__pyx_capi__:
        assert f"fsm_{name}(" in header.read_text(), name


def test_cython(isa, embedded):
    routing = embedded("routing")
    x = normal((50, 12), F32)
    for view in (x, x[::-2, 1::3], x.T):
        weights = np.full(view.shape, np.nan, F32)
        counts = routing.route(view, weights)
        assert_same_bits(weights, fs.softmax(view))
        assert counts == np.bincount(weights.argmax(1), minlength=view.shape[1]).tolist()
    q, k, v = (normal((2, n, 8), F32, 3.0, n) for n in (5, 9, 9))
    out, lse = np.empty((2, 5, 8), F32), np.empty((2, 5), F32)
    routing.attend(q, k, v, out, lse, True, 4)
    want = fs.attention(q, k, v, is_causal=True, q_offset=4, return_lse=True)
    assert_same_bits(out, want[0])
    assert_same_bits(lse, want[1])
    with pytest.raises(ValueError, match="status -2"):
        routing.attend(q, k, v, out, lse, threads=0)


def test_cython_in_python_threads(embedded):
    """Eight at once, without the GIL."""
    routing = embedded("routing")
    inputs = [normal((2000, 50), F32, 3.0, i) for i in range(8)]
    outputs = [np.empty_like(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(routing.route, inputs, outputs))
    for x, y in zip(inputs, outputs, strict=True):
        assert_same_bits(y, fs.softmax(x))


# --- C and Numba ----------------------------------------------------------------------------------


def test_c(isa, embedded):
    plain = embedded("plain")
    for n in (0, 1, 5, 1000, 300_000):
        x = normal(n, F64)
        assert_same_bits(np.float64(plain.logsumexp(x)), fs.logsumexp(x))
    with pytest.raises(TypeError):
        plain.logsumexp(np.ones(3, F32))
    x, bias = normal(77, F32), normal(77, F32, 3.0, "bias")
    bias[::5] = -np.inf
    got = np.frombuffer(plain.biased(x.tobytes(), bias.tobytes()), F32)
    assert_same_bits(got, fs.softmax(x, bias=bias))


def test_numba(isa, embedded):
    pytest.importorskip("numba")
    entropy = embedded("with_numba").entropy
    x = normal((40, 9), F64)
    for view in (x, x.T, x[::-1, ::2]):
        p = fs.softmax(view)
        np.testing.assert_allclose(entropy(view), -(p * np.log(p)).sum(1), rtol=1e-13)
    assert entropy(np.zeros((3, 4))).tolist() == pytest.approx([np.log(4)] * 3, rel=1e-15)
