"""No byte outside the arrays is read or written: every buffer lies against an untouchable page.

A kernel that goes too far dies with SIGSEGV here, and faulthandler names the test.
"""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from common import (
    BF16,
    F16,
    F32,
    F64,
    HALVES,
    GuardedPages,
    assert_same_bits,
    every_dtype,
    normal,
)

import fastsoftmax as fs

LENGTHS = tuple(range(258))
# Rows x columns for the strided kernels: whole vectors, tails of every length, single columns.
INNER = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 32, 33, 48, 63, 65)
ROWS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 33, 47, 64, 65, 100, 129)

both_ends = pytest.mark.parametrize("at", ["start", "end"])


@pytest.fixture(scope="module")
def pages():
    """One guarded buffer per argument: x, out, bias, where, temperature, and one to spare."""
    names = ("x", "out", "bias", "where", "temperature", "grad")
    return {name: GuardedPages(1 << 17) for name in names}


def everything(pages, x, axis, at, result_dtype=None):
    """Call every function with all its arguments at the guard; compare with ordinary memory."""
    result_dtype = result_dtype or x.dtype
    shape, where = x.shape, x > -2
    bias = np.asarray(normal(shape, F32, 1.0, "bias"))
    grad = normal(shape, x.dtype, 1.0, "grad")
    t = np.full([1 if k == axis % x.ndim else n for k, n in enumerate(shape)], 0.5, F64)
    guarded = {
        "x": pages["x"].copy_of(x, at),
        "bias": pages["bias"].copy_of(bias, at),
        "where": pages["where"].copy_of(where, at),
        "temperature": pages["temperature"].copy_of(t, at),
        "grad": pages["grad"].copy_of(grad, at),
    }
    gx, ggrad = guarded["x"], guarded["grad"]
    masks = {k: guarded[k] for k in ("bias", "where", "temperature")}
    plain = {"bias": bias, "where": where, "temperature": t}
    out = pages["out"].array(shape, result_dtype, at)

    for function in (fs.softmax, fs.log_softmax):
        function(gx, axis, out=out)
        assert_same_bits(out, function(x, axis, dtype=result_dtype), shape)
    fs.softmax(gx, axis, **masks, out=out)
    assert_same_bits(out, fs.softmax(x, axis, **plain, dtype=result_dtype), (shape, "masks"))
    small = pages["out"].array(t.shape, result_dtype, at)
    fs.logsumexp(gx, axis, keepdims=True, out=small)
    want = fs.logsumexp(x, axis, keepdims=True, dtype=result_dtype)
    assert_same_bits(small, want, (shape, "logsumexp"))
    fs.logsumexp(gx, axis, b=masks["bias"], where=masks["where"], keepdims=True, out=small)
    want = fs.logsumexp(x, axis, b=bias, where=where, keepdims=True, dtype=result_dtype)
    assert_same_bits(small, want, (shape, "weights"))
    if result_dtype == x.dtype:
        out = pages["out"].array(shape, result_dtype, at)
        for backward in (fs.softmax_backward, fs.log_softmax_backward):
            backward(ggrad, gx, axis, out=out)
            assert_same_bits(out, backward(grad, x, axis), (shape, backward.__name__))
        fs.softmax(gx, axis, out=gx)
        assert_same_bits(gx, fs.softmax(x, axis), (shape, "in place"))


@both_ends
@every_dtype
def test_one_row_of_every_length(isa, pages, dtype, at):
    for n in LENGTHS:
        everything(pages, normal(n, dtype), -1, at)


@both_ends
@every_dtype
def test_batches_of_short_rows(isa, pages, dtype, at):
    """Blocks of rows that are transposed in registers, and the rows left over."""
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 20, 31, 33, 40, 63, 64, 65, 90):
        for rows in (2, 3, 7, 15, 16, 17, 33):
            everything(pages, normal((rows, n), dtype), -1, at)


@both_ends
@every_dtype
def test_columns(isa, pages, dtype, at):
    """The axis first, few columns: the strided kernel's tails."""
    for inner in INNER:
        for n in ROWS:
            everything(pages, normal((n, inner), dtype), 0, at)


@both_ends
def test_middle_axis(isa, pages, at):
    for dtype in (F32, BF16):
        for shape in ((2, 5, 3), (3, 17, 7), (2, 33, 17), (4, 3, 1), (1, 40, 33)):
            everything(pages, normal(shape, dtype), 1, at)


@both_ends
def test_mixed_dtypes(isa, pages, at):
    """Input and result of different width: a tail in one is not a tail in the other."""
    for dtype, result in ((F16, F32), (BF16, F32), (F32, F16), (F32, BF16), (F64, F32), (F32, F64)):
        for n in (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 100, 257):
            everything(pages, normal(n, dtype), -1, at, result)
            everything(pages, normal((5, n), dtype).T, 0, at, result)


@both_ends
@every_dtype
def test_strided_rows(isa, pages, dtype, at):
    """Gaps and negative steps: nothing before the first element or after the last is touched."""
    for n in (1, 2, 7, 8, 9, 16, 17, 33, 64, 100, 257):
        x = normal(n, dtype)
        for step in (2, 3, -1, -2):
            whole = pages["x"].array((abs(step) * (n - 1) + 1,), dtype, at)
            target = pages["out"].array(whole.shape, dtype, at)
            whole[...], target[...] = 5, 7
            view, out = whole[::step], target[::step]
            view[...] = x
            fs.softmax(view, out=out)
            assert_same_bits(out, fs.softmax(x), (n, step))
            between = np.ones(whole.shape, bool)
            between[::step] = False
            assert (target[between] == 7).all(), "wrote between the elements of out"
            assert_same_bits(fs.logsumexp(view), fs.logsumexp(x), (n, step))


@both_ends
def test_odd_addresses(isa, pages, at):
    """A buffer that touches the guard page and is not aligned to its items."""
    for dtype in (F32, F64, *HALVES):
        for n in (1, 5, 8, 16, 17, 33, 100):
            x = normal(n, dtype)
            size = n * dtype.itemsize
            offset = 1 if at == "start" else 0
            raw = [
                pages[k].array(size + 1, np.uint8, at)[offset : offset + size] for k in ("x", "out")
            ]
            view, out = (r.view(dtype) for r in raw)
            view[...] = x
            fs.softmax(view, out=out)
            assert_same_bits(out, fs.softmax(x), n)


def test_one_long_row(isa, pages):
    """Also where the row is cut for threads."""
    wide = {name: GuardedPages(1 << 20) for name in ("x", "out")}
    for dtype in (F32, F16, F64):
        for n in (16_383, 65_537, 100_003):
            for at in ("start", "end"):
                for threads in (1, 2, 3):
                    with fs.num_threads(threads):
                        x = wide["x"].copy_of(normal(n, dtype), at)
                        out = wide["out"].array(n, dtype, at)
                        fs.softmax(x, out=out)
                        assert_same_bits(out, fs.softmax(normal(n, dtype)), (n, at, threads))


@both_ends
def test_results_past_the_caches(isa, at):
    """So many that they are stored a whole line at a time, one in which a row ends, too."""
    half, few = 1 << 24, 97  # bytes of the smallest x and out of the kind; rows, repeated
    past = {name: GuardedPages(half + (1 << 21)) for name in ("x", "out")}
    for dtype, n in ((F32, 129), (F32, 136), (F32, 1000), (F64, 1025)):
        rows = normal((few, n), dtype, 3.0)
        rows[3, 5], rows[50] = np.nan, -np.inf
        times = half // rows.nbytes + 1
        x = past["x"].copy_of(np.tile(rows, (times, 1)), at)
        for function, gap in ((fs.softmax, 0), (fs.log_softmax, 0), (fs.softmax, 3)):
            whole = past["out"].array((len(x), n + gap), dtype, at)
            whole[:, n:] = 7
            function(x, out=whole[:, :n])
            got = whole[:, :n].reshape(times, few, n)
            want = np.broadcast_to(function(rows), got.shape)
            assert_same_bits(got, want, (dtype, n, gap, function.__name__))
            assert (whole[:, n:] == 7).all(), "wrote between the rows of out"


@pytest.mark.parametrize("at, beyond", [("end", 40), ("start", -4)])
def test_the_guard_bites(at, beyond):
    """If this fails the tests above prove nothing."""
    code = f"""
        import ctypes, resource, sys
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from common import GuardedPages
        a = GuardedPages().array(10, "f4", {at!r})
        a[...] = 1
        print(a.sum(), flush=True)
        ctypes.c_float.from_address(a.ctypes.data + {beyond}).value
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "10.0", done.stderr
    assert done.returncode == -signal.SIGSEGV
