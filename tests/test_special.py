"""Every sentence of the contract about special values, for each dtype, ISA and layout.

Rows are tested among ordinary neighbours, along the last axis and along the first (where the lanes
of a vector are rows), short (in registers) and long (in blocks).
"""

import ctypes
import platform
import sys
import warnings
from functools import lru_cache

import numpy as np
import pytest
from common import (
    BF16,
    EPSILON,
    F16,
    F32,
    F64,
    FAMILY,
    SINGLES,
    SMALLEST_SUBNORMAL,
    assert_canonical_nan,
    assert_plus_zero,
    assert_same_bits,
    bits,
    compute_type,
    dtype_id,
    every_dtype,
    normal,
    rng,
)

import fastsoftmax as fs

NAN, INF = np.nan, np.inf
LENGTHS = (2, 5, 16, 40, 70, 300, 2100)


@lru_cache(maxsize=64)
def neighbours(n, dtype):
    return normal((21, n), dtype, 2.0, "neighbours")


def run_batch(function, x, first, **arrays):
    if not first:
        return function(x, -1, **arrays)
    arrays = {name: value.T.copy() for name, value in arrays.items()}
    return np.asarray(function(x.T.copy(), 0, **arrays)).T


@lru_cache(maxsize=512)  # every special row has the same neighbours
def plain_results(function, n, dtype, first, isa):
    return run_batch(function, neighbours(n, dtype), first)


class Batch:
    """Calls that see `row` in the middle of a batch of ordinary rows, whichever way it lies."""

    def __init__(self, layout):
        self.first = layout == "axis first"

    def __call__(self, function, row, **kwargs):
        """The result for `row`; every array among kwargs belongs to that row alone."""
        n = row.shape[-1]
        x = neighbours(n, row.dtype).copy()
        plain = plain_results(function, n, row.dtype, self.first, fs.isa())
        x[10] = row
        arrays = {}
        for name, value in kwargs.items():
            full = np.full((21, n), {"where": True, "bias": 0.0}[name])
            full[10] = value
            arrays[name] = full
        got = run_batch(function, x, self.first, **arrays)
        others = np.arange(21) != 10
        assert_same_bits(got[others], plain[others], "a special row changed its neighbours")
        return got[10]


@pytest.fixture(params=["axis last", "axis first"])
def batch(request):
    return Batch(request.param)


def row_of(n, dtype):
    return normal(n, dtype, 2.0, "row")


# --- -inf, NaN and +inf that take part ------------------------------------------------------------


@every_dtype
def test_minus_infinity_is_exactly_zero(isa, batch, dtype):
    for n in LENGTHS:
        row = row_of(n, dtype)
        row[[0, n // 2]] = -INF
        if n == 2:
            row[1] = 1.5
        gone = np.isinf(row)
        y = batch(fs.softmax, row)
        assert_plus_zero(y[gone], n)
        assert (y[~gone] > 0).all()
        assert (batch(fs.log_softmax, row)[gone] == -INF).all()
        assert np.isfinite(batch(fs.logsumexp, row))


@every_dtype
@pytest.mark.parametrize("special", [NAN, -NAN, INF])
def test_nan_or_plus_infinity_spoils_its_row_only(isa, batch, dtype, special):
    for n in LENGTHS:
        for at in {0, 1, n // 2, n - 1}:
            row = row_of(n, dtype)
            row[at] = special
            for function in (fs.softmax, fs.log_softmax):
                assert_canonical_nan(batch(function, row), (function.__name__, n, at))
            lse = batch(fs.logsumexp, row)
            if special == INF:
                assert lse == INF
            else:
                assert_canonical_nan(lse, (n, at))


@every_dtype
def test_nan_beats_plus_infinity(isa, batch, dtype):
    for n in LENGTHS:
        for nan_at, inf_at in ((0, n - 1), (n - 1, 0)):
            row = row_of(n, dtype)
            row[nan_at], row[inf_at] = NAN, INF
            assert_canonical_nan(batch(fs.softmax, row))
            assert_canonical_nan(batch(fs.logsumexp, row))


@every_dtype
def test_all_minus_infinity(isa, batch, dtype):
    """Some take part and all of them are -inf: NaN as in scipy, torch and jax; logsumexp -inf."""
    for n in (1, *LENGTHS):
        row = np.full(n, -INF, dtype)
        for function in (fs.softmax, fs.log_softmax):
            assert_canonical_nan(batch(function, row), (function.__name__, n))
        assert batch(fs.logsumexp, row) == -INF


@every_dtype
def test_all_participants_minus_infinity(isa, batch, dtype):
    """Excluded entries do not rescue the row, and stay exactly 0 in it."""
    for n in LENGTHS:
        row = row_of(n, dtype)
        row[: n // 2] = -INF
        where = np.arange(n) < n // 2
        for kwargs in ({"where": where}, {"bias": np.where(where, 0, -INF)}):
            y, log_y = batch(fs.softmax, row, **kwargs), batch(fs.log_softmax, row, **kwargs)
            assert_canonical_nan(y[where])
            assert_canonical_nan(log_y[where])
            assert_plus_zero(y[~where])
            assert (log_y[~where] == -INF).all()
            assert batch(fs.logsumexp, row, where=where) == -INF


@every_dtype
def test_every_nan_in_gives_the_canonical_nan_out(isa, batch, dtype):
    """Sign, payload and signalling bit of the input's NaN do not leak."""
    unsigned = f"u{dtype.itemsize}"
    all_ones = np.iinfo(unsigned).max
    infinity = int(bits(dtype.type(INF)))
    row = row_of(40, dtype)
    for pattern in (
        all_ones,
        infinity + 1,
        all_ones >> 1,
        (all_ones ^ (all_ones >> 1)) + infinity + 1,
    ):
        row.view(unsigned)[7] = pattern
        for function in (fs.softmax, fs.log_softmax, fs.logsumexp):
            assert_canonical_nan(batch(function, row), hex(pattern))


# --- entries that take no part --------------------------------------------------------------------


def hide(where):
    """Three ways to say that an entry takes no part."""
    bias = np.where(where, 0, -INF)
    spoiled = np.where(where, bias, NAN)  # `where` also hides a NaN in bias
    return {"where": where}, {"bias": bias}, {"where": where, "bias": spoiled}


@every_dtype
@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 3.0e4])
def test_excluded_entries_do_not_matter(isa, batch, dtype, hidden):
    """Whatever x holds there: exactly 0 (-inf in log_softmax), and the others do not notice."""
    for n in LENGTHS:
        row = row_of(n, dtype)
        where = np.arange(n) % 3 != 1
        want = {f: f(row[where]) for f in (fs.softmax, fs.log_softmax, fs.logsumexp)}
        row[~where] = hidden
        for kwargs in hide(where):
            y = batch(fs.softmax, row, **kwargs)
            assert_plus_zero(y[~where], kwargs)
            assert_same_bits(y[where], want[fs.softmax])
            log_y = batch(fs.log_softmax, row, **kwargs)
            assert (log_y[~where] == -INF).all()
            assert_same_bits(log_y[where], want[fs.log_softmax])
        assert_same_bits(batch(fs.logsumexp, row, where=where), want[fs.logsumexp])


@every_dtype
@pytest.mark.parametrize("special", [NAN, INF])
def test_excluded_entries_in_a_nan_row(isa, batch, dtype, special):
    for n in LENGTHS:
        row = row_of(n, dtype)
        where = np.arange(n) % 3 != 1
        row[0] = special
        row[~where] = NAN
        for kwargs in hide(where):
            y, log_y = batch(fs.softmax, row, **kwargs), batch(fs.log_softmax, row, **kwargs)
            assert_plus_zero(y[~where], (n, kwargs))
            assert_canonical_nan(y[where])
            assert (log_y[~where] == -INF).all()
            assert_canonical_nan(log_y[where])


@every_dtype
@pytest.mark.parametrize("filled", [None, NAN, INF, -INF])
def test_no_entry_takes_part(isa, batch, dtype, filled):
    """A row of zeros; -inf in log_softmax and logsumexp."""
    for n in (1, *LENGTHS):
        row = row_of(n, dtype) if filled is None else np.full(n, filled, dtype)
        for kwargs in hide(np.zeros(n, bool)):
            assert_plus_zero(batch(fs.softmax, row, **kwargs))
            assert (batch(fs.log_softmax, row, **kwargs) == -INF).all()
        assert batch(fs.logsumexp, row, where=np.zeros(n, bool)) == -INF


@every_dtype
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_or_plus_infinity_in_bias_takes_part(isa, batch, dtype, value):
    for n in LENGTHS:
        bias = np.zeros(n)
        bias[n // 2] = value
        assert_canonical_nan(batch(fs.softmax, row_of(n, dtype), bias=bias))
        row = row_of(n, dtype)
        row[n // 2] = -INF  # -inf + inf is NaN as well
        assert_canonical_nan(batch(fs.softmax, row, bias=bias))


@every_dtype
def test_bias_that_rounds_to_minus_infinity_excludes(isa, batch, dtype):
    """bias is converted to the compute type first: -1e300 is -inf in float32."""
    row = row_of(20, dtype)
    row[3] = NAN
    bias = np.zeros(20)
    bias[3] = -INF if dtype == F64 else -1e300
    y = batch(fs.softmax, row, bias=bias)
    assert_plus_zero(y[3])
    assert np.isfinite(y).all()


# --- empty, 0-d, single ---------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    "shape, axis",
    [
        *(((0,), 0), ((3, 0), 1), ((0, 3), 0), ((2, 0, 3), 1)),  # empty rows
        *(((0, 3), 1), ((3, 0), 0)),  # no rows
        *(((2, 0, 3), None), ((0, 3), (0, 1)), ((2, 0, 3), (0, 2))),
    ],
)
def test_empty(isa, dtype, shape, axis):
    x = np.empty(shape, dtype)
    for function in FAMILY:
        y = function(x, axis)
        assert y.shape == shape and y.dtype == dtype
        assert function(x, axis, bias=np.zeros(shape), where=np.ones(shape, bool)).shape == shape
    lse = fs.logsumexp(x, axis)
    assert lse.dtype == dtype and lse.shape == x.sum(axis).shape
    assert (np.asarray(lse) == -INF).all()
    assert fs.logsumexp(x, axis, keepdims=True).shape == x.sum(axis, keepdims=True).shape
    for function in (fs.softmax_backward, fs.log_softmax_backward):
        assert function(x, x, axis).shape == shape


@every_dtype
@pytest.mark.parametrize("axis", [None, 0, -1, ()])
def test_zero_dimensions(isa, dtype, axis):
    x = np.array(1.5, dtype)
    for value in (x, x[()]):
        for function, want in ((fs.softmax, 1), (fs.log_softmax, 0), (fs.logsumexp, 1.5)):
            y = function(value, axis)
            assert type(y) is dtype.type and y == want
    assert_canonical_nan(fs.softmax(np.array(NAN, dtype), axis))
    assert fs.logsumexp(np.array(INF, dtype), axis) == INF
    assert fs.softmax(x, axis, where=False) == 0
    assert fs.softmax_backward(x, np.array(1, dtype), axis) == 0


@every_dtype
def test_single_entries_are_exactly_one(isa, dtype):
    for value in (0.0, -0.0, 1.5, -7.25, float(SMALLEST_SUBNORMAL[dtype]), 3e4, -3e4):
        x = np.full((37, 1), value, dtype)
        one = np.ones_like(x)
        assert_same_bits(fs.softmax(x), one)
        assert_same_bits(fs.softmax(x.T, 0), one.T)
        assert_same_bits(fs.softmax(x, ()), one)
        assert (fs.log_softmax(x) == 0).all()
        assert (fs.logsumexp(x, -1) == x[:, 0]).all()


# --- zeros, subnormals, extremes ------------------------------------------------------------------


@every_dtype
def test_signed_zeros_are_equal(isa, batch, dtype):
    for n in LENGTHS:
        zeros = np.where(np.arange(n) % 2, 0.0, -0.0).astype(dtype)
        assert_same_bits(batch(fs.softmax, zeros), batch(fs.softmax, np.abs(zeros)))
        assert_same_bits(batch(fs.logsumexp, zeros), batch(fs.logsumexp, np.abs(zeros)))
    assert_same_bits(fs.softmax(np.array([0.0, -0.0], dtype)), np.array([0.5, 0.5], dtype))


@every_dtype
def test_subnormal_results_are_not_flushed(isa, batch, dtype):
    smallest = SMALLEST_SUBNORMAL[dtype]
    top = float(np.log(2.0) * {F16: -15, BF16: -127, F32: -127, F64: -1023}[dtype])
    bottom = float(np.log(smallest))
    for n in LENGTHS:
        row = np.linspace(bottom, top, n).astype(dtype)
        row[0] = 0
        row[1:] = np.clip(row[1:].astype(F64), bottom, top).astype(dtype)
        with np.errstate(under="ignore"):
            want = np.exp(row.astype(F64)) / np.exp(row.astype(F64)).sum()
        got = batch(fs.softmax, row).astype(F64)
        assert (np.abs(got - want)[1:] <= 1.01 * smallest + 1e-6 * want[1:]).all(), n
        assert (got[want > smallest] > 0).all()


@every_dtype
def test_subnormal_inputs_are_not_taken_for_zero(isa, dtype):
    """1/temperature scales a subnormal back to 1."""
    smallest = 2.0**-1060 if dtype == F64 else 2.0 ** (-24 if dtype == F16 else -133)
    t = 2.0**-1010 if dtype == F64 else 2.0 ** (-24 if dtype == F16 else -120)
    x = np.zeros((4, 33), dtype)
    x[:, 0] = smallest
    want = fs.softmax(x.astype(F64) / t if dtype == F64 else (x.astype(F32) / np.float32(t)))
    assert bits(want)[0, 0] != bits(want)[0, 1]
    inner = F64 if dtype == F64 else F32
    assert_same_bits(fs.softmax(x, dtype=inner, temperature=t), want)
    assert_same_bits(fs.softmax(x.T.copy(), 0, dtype=inner, temperature=t), want.T)


@every_dtype
def test_extreme_finite_values(isa, batch, dtype):
    limits = {F16: 65504.0, BF16: float.fromhex("0x1.fep127"), F32: float(np.finfo(F32).max)}
    top = limits.get(dtype, float(np.finfo(F64).max))
    for n in LENGTHS:
        row = np.full(n, -top, dtype)
        row[n // 2] = top
        want = np.zeros(n, dtype)
        want[n // 2] = 1
        assert_same_bits(batch(fs.softmax, row), want)
        assert batch(fs.logsumexp, row) == dtype.type(top)
        log_y = batch(fs.log_softmax, row)
        assert log_y[n // 2] == 0
        # -2 * top is -inf where the result type cannot hold it, in every dtype.
        assert (np.delete(log_y, n // 2) == -INF).all()
        for value in (top, -top):
            y = batch(fs.softmax, np.full(n, value, dtype))
            assert len(set(bits(y).tolist())) == 1 and abs(float(y[0]) * n - 1) < 0.01


@every_dtype
def test_equal_entries(isa, batch, dtype):
    """Equal logits get equal bits; powers of two of them exactly 1/n."""
    for n in (1, 2, 3, 4, 7, 16, 64, 100, 256, 1000, 4096):
        for value in (0, 1, -3, 1000):
            y = batch(fs.softmax, np.full(n, value, dtype))
            assert len(set(bits(y).tolist())) == 1
            if n & (n - 1) == 0:
                assert float(y[0]) == 1 / n


@pytest.mark.parametrize("dtype", SINGLES, ids=dtype_id)
def test_scaling_past_the_largest_number(isa, dtype):
    """x/T overflows: z is +-inf, and a +inf that takes part makes a NaN row."""
    big = np.finfo(dtype).max
    assert_canonical_nan(fs.softmax(np.array([big, 0], dtype), temperature=0.5))
    got = fs.softmax(np.array([-big, 0], dtype), temperature=0.5)
    assert_same_bits(got, np.array([0, 1], dtype))
    # With a bias the fused multiply-add does not overflow in between.
    got = fs.softmax(np.array([big, 0], dtype), temperature=0.5, bias=np.array([-big, 0], dtype))
    assert_same_bits(got, np.array([1, 0], dtype))


# --- temperature ----------------------------------------------------------------------------------


@every_dtype
def test_temperature_per_row(isa, dtype):
    x = normal((6, 70), dtype, 5.0)
    t = np.array([0.25, 0.7, 1, 2, 13, 100.0])[:, None]
    for function in FAMILY:
        want = np.stack(
            [function(row, temperature=float(v)) for row, v in zip(x, t[:, 0], strict=True)]
        )
        assert_same_bits(function(x, temperature=t), want)
        assert_same_bits(function(x, temperature=t.astype(F32).astype(F64)),
                         function(x, temperature=t.astype(F32)))  # fmt: skip
        assert_same_bits(function(x.T.copy(), 0, temperature=t.T), want.T)
        assert_same_bits(function(x, temperature=np.array(2)), function(x, temperature=2))
        assert_same_bits(function(x, temperature=[[2]]), function(x, temperature=2.0))
        assert_same_bits(function(x, None, temperature=[[2]]), function(x, None, temperature=2.0))


@every_dtype
def test_large_and_small_temperature(isa, dtype):
    for n in LENGTHS:
        row = row_of(n, dtype)
        row[n // 2] = 9
        y = fs.softmax(row, temperature=1e30)
        assert len(set(bits(y).tolist())) == 1
        y = fs.softmax(row, temperature=1e-30)
        assert_same_bits(y, (row == 9).astype(dtype))


# --- logsumexp's weights, backward ----------------------------------------------------------------


@every_dtype
def test_weight_zero_takes_no_part(isa, dtype):
    for n in LENGTHS:
        x = row_of(n, dtype)
        b = np.where(np.arange(n) % 3 == 1, 0.0, 1.0)
        want = fs.logsumexp(x, where=b == 1)
        for hidden in (NAN, INF, -INF, 3e4):
            x[b == 0] = hidden
            got = fs.logsumexp(x, b=b)
            assert abs(float(got) - float(want)) <= 2 * EPSILON[dtype] * max(1, abs(float(want)))
        assert fs.logsumexp(x, b=np.zeros(n)) == -INF
        value, sign = fs.logsumexp(x, b=np.zeros(n), return_sign=True)
        assert value == -INF and sign == 0


@every_dtype
@pytest.mark.parametrize("x, b, value, sign", [
    ([INF, 0], [1, 1], INF, 1), ([INF, 0], [-1, 1], INF, -1), ([INF, INF], [1, -1], NAN, NAN),
    ([-INF, -INF], [1, -1], -INF, 0), ([-INF, 0], [INF, 1], NAN, NAN), ([0, 0], [1, -1], -INF, 0),
    ([0, 0], [INF, 1], INF, 1), ([0, 0], [-INF, 1], INF, -1), ([0, 0], [INF, -INF], NAN, NAN),
    ([0, 0], [NAN, 1], NAN, NAN), ([NAN, 0], [1, 1], NAN, NAN), ([NAN, 0], [0, -1], 0, -1),
    ([INF, 0], [0, 2], 0.6931471805599453, 1), ([-INF, 0], [-5, 1], 0, 1),
    ([-INF, -INF], [2, 3], -INF, 0), ([-INF, -INF], [-2, -3], -INF, 0),
])  # fmt: skip
def test_special_weights(isa, dtype, x, b, value, sign):
    """IEEE arithmetic of sum(b * exp(x)); +inf is +inf * sign(b). Alone, padded, between rows."""
    for n in (2, 7, 40, 300):
        row, weights = np.zeros((2, n))
        row[[0, n - 1]], weights[[0, n - 1]] = x, b
        batch = normal((9, n), dtype, 2.0)
        batch[4] = row
        all_weights = np.ones((9, n))
        all_weights[4] = weights
        for got, got_sign in (
            fs.logsumexp(batch[4], b=weights, return_sign=True),
            np.array(fs.logsumexp(batch, -1, b=all_weights, return_sign=True))[:, 4],
            np.array(fs.logsumexp(batch.T, 0, b=all_weights.T, return_sign=True))[:, 4],
        ):
            assert got.dtype == got_sign.dtype == dtype
            np.testing.assert_allclose(np.float64(got), value, rtol=0.01)
            np.testing.assert_equal(np.float64(got_sign), sign)
        # Without the sign, the logarithm of a negative sum is NaN.
        plain = fs.logsumexp(batch, -1, b=all_weights)[4]
        np.testing.assert_allclose(np.float64(plain), NAN if sign == -1 else value, rtol=0.01)
        if np.isnan(plain):
            assert_canonical_nan(plain)


def test_long_rows_of_halves(isa):
    """Longer than what is read once, shorter than what is dealt: exp has room of its own."""
    x = np.random.default_rng(0).random((3, 200_000)).astype(np.float16)
    with fs.num_threads(1):
        want = fs.softmax(x, dtype=np.float32).astype(np.float16)
        assert_same_bits(fs.softmax(x), want)


@every_dtype
@pytest.mark.parametrize("axis", [0, 1])
def test_side_by_side_huge_and_far_apart(isa, dtype, axis):
    """All of them: what is wrong with a row must not cancel what is wrong with another way."""
    huge = 2.0**15 if dtype == np.float16 else 2.0**70
    x = np.full((20, 20), -huge, dtype)
    x[0] = huge
    want = np.zeros((20, 20), dtype)
    want[0] = 1
    assert_same_bits(fs.softmax(x if axis == 0 else x.T, axis), want if axis == 0 else want.T)


def test_the_sum_of_nothing_has_no_sign(isa):
    x = np.empty((3, 0))
    value, sign = fs.logsumexp(x, -1, b=x, return_sign=True)
    assert (value == -np.inf).all() and (sign == 0).all() and sign.shape == (3,)


@every_dtype
def test_sign_without_weights(isa, batch, dtype):
    """1 where there is a sum, 0 where it is empty or all -inf, NaN where it is NaN."""
    for n in LENGTHS:
        for fill, want in ((1, 1), (INF, 1), (-INF, 0), (NAN, NAN)):
            x = np.full(n, fill, dtype)
            value, sign = fs.logsumexp(x, return_sign=True)
            np.testing.assert_equal(np.float64(sign), want)
            assert_same_bits(value, fs.logsumexp(x))
            signs = batch(lambda a, axis: fs.logsumexp(a, axis, return_sign=True)[1], x)
            assert_same_bits(signs, sign)
        value, sign = fs.logsumexp(x, where=np.zeros(n, bool), return_sign=True)
        assert value == -INF and sign == 0


@every_dtype
def test_backward_ignores_excluded_entries(isa, batch, dtype):
    for n in LENGTHS:
        x, grad = row_of(n, dtype), normal(n, dtype, 1.0, "grad")
        where = np.arange(n) % 3 != 1
        for forward, backward in (
            (fs.softmax, fs.softmax_backward),
            (fs.log_softmax, fs.log_softmax_backward),
        ):
            y = forward(x, where=where)
            clean = backward(np.where(where, grad, dtype.type(0)), y)
            for hidden in (NAN, INF, -INF, 3e4):
                g = np.where(where, grad, dtype.type(hidden))
                got = batch(lambda v, axis, b=backward, m=y: _one_row(b, v, m, axis), g)
                assert_same_bits(got, clean, (backward.__name__, n, hidden))
                assert_plus_zero(np.abs(got[~where]))


def _one_row(backward, grads, y, axis):
    """Every row of grads against the same y, whichever way the rows lie."""
    ys = np.broadcast_to(y, grads.shape if axis else grads.shape[::-1])
    return backward(grads, ys if axis else ys.T, axis)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INF])
def test_backward_nan_spoils_its_row_only(isa, dtype, value):
    x, grad = normal((5, 40), dtype, 2.0), normal((5, 40), dtype, 1.0, "grad")
    for forward, backward in (
        (fs.softmax, fs.softmax_backward),
        (fs.log_softmax, fs.log_softmax_backward),
    ):
        y = forward(x)
        y[2, 5:9] = 0 if backward is fs.softmax_backward else -INF
        want = backward(grad, y)
        spoiled = grad.copy()
        spoiled[2, 30] = value
        for got in (backward(spoiled, y), backward(spoiled.T.copy(), y.T.copy(), 0).T):
            assert_same_bits(np.delete(got, 2, 0), np.delete(want, 2, 0))
            assert_plus_zero(np.abs(got[2, 5:9]))
            # inf - inf at the entry itself, +-inf elsewhere: nothing finite is left in the row.
            assert not np.isfinite(np.delete(got[2], np.s_[5:9])).any()
            nan = got[np.isnan(got)]
            assert nan.size
            assert_canonical_nan(nan)


# --- the floating-point environment ---------------------------------------------------------------

SPECIALS = [NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 100.0, -100.0, 1.0]


def every_function_on(x, where):
    """Call everything on x, specials and all."""
    y = fs.softmax(x)
    for axis in (0, -1, None):
        for function in FAMILY:
            function(x, axis)
            function(x, axis, bias=x, temperature=0.5)
            function(x, axis, where=where)
        fs.logsumexp(x, axis)
        fs.logsumexp(x, axis, b=x, return_sign=True)
        fs.softmax_backward(x, y, axis)
        fs.log_softmax_backward(x, y, axis, temperature=3)


def specials(dtype):
    x = np.array(SPECIALS * 7)
    x = np.stack([np.roll(x, k) for k in range(20)] + [np.full_like(x, v) for v in SPECIALS])
    with np.errstate(all="ignore"):
        x = x.astype(dtype)
    x.setflags(write=False)
    return x


@every_dtype
def test_no_floating_point_warnings(isa, dtype):
    x = specials(dtype)
    where, before = bits(x) % 3 > 0, np.geterr()
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        every_function_on(x, where)
    assert np.geterr() == before


# FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW, FE_UNDERFLOW; not FE_INEXACT, which Python itself raises.
_FLAGS = {"x86_64": 0x01 | 0x04 | 0x08 | 0x10, "aarch64": 0x01 | 0x02 | 0x04 | 0x08}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _FLAGS, reason="needs glibc's fenv.h"
)
@every_dtype
def test_flags_and_modes_are_left_as_found(isa, dtype):
    flags, libm = _FLAGS[platform.machine()], ctypes.CDLL("libm.so.6")
    x = specials(dtype)
    outs = np.empty_like(x)
    calls = [
        lambda: fs.softmax(x, out=outs),
        lambda: fs.log_softmax(x, 0, out=outs),
        lambda: fs.softmax(x, bias=x, temperature=0.1),
        lambda: fs.logsumexp(x),
        lambda: fs.logsumexp(x, b=x, return_sign=True),
        lambda: fs.softmax_backward(x, x),
        lambda: fs.log_softmax_backward(x, x),
    ]
    mode = libm.fegetround()
    try:
        for number, call in enumerate(calls):
            for raised in (0, flags):
                libm.feclearexcept(flags)
                libm.feraiseexcept(raised)
                call()
                assert libm.fetestexcept(flags) == raised, f"call {number}, flags {raised:#x}"
                assert libm.fegetround() == mode
    finally:
        libm.feclearexcept(flags)
    # Neither flush-to-zero nor denormals-are-zero is switched on.
    tiny = np.array([2.0**-140], F32)
    assert (tiny * np.float32(0.5))[0] == 2.0**-141


def test_a_row_of_one_is_certain(isa):
    """softmax 1, log_softmax 0 and logsumexp the entry itself, exactly, wherever it lies."""
    for dtype in (np.float32, np.float64):
        x = (rng("one").standard_normal(2000) * 10.0 ** rng("scale").uniform(-3, 5, 2000))[:, None]
        x = x.astype(dtype)
        assert (fs.softmax(x) == 1).all()
        assert (fs.log_softmax(x) == 0).all()
        assert (fs.logsumexp(x, axis=1) == x[:, 0]).all()


@pytest.mark.parametrize("n", [3, 40, 1030])
def test_a_special_row_among_masked_ones(isa, n):
    """Rows are masked some at a time: one that is NaN, or empty, leaves the others as they are."""
    x, where = normal((9, n), F32), np.ones((9, n), bool)
    where[:, 0] = False  # -inf in log_softmax, which does not make the row special
    x[4, 1] = np.nan
    where[6] = False
    for function in (fs.softmax, fs.log_softmax):
        got = function(x, where=where)
        for row in range(9):
            assert_same_bits(got[row], function(x[row], where=where[row]), row)
        assert np.isnan(got[4, 1:]).all() and not np.isnan(np.delete(got, 4, 0)).any()


@every_dtype
def test_merge_has_no_minus_zero(isa, dtype):
    zeros, lse = np.full((2, 19), -0.0, dtype), np.zeros(2, compute_type(dtype))
    out, _ = fs.merge_attention(zeros, lse, zeros, lse)
    assert_plus_zero(out)


@pytest.mark.parametrize("at", (0, 1 << 17, 1 << 18))
def test_nan_in_any_part_of_a_row_cut_for_threads(isa, threads, at):
    """The maxima of the parts are put together; one that is NaN, be it the first, is not lost."""
    threads(2)
    x = np.zeros((1 << 18) + 5000, np.float32)
    x[at] = NAN
    assert np.isnan(fs.softmax(x)).all()
    assert np.isnan(fs.logsumexp(x))


def test_row_of_several_slices(isa):
    """Between slices, of four million elements here, the caller looks for signals."""
    n = 9_000_001
    assert_same_bits(fs.softmax(np.broadcast_to(0.5, n)), np.full(n, 1 / n), isa)


def test_positive_log_probabilities(isa):
    """No log_softmax gives one, but another library's rounding may."""
    y, grad = np.array([1e-7, 0.5, -1], np.float32), np.array([0.25, 1, 2], np.float32)
    got = fs.log_softmax_backward(grad, y)
    np.testing.assert_allclose(got, grad - 3.25 * np.exp(y.astype(float)), rtol=1e-6)


@every_dtype
def test_fields_of_packed_records(isa, dtype):
    """Steps of one byte more than a number has, and no alignment."""
    x = normal(70, dtype, 2.0, "records")
    records = np.zeros(70, [("kind", np.uint8), ("x", dtype)])
    records["x"] = x
    for function in FAMILY:
        assert_same_bits(function(records["x"]), function(x), isa)


@every_dtype
def test_rows_of_equal_elements(isa, dtype):
    """The largest sums that there are, at each length that a vector, block or count may end at."""
    compute = F64 if dtype == F64 else F32
    tolerance = {2: 2.0**-7, 4: 2.0**-22, 8: 2.0**-50}[dtype.itemsize]
    for n in [*range(1, 1100), 2048, 4096, 8192, 16384]:
        x = np.full((5, n), -3, dtype)
        assert_same_bits(fs.softmax(x), np.full((5, n), 1 / n, compute).astype(dtype))
        got = fs.logsumexp(x, -1).astype(F64)
        np.testing.assert_allclose(got, np.log(n) - 3, tolerance, tolerance)
