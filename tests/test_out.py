"""`out`: any layout, the object itself, memory shared with inputs as if they were copied first."""

import numpy as np
import pytest
from common import F16, F32, assert_same_bits, every_dtype, normal, the_family, unaligned

import fastsoftmax as fs


@the_family
@every_dtype
def test_out_in_any_layout(isa, function, dtype):
    x = normal((6, 40), dtype)
    want = {axis: function(x, axis) for axis in (0, 1)}
    for axis in (0, 1):
        for out in (
            np.empty((6, 40), dtype),
            np.empty((40, 6), dtype).T,
            np.empty((6, 80), dtype)[:, ::2],
            np.empty((6, 40), dtype)[::-1, ::-1],
            unaligned(x),
            np.empty((2, 6, 40), dtype)[1],
        ):
            out[...] = 7
            assert function(x, axis, out=out) is out
            assert_same_bits(out, want[axis], (axis, out.strides))
    wide = np.full((6, 80), 7, dtype)
    function(x, out=wide[:, ::2])
    assert (wide[:, 1::2] == 7).all(), "wrote between the elements of out"


def overlapping(n):
    """(x, out) of n x n elements that share memory, each pair in a buffer of its own."""

    def buffer():
        return normal((n + 2) * (n + 2), F32).copy()

    def square(flat, start=0):
        return flat[start : start + n * n].reshape(n, n)

    b = buffer()
    yield "the same", square(b), square(b)
    b = buffer()
    yield "out one element later", square(b), square(b, 1)
    b = buffer()
    yield "out one element earlier", square(b, 1), square(b)
    b = buffer()
    yield "out one row later", square(b), square(b, n)
    b = buffer()
    yield "out reversed", square(b), square(b)[::-1, ::-1]
    b = buffer()
    yield "out's rows reversed", square(b), square(b)[:, ::-1]
    b = buffer()
    yield "out transposed", square(b), square(b).T
    b = buffer()
    yield "x reversed and transposed", square(b).T[::-1], square(b)
    b = buffer()
    yield "x a broadcast row of out", np.broadcast_to(square(b)[n // 2], (n, n)), square(b)
    pairs = normal((n, n, 2), F32)
    yield "interleaved", pairs[..., 0], pairs[..., 1]


@the_family
@pytest.mark.parametrize("n", [3, 8, 17, 64, 150])
def test_overlap_behaves_as_if_copied_first(isa, function, n):
    for axis in (-1, 0, None):
        for name, x, out in overlapping(n):
            want = function(x.copy(), axis)
            assert function(x, axis, out=out) is out
            assert_same_bits(out, want, (name, axis))


@pytest.mark.parametrize("n", [3, 16, 40])
def test_overlap_with_the_other_arguments(isa, n):
    for axis in (-1, 0):
        for name, other, out in overlapping(n):
            x = normal(other.shape, F32, 2.0, "x")
            grad = normal(other.shape, F32, 1.0, "grad")
            cases = {
                "bias": lambda a, out, x=x, axis=axis: fs.softmax(x, axis, bias=a, out=out),
                "bias row": lambda a, out, x=x, axis=axis: fs.log_softmax(
                    x, axis, bias=a[:1], out=out
                ),
                "grad": lambda a, out, x=x, axis=axis: fs.softmax_backward(a, x, axis, out=out),
                "y": lambda a, out, g=grad, axis=axis: fs.log_softmax_backward(g, a, axis, out=out),
            }
            for argument, call in cases.items():
                saved = other.copy()
                want = call(saved, None)
                before = out.copy()
                assert call(other, out) is out
                assert_same_bits(out, want, (argument, name, axis))
                out[...] = before


def test_overlap_of_where_temperature_and_other_dtypes(isa):
    # where is the bytes of out
    for shape, axis in (((5, 40), -1), ((40, 5), 0)):
        x = normal(shape, F32)
        out = np.zeros(shape, F32)
        where = out.view(np.bool_).reshape(*shape, 4)[..., 1]
        where[...] = normal(shape, F32, 1.0, "where") > 0
        want = fs.softmax(x, axis, where=where.copy())
        assert_same_bits(fs.softmax(x, axis, where=where, out=out), want)
        # temperature is an element of out
        out = np.full(shape, 0.5, F32)
        want = fs.softmax(x, axis, temperature=0.5)
        assert_same_bits(fs.softmax(x, axis, temperature=out[:1, :1], out=out), want)
        # float16 logits at the front, at the back and in the middle of their float32 result
        for start in (0, 1, 100, 199, 200):
            out = np.zeros(shape, F32)
            x16 = out.reshape(-1).view(F16)[start : start + 200].reshape(shape)
            x16[...] = normal(shape, F16)
            want = fs.softmax(x16.copy(), axis, dtype=F32)
            assert_same_bits(fs.softmax(x16, axis, out=out), want, start)
        # float32 logits under their own float16 result
        for start in (0, 1, 100, 199, 200):
            x32 = normal(shape, F32)
            out = x32.reshape(-1).view(F16)[start : start + 200].reshape(shape)
            want = fs.softmax(x32.copy(), axis, dtype=F16)
            assert_same_bits(fs.softmax(x32, axis, out=out), want, start)


def test_overlap_of_logsumexp(isa):
    x = normal((20, 20), F32)
    for axis in (0, 1):
        for pick in (np.s_[0], np.s_[:, 0], np.s_[-1], np.s_[:, -1], np.s_[7, ::-1]):
            work = x.copy()
            want = fs.logsumexp(x, axis)
            assert_same_bits(fs.logsumexp(work, axis, out=work[pick]), want, (axis, pick))
            work = x.copy()
            want = fs.logsumexp(x, axis, b=x)
            assert_same_bits(fs.logsumexp(x, axis, b=work, out=work[pick]), want, (axis, pick))


def test_the_sign_of_a_sum_whose_logarithm_out_cannot_hold(isa):
    """-1e30 becomes -inf in float16; the sum is not 0 for that."""
    x = np.array([[-1e30, -1e30], [-np.inf, -np.inf], [1.0, np.nan], [-1e30, 0.0]])
    for dtype in (F16, F32):
        for a in (x, x.astype(F32)):
            out = np.empty(4, dtype)
            with np.errstate(over="ignore"):
                want = fs.logsumexp(a, -1, return_sign=True)[0].astype(dtype)
            got, sign = fs.logsumexp(a, -1, return_sign=True, out=out)
            assert got is out and sign.dtype == dtype
            assert_same_bits(out, want, dtype)
            assert np.array_equal(sign, [1, 0, np.nan, 1], equal_nan=True)
