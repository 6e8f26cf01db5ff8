"""The oracle against oracles of which not one line is ours: mpmath, decimal, exact fractions."""

import ast
import doctest
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import product

import ml_dtypes
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsoftmax import reference

NAN, INF = np.nan, np.inf
F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
FLOATS = F16, BF16, F32, F64
# Significant bits, exponent of the smallest normal number.
FORMATS = {F16: (11, -14), BF16: (8, -126), F32: (24, -126), F64: (53, -1022)}

WIDE = np.longdouble if np.finfo(np.longdouble).nmant >= 63 else np.float64
PRECISE = [np.float64, pytest.param(WIDE, id="wide")]
# exp, the sum, the division and a correction: each within 1 ulp of the oracle's type, or nearly.
UNITS = 5

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
every_precision = pytest.mark.parametrize("precise", PRECISE)


# --- mpmath ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(80):
        yield


def mpf(v):
    """Any NumPy float, exactly."""
    if not np.isfinite(v):
        return mpmath.mpf(float(v))
    fraction, exponent = np.frexp(v if isinstance(v, np.longdouble) else np.float64(v))
    high = np.float64(fraction)
    return mpmath.ldexp(mpmath.mpf(float(high)) + mpmath.mpf(float(fraction - high)), int(exponent))


def mp_logsumexp(z):
    """The largest of z, and log(sum(exp(z))) less that: apart, for the second may be tiny."""
    *rest, m = sorted(z)
    return m, mpmath.log1p(mpmath.fsum(mpmath.exp(v - m) for v in rest))


def assert_close(got, want, precise, units=UNITS, scale=None):
    """Within `units` ulp of the oracle's type, relative to the true value or to `scale`."""
    info = np.finfo(precise)
    for i, (g, w) in enumerate(zip(np.ravel(got), want, strict=True)):
        size = abs(w) if scale is None else scale
        bound = units * mpf(info.eps) / 2 * size + mpf(info.smallest_subnormal)
        assert abs(mpf(g) - w) <= bound, (i, g, mpmath.nstr(w, 25))


ROWS = {
    "plain": [0.3, -1.2, 2.5, 2.5, -7.0, 0.0, 1.75],
    "one": [-3.0],
    "equal": [1.1] * 5,
    "small": [1e-3, -2e-4, 5e-6],
    "subnormal": [2.0**-149, -(2.0**-140), 0.0],
    "wide spread": np.linspace(-110, 0, 12),
    "wider spread": np.linspace(-760, 0, 16),
    "mixed scales": [700.1, 1e-7, -700.3, 699.8],
    "dominated": [0.25, -16.5, -17.0, -30.0, -45.0],
    "offset": np.linspace(-4, 4, 9) + 1000.0,
    "far offset": np.linspace(-64, 64, 9) - 3e4,
}
HUGE = {
    F32: [[1e8, 1e8 - 8, 1e8 - 64], [1e30, 1e30, -1e30], [3e38, -3e38, 0.0]],
    F64: [[1e15, 1e15 - 0.25, 1e15 - 700], [1e30, 1e30, -1e30], [8e307, -8e307, 0.0]],
}
HUGE |= {F16: [[65504.0, 65472.0, -65504.0]], BF16: HUGE[F32]}


def check_row(z, precise, softmax, log_softmax):
    """Results of one row whose logits are z."""
    z = [mpf(v) for v in z]
    m, log_sum = mp_logsumexp(z)
    assert softmax.dtype == log_softmax.dtype == precise
    assert_close(softmax, [mpmath.exp(v - m - log_sum) for v in z], precise)
    assert_close(log_softmax, [v - m - log_sum for v in z], precise)


@every_precision
@every_dtype
def test_rows(dtype, precise):
    for row in [*ROWS.values(), *HUGE[dtype]]:
        x = np.asarray(row).astype(dtype)
        z = x.astype(np.float64)
        y = reference.softmax(x, precise=precise)
        check_row(z, precise, y, reference.log_softmax(x, precise=precise))
        y = reference.softmin(x, precise=precise)
        check_row(-z, precise, y, reference.log_softmax(-z.astype(dtype), precise=precise))
        m, log_sum = mp_logsumexp([mpf(v) for v in z])
        scale = max(abs(m), log_sum)
        got, sign = reference.logsumexp(x, precise=precise, return_sign=True)
        assert_close(got, [m + log_sum], precise, scale=scale)
        assert sign == 1 and got.dtype == sign.dtype == precise


def test_against_decimal():
    with localcontext() as context:
        context.prec = 40
        e = [Decimal(v).exp() for v in (1, 2, 3)]
        want = [float(v / sum(e)) for v in e]
        lse = float(sum(e).ln())
    np.testing.assert_allclose(reference.softmax([1, 2, 3]), want, rtol=1e-15)
    np.testing.assert_allclose(reference.softmin([3, 2, 1]), want, rtol=1e-15)
    np.testing.assert_allclose(reference.logsumexp([1, 2, 3]), lse, rtol=1e-15)
    np.testing.assert_allclose(reference.log_softmax([1, 2, 3]), np.arange(1, 4) - lse, rtol=1e-14)


@every_precision
def test_long_row(precise):
    """The error of the sum does not grow with the row, whichever axis it is."""
    n = 100_000
    x = np.full((n, 2), [0.3, -0.2], np.float32)
    want = [mpmath.mpf(1) / n] * 2
    assert_close(reference.softmax(x, axis=0, precise=precise)[-1], want, precise)
    assert_close(reference.softmax(x.T.copy(), precise=precise)[:, 0], want, precise)


# --- z, rounded once ------------------------------------------------------------------------------


def round_to(exact, dtype):
    """A Fraction rounded to dtype, ties to even, as a float; the definition, in integers."""
    bits, lowest = FORMATS[dtype]
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - bits + 1)
    rounded = round(size / unit) * unit
    top = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** (1 - lowest)
    rounded = math.inf if rounded > top else float(rounded)
    return rounded if exact > 0 else -rounded


def check_fma(x, r, c, dtype):
    x, r, c = (np.asarray(v, dtype) for v in (x, r, c))
    with np.errstate(all="ignore"):
        got = reference._fma(x, r, c)
    assert got.dtype == dtype
    for g, a, b, d in zip(got.flat, x.flat, r.flat, c.flat, strict=True):
        want = round_to(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(d)), dtype)
        assert g == want, (a, b, d)


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_fma_rounds_once(dtype):
    r = np.random.default_rng(1)
    bits, lowest = FORMATS[dtype]
    n = 300
    for low, high in ((-3, 3), (-bits, bits), (lowest // 2 - 30, -lowest // 2), (lowest, -lowest)):
        x, s = (
            np.ldexp(r.uniform(-1, 1, n).astype(dtype), r.integers(low, high, n)) for _ in range(2)
        )
        with np.errstate(all="ignore"):
            p = x * s
        p = np.where(np.isfinite(p), p, 1)
        for c in (
            -p,  # what is left is the rounding error of the product
            np.nextafter(-p, dtype.type(0)),
            np.ldexp(p, r.integers(-bits - 3, -bits + 3, n)),  # near the last place
            np.ldexp(p, r.integers(-2 * bits - 3, 4, n)),
            np.ldexp(r.uniform(-1, 1, n).astype(dtype), r.integers(lowest, -lowest, n)),
        ):
            check_fma(x, s, np.where(np.isfinite(c), c, 0), dtype)


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_fma_at_ties(dtype):
    """The product lies halfway between two numbers: a bias of any size decides."""
    bits, lowest = FORMATS[dtype]
    info = np.finfo(dtype)
    a = bits // 2
    x, r = 1 + 2.0**-a, 1 + 2.0 ** (a - bits)  # 1 + ... + 2^-bits, half an ulp
    deltas = [0.0, info.smallest_subnormal, info.smallest_normal, 2.0 ** (-2 * bits), info.eps]
    for delta, sign, scale in product(deltas, (1, -1), (1, -1)):
        check_fma(scale * x, r, sign * float(delta), dtype)
    # Products in, below and at the edge of the subnormal numbers; at the edge of overflow.
    for k, delta in product(range(lowest - bits - 3, lowest + 3), deltas[:3]):
        check_fma(math.ldexp(x, k // 2), math.ldexp(r, k - k // 2), float(delta), dtype)
    top = float(info.max)
    for c in (0.0, top, -top, -top / 2, 1.0, math.ldexp(1.0, -lowest + 1 - bits)):
        for x, r in ((top, 1.0), (top, 2.0), (top, 1.5), (-top, 2.0), (top, float(info.tiny))):
            check_fma(x, r, c, dtype)


@given(*[st.floats(allow_nan=False, allow_infinity=False)] * 3)
def test_fma_any_float64(x, r, c):
    check_fma(x, r, c, F64)


@given(*[st.floats(allow_nan=False, allow_infinity=False, width=32)] * 3)
def test_fma_any_float32(x, r, c):
    check_fma(x, r, c, F32)


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_fma_of_infinities_and_nan(dtype):
    values = np.array([0.0, 1.0, -2.0, np.finfo(dtype).max, INF, -INF, NAN], dtype)
    x, r, c = (a.ravel() for a in np.meshgrid(values, values, values))
    some = np.isfinite(r) & ~(np.isfinite(x) & np.isfinite(c))
    x, r, c = x[some], r[some], c[some]
    with np.errstate(all="ignore"):
        # An infinite bias must win over a finite product that overflows.
        want = np.where(np.isfinite(x), c, x * r + c)
        np.testing.assert_array_equal(reference._fma(x, r, c), want)


# --- temperature, bias, where ---------------------------------------------------------------------


@every_precision
@every_dtype
@pytest.mark.parametrize("temperature", [None, 0.07, 1.7, 1e-4, 3])
def test_temperature_bias_and_where(dtype, precise, temperature):
    r = np.random.default_rng(2)
    inner = F64 if dtype == F64 else F32
    reciprocal = round_to(Fraction(1.0 / (temperature or 1)), inner)
    x = r.normal(0, 5 * min(1, temperature or 1), 12).astype(dtype)
    bias = r.normal(0, 3, 12)
    bias[3] = -INF
    where = r.random(12) < 0.7
    where[0] = True
    for b, w in product((None, bias, bias.astype(dtype)), (None, where)):
        part = np.ones(12, bool) if w is None else w
        c = np.zeros(12) if b is None else b.astype(np.float64)
        part = part & (c != -INF)
        options = {"temperature": temperature, "bias": b, "where": w, "precise": precise}
        for function, sign in ((reference.softmax, 1), (reference.softmin, -1)):
            z = [
                round_to(
                    Fraction(float(v)) * Fraction(sign * reciprocal)
                    + Fraction(round_to(Fraction(float(d)), inner)),
                    inner,
                )
                for v, d in zip(x[part], c[part], strict=True)
            ]
            y = function(x, **options)
            log_y = reference.log_softmax(-x if sign < 0 else x, **options)
            check_row(z, precise, y[part], log_y[part])
            assert (y[~part] == 0).all() and (log_y[~part] == -INF).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_the_compute_type(dtype):
    """Temperature and bias are rounded to it, and it follows x and dtype, not bias."""
    x = np.array([0.5, 1.25, -2.0], np.float32)
    inner = dtype.type
    bias = np.array([0.1, 0.7, -1 / 3])
    z = reference._fma(
        x.astype(inner), np.full(3, inner(1 / 0.3)), bias.astype(inner)
    )  # fmt: skip
    got = reference.softmax(x, bias=bias, temperature=0.3, dtype=dtype)
    np.testing.assert_array_equal(got, reference.softmax(z))
    half = x.astype(np.float16)
    got = reference.softmax(half, bias=bias, temperature=0.3, dtype=dtype)
    np.testing.assert_array_equal(got, reference.softmax(z))
    for small in (F16, BF16, F32):  # a narrower result does not narrow the arithmetic
        got = reference.softmax(x.astype(dtype), bias=bias, temperature=0.3, dtype=small)
        np.testing.assert_array_equal(got, reference.softmax(z))


@pytest.mark.parametrize("dtype", ["bool", "i1", "u1", "i2", "i4", "i8", "u8", ">i4", ">f4", ">f8"])
def test_other_types(dtype):
    x = np.array([0, 1, 1, 0, 1] if dtype == "bool" else [0, 1, 5, 3, 100]).astype(dtype)
    kind = x.dtype.newbyteorder("=") if x.dtype.kind == "f" else np.float64
    plain = x.astype(kind)
    for options in ({}, {"temperature": 0.3, "bias": 0.1}):
        want = reference.softmax(plain, **options)
        np.testing.assert_array_equal(reference.softmax(x, **options), want)
    # Integers need not fit in float64: they are rounded to it.
    big = np.array([2**62, 2**62 - 1, 2**62 - 2048])
    np.testing.assert_array_equal(reference.softmax(big), reference.softmax(big.astype(float)))


# --- special rows ---------------------------------------------------------------------------------

SPECIAL = [
    # x, options, softmax, log_softmax, logsumexp
    ([-INF, 0.0], {}, [0, 1], [-INF, 0], 0),
    ([-INF, -INF], {}, [NAN] * 2, [NAN] * 2, -INF),
    ([INF, 0.0, -INF], {}, [NAN] * 3, [NAN] * 3, INF),
    ([NAN, 0.0], {}, [NAN] * 2, [NAN] * 2, NAN),
    ([NAN, INF], {}, [NAN] * 2, [NAN] * 2, NAN),
    ([NAN], {}, [NAN], [NAN], NAN),
    ([-INF], {}, [NAN], [NAN], -INF),
    ([], {}, [], [], -INF),
    ([NAN, 5.0], {"where": [False, True]}, [0, 1], [-INF, 0], 5),
    ([NAN, INF], {"where": [False, False]}, [0, 0], [-INF] * 2, -INF),
    ([NAN, INF, 0], {"where": [False, True, True]}, [0, NAN, NAN], [-INF, NAN, NAN], INF),
    ([0.0, -INF], {"where": [False, True]}, [0, NAN], [-INF, NAN], -INF),
    ([NAN, INF, 2.0], {"bias": [-INF, -INF, 0]}, [0, 0, 1], [-INF, -INF, 0], None),
    ([1.0, 2.0], {"bias": [-INF, -INF]}, [0, 0], [-INF] * 2, None),
    ([1.0, 2.0, 3], {"bias": [NAN, 0, -INF]}, [NAN, NAN, 0], [NAN, NAN, -INF], None),
    ([-INF, 2.0], {"bias": [INF, 0]}, [NAN] * 2, [NAN] * 2, None),
    ([1.0, 2.0], {"bias": [INF, 0]}, [NAN] * 2, [NAN] * 2, None),
    ([1.0, 2.0], {"bias": [-INF, 0], "where": [True, False]}, [0, 0], [-INF] * 2, None),
]


@every_precision
@every_dtype
def test_special_rows(dtype, precise):
    other = np.array([0.5, 0.25, -1.0], dtype)
    for x, options, y, log_y, lse in SPECIAL:
        x = np.array(x, dtype)
        # The row beside another one, along either axis, with floating-point traps armed.
        pair = np.stack([other[: len(x)], x])
        with np.errstate(all="raise"):
            for function, want in ((reference.softmax, y), (reference.log_softmax, log_y)):
                got = function(x, precise=precise, **options)
                np.testing.assert_array_equal(got, np.array(want, precise), strict=True)
                alone = function(pair[:1], precise=precise, **options)
                got = function(pair, precise=precise, **options)
                np.testing.assert_array_equal(got, np.stack([alone[0], want]).astype(precise))
                options_t = {k: np.array(v)[:, None] for k, v in options.items()}
                got = function(pair.T, 0, precise=precise, **options_t)
                np.testing.assert_array_equal(got[:, 1], want)
            if lse is not None:
                got, sign = reference.logsumexp(x, precise=precise, return_sign=True, **options)
                np.testing.assert_array_equal(got, lse)
                np.testing.assert_array_equal(sign, NAN if np.isnan(lse) else float(lse > -INF))


def test_overflow_of_z():
    big = np.float32(3e38)
    np.testing.assert_array_equal(reference.softmax([big, 0], dtype="f4", temperature=0.5), [1, 0])
    x = np.array([big, 0], np.float32)
    np.testing.assert_array_equal(reference.softmax(x, temperature=0.5), [NAN, NAN])
    np.testing.assert_array_equal(reference.softmax(-x, temperature=0.5), [0, 1])
    # -1e300 is -inf in the compute type: that entry takes no part.
    np.testing.assert_array_equal(reference.softmax(x, bias=[-1e300, 0]), [0, 1])


# --- shapes and axes ------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1, 2, (0, 1), (2, 0), (-1, -2), (0, 1, 2), None, ()])
def test_axes(axis):
    x = np.random.default_rng(3).normal(0, 3, (2, 3, 4))
    axes = range(3) if axis is None else [a % 3 for a in np.atleast_1d(axis).astype(int)]
    # Index lists of the rows: an integer for every axis that is kept.
    kept = [[slice(None)] if a in axes else range(n) for a, n in enumerate(x.shape)]
    grad = np.flip(x)
    results = {
        name: getattr(reference, name)(x, axis) for name in ("softmax", "log_softmax", "softmin")
    }
    back = reference.softmax_backward(grad, x, axis)
    log_back = reference.log_softmax_backward(grad, x, axis)
    lse = reference.logsumexp(x, axis, keepdims=True)
    np.testing.assert_array_equal(lse.ravel(), np.ravel(reference.logsumexp(x, axis)))
    assert lse.shape == tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    for index in product(*kept):
        row = np.ravel(x[index])
        for name, got in results.items():
            np.testing.assert_allclose(np.ravel(got[index]), getattr(reference, name)(row), 1e-14)
        want = reference.softmax_backward(np.ravel(grad[index]), row)
        np.testing.assert_allclose(np.ravel(back[index]), want, rtol=1e-12)
        want = reference.log_softmax_backward(np.ravel(grad[index]), row)
        np.testing.assert_allclose(np.ravel(log_back[index]), want, rtol=1e-12)
        at = tuple(0 if isinstance(i, slice) else i for i in index)
        np.testing.assert_allclose(lse[at], reference.logsumexp(row), rtol=1e-14)


@pytest.mark.parametrize("axis", [None, 0, -1, ()])
def test_zero_dimensions(axis):
    for x in (2.5, np.float32(2.5), np.array(2.5)):
        for function, want in (
            (reference.softmax, 1.0),
            (reference.log_softmax, 0.0),
            (reference.logsumexp, 2.5),
        ):
            got = function(x, axis)
            assert isinstance(got, np.float64) and got == want
    assert reference.softmax(2.5, axis, where=False) == 0
    assert reference.softmax(2.5, axis, bias=0.5, temperature=0.5) == 1
    assert reference.logsumexp(2.5, axis, b=-1, return_sign=True) == (2.5, -1)
    assert reference.softmax_backward(3.0, 1.0, axis) == 0


def test_empty():
    for shape, axis in product([(0,), (0, 3), (3, 0), (2, 0, 4)], [0, -1, None, ()]):
        x = np.ones(shape)
        assert reference.softmax(x, axis).shape == shape
        assert reference.log_softmax(x, axis).shape == shape
        assert reference.softmax_backward(x, x, axis).shape == shape
        want = np.logaddexp.reduce(x, axis) if axis != () else x
        np.testing.assert_array_equal(reference.logsumexp(x, axis), want)
        value, sign = reference.logsumexp(x, axis, b=2.0, return_sign=True)
        np.testing.assert_array_equal(value, want)
        np.testing.assert_array_equal(sign, np.zeros_like(want))
    with pytest.raises(np.exceptions.AxisError):
        reference.softmax(np.ones(3), 1)
    with pytest.raises(ValueError, match="repeated"):
        reference.softmax(np.ones((3, 3)), (0, -2))


def test_broadcasting():
    r = np.random.default_rng(4)
    x = r.normal(size=(2, 3, 4))
    t, bias, where = np.array([[0.5], [1.0], [2.0]]), r.normal(size=4), r.random((3, 1, 1, 4)) < 0.8
    got = reference.softmax(x, temperature=t, bias=bias, where=where[0])
    for i, j in np.ndindex(2, 3):
        want = reference.softmax(x[i, j], temperature=t[j, 0], bias=bias, where=where[0, 0, 0])
        np.testing.assert_array_equal(got[i, j], want)
    got = reference.softmax_backward(x, x, temperature=t)
    want = reference.softmax_backward(x[1, 2], x[1, 2], temperature=2.0)
    np.testing.assert_array_equal(got[1, 2], want)
    for bad in ({"bias": np.ones(3)}, {"where": where}, {"bias": np.ones((2, 2, 3, 4))}):
        with pytest.raises(ValueError, match="broadcast"):
            reference.softmax(x, **bad)
    with pytest.raises(ValueError, match="broadcast"):
        reference.softmax(x, temperature=np.ones((2, 1)))
    with pytest.raises(ValueError, match="length 1 along axis"):
        reference.softmax(x, temperature=np.ones(4))
    with pytest.raises(ValueError, match="length 1 along axis"):
        reference.softmax(x, 1, temperature=t)


# --- logsumexp with weights -----------------------------------------------------------------------


def check_weighted(x, b, precise):
    x, b = np.asarray(x, np.float64), np.asarray(b, np.float64)
    terms = [mpf(w) * mpmath.exp(mpf(v)) for v, w in zip(x, b, strict=True) if w != 0]
    total, size = mpmath.fsum(terms), mpmath.fsum(map(abs, terms))
    got, sign = reference.logsumexp(x, b=b, return_sign=True, precise=precise)
    assert sign == mpmath.sign(total)
    value = mpmath.log(abs(total))
    # Every term has an error; cancellation makes it large beside the sum, as it must.
    scale = max(abs(value), mpf(abs(x).max())) + size / abs(total)
    assert_close(got, [value], precise, scale=scale)
    plain = reference.logsumexp(x, b=b, precise=precise)
    np.testing.assert_array_equal(plain, got if sign > 0 else NAN)


@every_precision
def test_weights(precise):
    r = np.random.default_rng(5)
    for n in (1, 2, 5, 40):
        for scale in (0.1, 3.0, 100.0):
            x, b = r.normal(0, scale, n), r.normal(0, 1, n)
            check_weighted(x, b, precise)
            check_weighted(x + 1e4, abs(b), precise)
            check_weighted(x, b * (r.random(n) < 0.5) + (np.arange(n) == 0), precise)
    check_weighted([300.0, -300.0], [1e-130, 1e130], precise)
    check_weighted([3.0, 3.0], [1.0, -1.0 + 2.0**-40], precise)


@pytest.mark.skipif(np.finfo(WIDE).maxexp < 16384, reason="needs exponents beyond float64's")
def test_weights_over_the_whole_range():
    top, least = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    check_weighted([0.0] * 5, [top, top, top, -top, top], WIDE)
    check_weighted([700.0, -700.0], [1e-300, 1e300], WIDE)
    check_weighted([700.0, -700.0, 3.0], [least, top, -1.0], WIDE)
    check_weighted([0.0, -1400.0], [least, top], WIDE)
    check_weighted([0.0, -1400.0, -1e4], [-least, -least, top], WIDE)


@every_precision
def test_weights_that_cancel(precise):
    r = np.random.default_rng(6)
    x = r.normal(0, 30, 50)
    b = r.normal(0, 1e3, 50)
    order = r.permutation(100)
    x, b = np.concatenate([x, x])[order], np.concatenate([b, -b])[order]
    assert reference.logsumexp(x, b=b, return_sign=True, precise=precise) == (-INF, 0)
    assert reference.logsumexp(x, b=b, precise=precise) == -INF
    assert reference.logsumexp([1.0] * 3, b=[2, -1, -1], return_sign=True) == (-INF, 0)


@pytest.mark.parametrize(
    ("x", "b", "value", "sign"),
    [
        ([NAN, INF, 1.0], [0, 0, 2], 1 + np.log(2), 1),  # 0 hides anything
        ([NAN, INF], [0, -0.0], -INF, 0),
        ([], [], -INF, 0),
        ([-INF, -INF], [1, -1], -INF, 0),
        ([NAN, 1.0], [1, 1], NAN, NAN),
        ([1.0, 1.0], [NAN, 1], NAN, NAN),
        ([INF, 1.0], [2, -1], INF, 1),
        ([INF, 1.0], [-2, 1], INF, -1),
        ([INF, INF], [1, -1], NAN, NAN),
        ([1.0, 2.0], [INF, 1], INF, 1),
        ([-1e4, 2.0], [-INF, 1], INF, -1),  # exp(-1e4) is not 0
        ([-INF, 2.0], [INF, 1], NAN, NAN),  # inf * 0
        ([2.0, 2.0], [INF, -INF], NAN, NAN),
        ([0.0, 0.0], [True, False], 0, 1),
    ],
)
def test_special_weights(x, b, value, sign):
    with np.errstate(all="raise"):
        got = reference.logsumexp(x, b=b, return_sign=True)
        plain = reference.logsumexp(x, b=b)
    np.testing.assert_allclose(got, (value, sign), rtol=1e-15)
    np.testing.assert_array_equal(plain, NAN if sign < 0 else got[0])
    if not np.isnan(x).any() or value == value:
        where = np.array([w != 0 for w in b], bool)
        got = reference.logsumexp(x, b=b, where=where, return_sign=True)
        np.testing.assert_allclose(got, (value, sign), rtol=1e-15)


def test_weights_by_axis():
    r = np.random.default_rng(7)
    x, b = r.normal(size=(2, 3, 4)), r.normal(size=(3, 1))
    for axis in (0, 1, 2, (0, 2), None):
        value, sign = reference.logsumexp(x, axis, b=b, return_sign=True, keepdims=True)
        want = (b * np.exp(x)).sum(axis, keepdims=True)
        np.testing.assert_allclose(sign * np.exp(value), want, rtol=1e-12)
    # b is converted to the compute type first: 1e-300 is 0 in float32, and hides.
    x = np.array([NAN, 1.0], np.float32)
    np.testing.assert_allclose(reference.logsumexp(x, b=[1e-300, 1]), 1)


# --- backward -------------------------------------------------------------------------------------


@every_precision
@every_dtype
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_backward(dtype, precise, temperature):
    r = np.random.default_rng(8)
    inner = F64 if dtype == F64 else F32
    factor = mpf(round_to(Fraction(1 / (temperature or 1)), inner))
    for n in (1, 2, 9, 40):
        x, grad = r.normal(0, 3, n), r.normal(0, 1, n).astype(dtype)
        options = {"temperature": temperature, "precise": precise}

        y = reference.softmax(x).astype(dtype)
        g, p = [mpf(v) for v in grad], [mpf(v) for v in y]
        total = mpmath.fsum(a * b for a, b in zip(g, p, strict=True))
        size = sum(abs(a) for a in g) + 1
        want = [factor * b * (a - total) for a, b in zip(g, p, strict=True)]
        got = reference.softmax_backward(grad, y, **options)
        assert_close(got, want, precise, scale=size * factor)

        y = reference.log_softmax(x).astype(dtype)
        total = mpmath.fsum(g)
        want = [factor * (a - mpmath.exp(mpf(b)) * total) for a, b in zip(g, y, strict=True)]
        got = reference.log_softmax_backward(grad, y, **options)
        assert got.dtype == precise
        assert_close(got, want, precise, scale=size * factor)


def test_backward_of_special_values():
    for bad in (NAN, INF, -INF):
        with np.errstate(all="raise"):
            got = reference.softmax_backward([1.0, 3.0, bad], [0.5, 0.5, 0.0])
            np.testing.assert_array_equal(got, [-0.5, 0.5, 0])
            log_y = [np.log(0.5), np.log(0.5), -INF]
            got = reference.log_softmax_backward([1.0, 3.0, bad], log_y)
            np.testing.assert_allclose(got, [-1, 1, 0], atol=1e-15)
            rows = reference.softmax_backward([[1.0, 3.0], [bad, 0.0]], [[0.5, 0.5]] * 2)
        np.testing.assert_array_equal(rows[0], [-0.5, 0.5])
        assert np.isnan(rows[1, 0]) and not np.isfinite(rows[1, 1])
    np.testing.assert_array_equal(reference.softmax_backward([1.0, 2.0], [NAN, 0.0]), [NAN, 0])
    np.testing.assert_array_equal(reference.softmax_backward([NAN, NAN], [0.0, 0.0]), [0, 0])


def test_backward_compute_type():
    """Only 1/temperature depends on it: float16 and bfloat16 meet in float32."""
    grad, y = np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.25, 0.25])
    third = {F32: float(np.float32(1 / 3)), F64: 1 / 3}
    plain = reference.softmax_backward(grad, y)
    for a, b in product((*FLOATS, np.dtype(int)), FLOATS):
        inner = F32 if {a, b} <= {F16, BF16, F32} else F64
        got = reference.softmax_backward(grad.astype(a), y.astype(b), temperature=3)
        np.testing.assert_allclose(got, third[inner] * plain, rtol=1e-15, err_msg=f"{a} {b}")


# --- ulp_error ------------------------------------------------------------------------------------


@every_dtype
def test_ulp_of_a_number(dtype):
    bits, lowest = FORMATS[dtype]
    one = np.ones((), dtype)
    unit = WIDE(2) ** (1 - bits)
    if dtype == F64 and WIDE is np.float64:
        pytest.skip("np.longdouble is float64 here")
    for true, error in (
        (1.0, 0.0),
        (1 + unit / 4, 0.25),
        (1 + unit, 1.0),
        (1 - unit / 2, 1.0),  # the unit is that of the true value's binade
        (1 - unit / 8, 0.25),
        (1.5, 0.5 / unit),
        (2.0, 0.5 / unit),
        (-1.0, 2 / unit),
    ):
        assert reference.ulp_error(one, true) == error
        assert reference.ulp_error(-one, -WIDE(true)) == error
    least = math.ldexp(1.0, lowest - bits + 1)
    for got, true, units in (
        (0, 0, 0),
        (least, 0, 1),
        (0, least, 1),
        (3 * least, 5 * least, 2),
        (-least, 2 * least, 3),
        (math.ldexp(1.0, lowest), math.ldexp(1.0, lowest) + least, 1),
    ):
        assert reference.ulp_error(np.array(got).astype(dtype), float(true)) == units
    if dtype != F64:
        assert reference.ulp_error(np.zeros((), dtype), least / 4) == 0.25


@every_dtype
def test_ulp_of_special_values(dtype):
    top = float(ml_dtypes.finfo(dtype).max)
    half = Fraction(top) * Fraction(1, 2 ** (FORMATS[dtype][0] + 1))  # less than half an ulp
    values = np.array([NAN, INF, -INF, top, 0.0]).astype(dtype)
    error = reference.ulp_error(values[:, None], values.astype(np.float64))
    np.testing.assert_array_equal(np.diag(error), 0)
    np.testing.assert_array_equal(error[:3][~np.eye(5, dtype=bool)[:3]], INF)
    np.testing.assert_array_equal(error[3:, :3], INF)
    with np.errstate(over="ignore"):
        beyond = WIDE(top) * WIDE(1.5)
    inf = values[1]
    assert reference.ulp_error(inf, beyond) == 0
    assert reference.ulp_error(inf, -beyond) == INF
    if dtype != F64:
        assert reference.ulp_error(inf, top + float(half)) == INF
        assert reference.ulp_error(values[3], top + float(half)) < 0.5


@every_dtype
def test_rounding_is_within_half_an_ulp(dtype):
    """Of every number, in all binades: a property that no other definition of ulp has."""
    bits, lowest = FORMATS[dtype]
    r = np.random.default_rng(9)
    low, high = lowest - bits - 2, 1 - lowest
    true = np.ldexp(r.uniform(-1, 1, 4000).astype(WIDE), r.integers(low, high, 4000))
    with np.errstate(under="ignore"):
        got = (true if dtype == F64 else true.astype(np.float64)).astype(dtype)
    wide = true if dtype == F64 else true.astype(np.float64)
    assert reference.ulp_error(got, wide).max() <= 0.5
    assert reference.ulp_error(got, wide).dtype == np.float64
    np.testing.assert_array_equal(
        reference.ulp_error(got.astype(np.float64), wide, dtype), reference.ulp_error(got, wide)
    )


# --- the module -----------------------------------------------------------------------------------


def test_doctests():
    failed, tried = doctest.testmod(reference)
    assert tried and not failed


def test_it_stands_alone():
    """Neither the compiled core nor ml_dtypes: NumPy and the standard library."""
    with open(reference.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {name.split(".")[0] for name in modules} <= {"functools", "math", "fractions", "numpy"}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "x must be", lambda: reference.softmax([1j])),
        (TypeError, "x must be", lambda: reference.softmax(["a"])),
        (TypeError, "x must be", lambda: reference.softmax(np.array([None]))),
        (TypeError, "x must be", lambda: reference.softmax(np.array(["2020"], "M8[D]"))),
        (TypeError, "where=~mask", lambda: reference.softmax(np.ma.masked_array([1.0]))),
        (TypeError, "where must be bool", lambda: reference.softmax([1.0], where=[1])),
        (TypeError, "pass where=", lambda: reference.softmax([1.0], bias=[True])),
        (TypeError, "dtype must be", lambda: reference.softmax([1.0], dtype=int)),
        (TypeError, "y must be", lambda: reference.softmax_backward([1.0], [1j])),
        (ValueError, "same shape", lambda: reference.softmax_backward([1.0], [1.0, 2.0])),
        *(
            (ValueError, "temperature", lambda t=t: reference.softmax([1.0], temperature=t))
            for t in (0, -1.0, NAN, INF, -INF, 5e-324)
        ),
        # 1/1e-300 is inf, 1/1e300 is 0 in float32.
        (ValueError, "finite", lambda: reference.softmax(np.float32([1]), temperature=1e-300)),
        (ValueError, "finite", lambda: reference.softmax(np.float32([1]), temperature=1e300)),
    ],
)
def test_wrong_arguments(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.skipif(np.finfo(np.longdouble).nmant == 52, reason="longdouble is float64 here")
def test_longdouble_is_not_accepted():
    with pytest.raises(TypeError, match="x must be"):
        reference.softmax(np.ones(2, np.longdouble))
