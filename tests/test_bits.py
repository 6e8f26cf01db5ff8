"""The bits of a row's result are a function of its values alone.

Not of the axis, the strides, the address, the batch around it, the threads, the ISA, the order of
the entries or whether the result overwrites the input. Everything here compares bit patterns.
"""

from functools import lru_cache

import numpy as np
import pytest
from common import (
    F16,
    F32,
    F64,
    FAMILY,
    FLOATS,
    HALVES,
    assert_same_bits,
    compute_type,
    dtype_id,
    normal,
    rng,
    unaligned,
    use_isa,
)

import fastsoftmax as fs

SHORT = tuple(range(301))
# Around powers of two and the sizes of blocks, of int32 accumulators, of work for two threads.
BLOCKS = (511, 512, 513, 1023, 1025, 2049, 4095, 4096, 4097, 8191, 8192, 8193)
LARGE = (16_383, 16_385, 65_537, 131_072, 131_073)
# Small enough to cross with every layout: below, at and above each vector width and its double.
SOME = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128,
        129, 200, 257, 320, 321, 500)  # fmt: skip

pytestmark = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)


def lse(x, axis=-1, **kwargs):
    """logsumexp with the axis kept, so that it fits where the softmax family does."""
    return fs.logsumexp(x, axis=axis, keepdims=True, **kwargs)


EVERY = (*FAMILY, lse)


def logits(shape, dtype, *key):
    """Rows of different scale and offset: each takes another way through the reduction of x - m."""
    x = normal(shape, F64, 3.0, "bits", *key)
    if x.ndim == 2 and len(x) >= 3:
        x[1] *= 20
        x[2] += {2: 300, 4: 1e6, 8: 1e12}[dtype.itemsize]
    return x.astype(dtype)


def each_row_alone(function, x, isa="scalar"):
    """The expected bits: one contiguous row per call, one thread, the portable ISA."""
    with use_isa(isa), fs.num_threads(1):
        return np.stack([function(row.copy()) for row in x])


def rows_alone(function, n, dtype, count=3):
    """Rows of this length, and the expected bits; kept for the next ISA, which gets the same."""
    x = logits((count, n), dtype, n)
    x.setflags(write=False)
    return x, each_row_alone(function, x)


short_rows_alone = lru_cache(maxsize=300)(rows_alone)
long_rows_alone = lru_cache(maxsize=len(EVERY))(rows_alone)


# --- layout ---------------------------------------------------------------------------------------


def layouts(x):
    """(name, view, axis, back): the rows of `x` laid out in memory in every way; back undoes it."""
    b, n = x.shape
    yield "rows", x.copy(), -1, lambda y: y
    yield "rows, axis=1", x.copy(), 1, lambda y: y
    yield "columns", x.T.copy(), 0, lambda y: y.T
    yield "Fortran order", np.asfortranarray(x.copy()), 1, lambda y: y
    yield "reversed row", x[:, ::-1].copy()[:, ::-1], -1, lambda y: y
    yield "reversed batch", x[::-1].copy()[::-1], -1, lambda y: y
    yield "reversed columns", x.T[::-1].copy()[::-1], 0, lambda y: y.T
    yield "columns from right to left", x.T[:, ::-1].copy()[:, ::-1], 0, lambda y: y.T
    yield "every second entry", np.repeat(x, 2, axis=1)[:, ::2], -1, lambda y: y
    yield "every third row", np.repeat(x, 3, axis=0)[::3], -1, lambda y: y
    yield "every second column", np.repeat(x.T, 2, axis=1)[:, ::2], 0, lambda y: y.T
    yield "odd address", unaligned(x), -1, lambda y: y
    yield "odd address, columns", unaligned(x.T), 0, lambda y: y.T
    # A record of 1 + itemsize bytes: strides that are no multiple of the item size.
    packed = np.zeros(x.shape, [("pad", "u1"), ("x", x.dtype)])
    packed["x"] = x
    yield "packed records", packed.copy()["x"], -1, lambda y: y
    yield "packed records, columns", packed.T.copy()["x"], 0, lambda y: y.T
    middle = np.repeat(x[:, :, None], 3, axis=2)
    yield "middle axis", middle, 1, lambda y: y[:, :, 2]
    yield (
        "middle axis, zero stride",
        np.broadcast_to(x[:, :, None], (b, n, 3)),
        1,
        lambda y: y[..., 1],
    )
    yield "zero-stride batch", np.broadcast_to(x, (3, b, n)), -1, lambda y: y[2]
    if n < 10_000:  # longer columns take the same way, many at once or few
        yield "wide batch", np.tile(x.T, (1, 23)), 0, lambda y: y[:, -b:].T
    if n and n % 4 == 0:
        folded = x.reshape(b, n // 4, 4)
        yield "two axes", folded.copy(), (1, 2), lambda y: y
        apart = folded.transpose(1, 0, 2).copy()
        yield "two axes with the batch between", apart, (0, -1), lambda y: y.swapaxes(0, 1)
        yield "two axes, transposed", folded.transpose(2, 1, 0).copy(), (1, 0), lambda y: y.T


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
def test_layouts(isa, dtype, function):
    for n in SOME:
        if n == 0 and function is lse:
            continue  # in test_special
        x, want = short_rows_alone(function, n, dtype, 5)
        for name, view, axis, back in layouts(x):
            got = back(function(view, axis))
            assert_same_bits(got.reshape(want.shape), want, (n, name))


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
def test_axis_none_is_one_row(isa, dtype, function):
    x = logits((4, 5, 6), dtype)
    for view in (x, x.T, x[::-1], x[:, ::2], np.asfortranarray(x)):
        want = function(view.reshape(1, -1))
        want = want.reshape((1, 1, 1) if function is lse else view.shape)
        assert_same_bits(function(view, None), want, view.strides)


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
def test_every_short_length(isa, dtype, function):
    """0..300, axis last and axis first, against one row per call."""
    for n in SHORT[1:]:
        x, want = short_rows_alone(function, n, dtype)
        assert_same_bits(function(x), want, n)
        assert_same_bits(function(x.T.copy(), 0), want.T, (n, "axis 0"))


@pytest.mark.parametrize("n", BLOCKS + LARGE)
def test_long_rows(isa, dtype, n):
    for function in EVERY:
        x, want = long_rows_alone(function, n, dtype)
        for threads in (1, 3):  # other numbers: test_threads
            with fs.num_threads(threads):
                assert_same_bits(function(x), want, (n, threads))
                assert_same_bits(function(x[1]), want[1], (n, threads, "one row"))
        assert_same_bits(function(x.T.copy(), 0), want.T, (n, "axis 0"))
        assert_same_bits(function(x[1, ::-1].copy()[::-1]), want[1], (n, "reversed"))


@pytest.mark.parametrize("inner", [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 65, 130, 1000])
def test_inner_extents(isa, dtype, inner):
    """The strided kernel walks `inner` columns at once: whole vectors, their tails, tiles."""
    for n in (1, 2, 5, 16, 40):
        x = logits((inner, n), dtype, n)
        for function in EVERY:
            want = each_row_alone(function, x, isa)
            assert_same_bits(function(x.T.copy(), 0), want.T, (n, inner))


@pytest.mark.parametrize("n", [1, 7, 33, 130, 1000])
def test_every_address(isa, dtype, n):
    """x at every offset from a multiple of 64 bytes, out at another one."""
    x = logits((3, n), dtype, n)
    want = {function: function(x) for function in FAMILY}
    raw, target = (np.empty(x.nbytes + 128, np.uint8) for _ in range(2))
    for offset in range(64):
        here, there = (
            a[(offset * step - a.ctypes.data) % 64 :][: x.nbytes].view(dtype).reshape(x.shape)
            for a, step in ((raw, 1), (target, 37))
        )
        here[...] = x
        for function in FAMILY:
            assert_same_bits(function(here, out=there), want[function], (n, offset))


# --- the order of the entries, and entries that take no part --------------------------------------


@pytest.mark.parametrize("n", [2, 3, 17, 64, 300, 1025, 70_000])
def test_a_permutation_of_the_row_permutes_the_result(isa, dtype, n):
    x = logits((3, n), dtype, n)
    want = {function: function(x) for function in EVERY}
    for seed in range(3 if n < 10_000 else 1):
        order = rng("permutation", seed).permutation(n)
        for function in FAMILY:
            assert_same_bits(function(x[:, order]), want[function][:, order], (n, function))
        assert_same_bits(lse(x[:, order]), want[lse], n)


def test_entries_that_take_no_part_leave_no_trace(isa, dtype):
    """Masked by `where`, by bias = -inf or by x = -inf: as if the row were shorter."""
    for n in (2, 5, 16, 33, 100, 321, 5000):
        x = logits((3, n), dtype, n)
        keep = rng("mask", n).random(n) < 0.6
        keep[n // 2] = True
        hidden = np.where(keep, 0, -np.inf)
        for function, nothing in ((fs.softmax, 0), (fs.log_softmax, -np.inf)):
            want = np.full_like(x, nothing)
            want[:, keep] = function(x[:, keep])
            assert_same_bits(function(x, where=keep), want, (n, "where"))
            assert_same_bits(function(x, bias=hidden), want, (n, "bias"))
            assert_same_bits(function(x, bias=hidden, where=keep), want, (n, "both"))
            gone = np.where(keep, x, dtype.type(-np.inf))
            assert_same_bits(function(gone), want, (n, "x = -inf"))
            assert_same_bits(function(gone.T.copy(), 0), want.T, (n, "x = -inf, axis 0"))
            masked = function(x.T.copy(), 0, where=keep[:, None])
            assert_same_bits(masked, want.T, (n, "where, axis 0"))
        want = lse(x[:, keep])
        assert_same_bits(lse(x, where=keep), want, n)
        assert_same_bits(lse(gone), want, n)


@pytest.mark.parametrize("n", [3, 8, 40, 130, 400])
def test_special_neighbours(isa, dtype, n):
    """NaN, inf and masked rows change no bit of the rows beside them, in lanes or in blocks."""
    x = logits((40, n), dtype, n)
    want = {f: f(x) for f in EVERY}
    for special in (np.nan, np.inf, -np.inf):
        spoiled = x.copy()
        spoiled[::3] = special
        spoiled[1::3, n // 2] = np.where(np.isnan(special), special, np.inf)
        for function in EVERY:
            assert_same_bits(function(spoiled)[2::3], want[function][2::3], special)
            got = function(spoiled.T.copy(), 0).T
            assert_same_bits(got[2::3], want[function][2::3], (special, "axis 0"))


@pytest.mark.parametrize("n", [2, 8, 17, 64, 129])
def test_position_in_the_batch(isa, dtype, n):
    """Batches of any size: the row may be the first, the last or in the remainder of a block."""
    row = logits((1, n), dtype, n)
    for function in FAMILY:
        want = function(row)[0]
        for batch in range(1, 36):
            x = normal((batch, n), dtype, 30.0)
            for at in {0, batch // 2, batch - 1}:
                x[at] = row[0]
            for got in (function(x), function(x.T.copy(), 0).T):
                for at in {0, batch // 2, batch - 1}:
                    assert_same_bits(got[at], want, (n, batch, at))


# --- threads, in place, ISA -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 70_001), (1, 300_007), (7, 20_011), (3001, 47), (40_000, 8)])
def test_threads(isa, dtype, shape):
    x = logits(shape, dtype)
    for function in EVERY:
        with fs.num_threads(1):
            want = function(x)
        for count in (2, 3, 4):
            with fs.num_threads(count):
                assert_same_bits(function(x), want, (shape, count))
                if x.size < 300_000:
                    assert_same_bits(function(x.T.copy(), 0), want.T, (shape, count, "axis 0"))


def test_in_place(isa, dtype):
    # 64 columns of 2100, or three of 22 000 float64, are more than what is read once.
    for n in (1, 2, 7, 16, 33, 100, 257, 1030, 2100, 22_000):
        for function in FAMILY:
            x, want = short_rows_alone(function, n, dtype)
            for name, view, axis, back in layouts(x):
                if view.flags.writeable:  # not the zero strides
                    assert function(view, axis, out=view) is view
                    assert_same_bits(back(view).reshape(want.shape), want, (n, name))


def test_isas_agree_on_wide_data(isa, dtype):
    """Also far from anything that the layouts use: large spreads, offsets, few values, specials."""
    if isa == "scalar":
        pytest.skip("scalar is what the others are compared with")
    top = {2: 4.0, 4: 35.0, 8: 300.0}[dtype.itemsize]
    r = rng("wide")
    for n in (2, 5, 12, 31, 70, 300, 3000):
        x = r.normal(0, 1, (200, n)) * 10 ** r.uniform(-3, top, (200, 1))
        x += (
            (r.random((200, 1)) < 0.5)
            * r.normal(0, 1, (200, 1))
            * 10 ** r.uniform(0, top, (200, 1))
        )
        x[::7] = np.round(x[::7])
        x[r.random(x.shape) < 0.001] = -np.inf
        x[r.random(x.shape) < 0.0001] = np.nan
        with np.errstate(over="ignore"):
            x = x.astype(dtype)
        bias = r.normal(0, 1, n).astype(F32)
        cases = [(f, {}) for f in EVERY] + [(fs.softmax, {"bias": bias, "temperature": 0.3})]
        for function, kwargs in cases:
            got = function(x, **kwargs)
            with use_isa("scalar"):
                assert_same_bits(got, function(x, **kwargs), (n, function.__name__))


def test_backward_layouts_threads_and_isas(isa, dtype):
    for n in (1, 2, 8, 17, 64, 200, 1025, 70_001):
        x, grad = logits((3, n), dtype, n), normal((3, n), dtype, 1.0, "grad")
        for forward, function in (
            (fs.softmax, fs.softmax_backward),
            (fs.log_softmax, fs.log_softmax_backward),
        ):
            y = forward(x)
            with use_isa("scalar"), fs.num_threads(1):
                want = np.stack(
                    [function(g.copy(), v.copy()) for g, v in zip(grad, y, strict=True)]
                )
            assert_same_bits(function(grad, y), want, n)
            assert_same_bits(function(grad.T.copy(), y.T.copy(), 0), want.T, (n, "axis 0"))
            assert_same_bits(function(np.asfortranarray(grad), y), want, (n, "mixed order"))
            assert_same_bits(function(unaligned(grad), unaligned(y)), want, (n, "odd address"))
            for out in (grad.copy(), y.copy()):
                g, v = (out, y) if np.array_equal(out, grad) else (grad, out)
                assert_same_bits(function(g, v, out=out), want, (n, "in place"))
            for count in (2, 3):
                with fs.num_threads(count):
                    assert_same_bits(function(grad, y), want, (n, count))
                    assert_same_bits(function(grad[1], y[1]), want[1], (n, count))


# --- dtypes ---------------------------------------------------------------------------------------


def test_one_rounding_at_the_end(isa, dtype):
    """softmax(x16, dtype=float32) is softmax(x16.astype(float32)), and half results are rounded."""
    for n in (1, 3, 16, 50, 300, 2000):
        x = logits((5, n), dtype, n)
        for function in EVERY:
            for target in FLOATS:
                inner = F64 if F64 in (compute_type(dtype), target) else F32
                with np.errstate(over="ignore", under="ignore"):
                    want = function(x.astype(inner)).astype(target)
                assert_same_bits(function(x, dtype=target), want, (n, target))
                out = np.empty_like(want)
                function(x, out=out)
                assert_same_bits(out, want, (n, target, "out"))
                out = np.empty_like(want, order="F")
                function(x, out=out)
                assert_same_bits(out, want, (n, target, "Fortran out"))


def test_bias_and_temperature_never_change_the_type_or_the_rounding(isa, dtype):
    x = logits((4, 37), dtype)
    zero, one = np.zeros(37, np.float64), np.float64(1)
    for function in FAMILY:
        want = function(x)
        assert_same_bits(function(x, bias=zero), want)
        assert_same_bits(function(x, temperature=one), want)
        assert_same_bits(function(x, bias=zero, temperature=1, where=True), want)
    # A bias of another dtype is converted to the compute type first.
    bias = normal(37, F16, 2.0, "bias")
    want = fs.softmax(x, bias=bias)
    for other in (*HALVES[1:], F32, F64):
        if other in HALVES:
            assert_same_bits(
                fs.softmax(x, bias=bias.astype(other)),
                fs.softmax(x, bias=bias.astype(other).astype(compute_type(dtype))),
            )
        else:
            assert_same_bits(fs.softmax(x, bias=bias.astype(other)), want, other)
