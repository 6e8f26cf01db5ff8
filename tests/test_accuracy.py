"""Errors in ulp against an oracle with 64-bit mantissas (mpmath for a sample). Bounds: DESIGN 4.

The true result is the softmax of z, the logits in the compute type after temperature and bias.
"""

import itertools
from functools import lru_cache

import mpmath
import numpy as np
import pytest
from common import (
    BF16,
    F16,
    F32,
    F64,
    HALVES,
    SINGLES,
    SMALLEST_SUBNORMAL,
    WIDE,
    dtype_id,
    normal,
    rng,
)

import fastsoftmax as fs
from fastsoftmax import _core, reference

# exp (0.63) + sum (0) + one rounding more than ideal when normalising, doubled by the binade.
PUBLISHED = 2.0
# exp's error, 1.5 at the most (src_c/exp.inc.h), at the numerator and, with the other sign, at
# every term that makes the sum, and 0.5 of normalising. The worst row that was found has 3.26.
CRAFTED = 3.5
# The float32 result rounded once more: 0.5 + 2 ulp of float32, which is 2^-12 ulp of float16.
HALF = 0.51
# log_softmax = z - m - log(sum), logsumexp = m + log(sum): in ulp of the largest term.
LOG = 2.0
# A result near 0 has its own ulp: log1p of the rest is taken from the exact sum.
DOMINATING = 4.0
DOMINATING_ABS_PER_ENTRY = 2.0**-45
# The integer sum is exact: what is left is each entry's own rounding.
SUM_OF_ROW = 4 * 2.0**-24
# Sums of n products in float32/float64, relative to the magnitudes that are added.
BACKWARD = 8.0

WIDE_ENOUGH = np.finfo(WIDE).nmant >= 63
needs_wide = pytest.mark.skipif(not WIDE_ENOUGH, reason="np.longdouble is float64 here")
# The dtypes whose errors can be measured: float64 needs an oracle wider than itself.
MEASURABLE = [F32, pytest.param(F64, marks=needs_wide)]

LENGTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 100, 128, 255, 320, 1000, 1024, 4097, 20_000)
LONG = (128_256, 1_000_000)


def spacing(value, dtype):
    """One ulp of `dtype` at `value` (in WIDE): the distance between its neighbours there."""
    dtype = np.dtype(dtype)
    digits = {F16: 11, BF16: 8, F32: 24, F64: 53}[dtype]
    _, exponent = np.frexp(np.abs(value).astype(WIDE))
    return np.maximum(np.ldexp(WIDE(1), exponent - digits), WIDE(SMALLEST_SUBNORMAL[dtype]))


def few_values(shape, r):
    return r.choice(r.normal(0, 5, 4), shape)


def two_scales(shape, r):
    x = r.normal(0, 0.1, shape)
    return np.where(r.random(shape) < 0.5, x, 100 * x)


def spike(shape, r):
    """One entry far above many small ones: most of the sum is in the tail's last bits."""
    x = r.normal(-12, 1, shape)
    x[..., 0] = 0
    return x


DISTRIBUTIONS = {
    **{
        f"scale {s:g}": lambda shape, r, s=s: r.normal(0, s, shape) for s in (0.1, 1, 10, 100, 1000)
    },
    **{
        f"offset {o:g}": lambda shape, r, o=o: r.normal(0, 3, shape) + o
        for o in (100, -3000, 1e5, -5e5, 1e6, 1e8, 1e30)
    },
    "uniform 100": lambda shape, r: r.uniform(-100, 0, shape),
    "spread at 1e30": lambda shape, r: r.normal(0, 1e30, shape),
    "constant": lambda shape, r: np.full(shape, r.normal(0, 100)),
    "few values": few_values,
    "two scales": two_scales,
    "spike": spike,
}
FIT_FOR_HALVES = ("scale 0.1", "scale 10", "scale 100", "offset 100", "offset -3000", "constant",
                  "few values", "two scales", "spike")  # fmt: skip


@lru_cache(maxsize=4)
def rows(name, dtype, lengths):
    """[(x, softmax(x) in WIDE)] for every length; several short rows, one long one."""
    r = rng(name, lengths)
    xs = [DISTRIBUTIONS[name]((max(1, min(64, 8192 // n)), n), r).astype(dtype) for n in lengths]
    return [(x, reference.softmax(x, precise=WIDE)) for x in xs]


@lru_cache(maxsize=1)
def logarithms_of_rows(name, dtype):
    """[(x, log_softmax(x), logsumexp(x))] of the same rows, both in WIDE."""
    xs = [x for x, _ in rows(name, dtype, LENGTHS)]
    return [
        (x, reference.log_softmax(x, precise=WIDE),
         reference.logsumexp(x, axis=-1, keepdims=True, precise=WIDE))
        for x in xs
    ]  # fmt: skip


@lru_cache(maxsize=1)
def millions_of_tiny_terms(dtype):
    """Terms halfway between two multiples of 2^-44: what is dropped never cancels."""
    x = np.full(5_000_000, np.log(1.49 * 2.0**-44), dtype)
    x[1_000_000] = 0
    few = np.exp(x[:1].astype(WIDE))  # a row of two values: its softmax in closed form
    true = np.array([1, few[0]]) / (1 + (x.size - 1) * few)
    return x, true


# --- softmax --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_published_distributions(isa, dtype, name, record_max):
    for x, true in rows(name, dtype, LENGTHS):
        errors = reference.ulp_error(fs.softmax(x), true, dtype)
        record_max(f"softmax {dtype.name}, published", errors, PUBLISHED, (name, x.shape))


@pytest.mark.parametrize("name", ["scale 1", "scale 10", "offset 1e+06", "few values", "constant"])
@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_published_distributions_long_rows(isa, dtype, name, record_max):
    for x, true in rows(name, dtype, LONG):
        got = fs.softmax(x)
        errors = reference.ulp_error(got, true, dtype)
        record_max(f"softmax {dtype.name}, long rows", errors, PUBLISHED, (name, x.shape))
        total = float(abs(got.sum(dtype=WIDE) - 1))
        record_max("|sum - 1|, n up to 1e6", total * 2**24, SUM_OF_ROW * 2**24, name, "* 2^-24")


@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_millions_of_tiny_terms(isa, dtype, record_max):
    """Past 2^20 entries what each one drops from a sum in multiples of 2^-44 would be seen."""
    x, true = millions_of_tiny_terms(dtype)
    got = fs.softmax(x)
    errors = reference.ulp_error(got[[1_000_000, 0]], true, dtype)
    assert np.count_nonzero(got == got[0]) == x.size - 1
    record_max(f"softmax {dtype.name}, long rows", errors, PUBLISHED, "tiny terms")


@pytest.mark.parametrize("name", FIT_FOR_HALVES)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_halves(isa, dtype, name, record_max):
    for x, true in rows(name, dtype, LENGTHS):
        errors = reference.ulp_error(fs.softmax(x), true, dtype)
        record_max(f"softmax {dtype.name}", errors, HALF, (name, x.shape))


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_halves_exhaustively(isa, dtype, record_max):
    """Every finite half beside every other one that is some distance away."""
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = x[np.isfinite(x)]
    pairs = np.stack([x, np.roll(x, 1), np.roll(x, 1000)], axis=-1)
    true = reference.softmax(pairs, precise=np.float64)
    errors = reference.ulp_error(fs.softmax(pairs), true, dtype)
    record_max(f"softmax {dtype.name}, all values", errors, HALF)


@pytest.mark.parametrize("dtype", SINGLES, ids=dtype_id)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_against_mpmath(isa, dtype, n, record_max):
    """An oracle of which not one line is ours."""
    for scale in (1.0, 50.0, 700.0):
        x = normal(n, dtype, scale, "mpmath")
        with mpmath.workdps(60):
            exps = [mpmath.exp(mpmath.mpf(float(v))) for v in x]
            true = [e / mpmath.fsum(exps) for e in exps]
            for got, want in zip(fs.softmax(x), true, strict=True):
                _, exponent = mpmath.frexp(want)
                digits = np.finfo(dtype).nmant + 1
                ulp = mpmath.ldexp(1, max(exponent - digits, np.finfo(dtype).minexp - digits + 1))
                error = abs(mpmath.mpf(float(got)) - want) / ulp
                record_max(f"softmax {dtype.name}, mpmath", float(error), PUBLISHED, (n, scale))


# --- crafted worst cases: few-valued rows ---------------------------------------------------------


def few_valued_errors(values, counts, dtype):
    """Largest error of each row that holds values[i, j] counts[i, j] times, the max included."""
    n = counts.sum(axis=1).max()
    order = np.minimum(np.cumsum(counts, axis=1), n)
    x = np.full((len(values), n), -np.inf, dtype)  # -inf pads: its exp is exactly 0
    column = np.arange(n)
    for j in reversed(range(values.shape[1])):
        np.copyto(x, values[:, j, None], where=column < order[:, j, None])
    wide = values.astype(WIDE)
    exps = np.exp(wide - wide.max(axis=1, keepdims=True))
    true = exps / (exps * counts).sum(axis=1, keepdims=True)
    got = fs.softmax(x)[np.arange(len(x))[:, None], order - 1]
    return reference.ulp_error(got, true, dtype).max(axis=1)


def worst_of_exp(dtype, isa):
    """Arguments in [-4, 0] where exp is most too large, and where it is most too small."""
    hook = _core._exp32 if dtype == F32 else _core._exp64
    x = np.sort(rng("worst of exp").uniform(-4, 0, 400_000).astype(dtype))
    true = np.exp(x.astype(WIDE))
    relative = (hook(x, isa).astype(WIDE) - true) / true
    order = np.argsort(relative)
    return x[order[-24:]], x[order[:24]]


@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_many_entries_with_the_same_error(isa, dtype, record_max):
    """The sum is made of entries whose exp errs one way, one entry's exp errs the other way."""
    high, low = worst_of_exp(dtype, isa)
    for many, single in ((high, low), (low, high)):
        many, single, count = (g.ravel() for g in np.meshgrid(many, single, np.arange(1, 160, 7)))
        values = np.stack([np.zeros_like(many), many, single], axis=1)
        counts = np.stack([np.ones_like(count), count, np.ones_like(count)], axis=1)
        for step in range(0, len(values), 4096):
            part = slice(step, step + 4096)
            errors = few_valued_errors(values[part], counts[part], dtype)
            record_max(f"softmax {dtype.name}, crafted", errors, CRAFTED)


@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
@pytest.mark.parametrize("offset", [0, 17.3, -1000, 3e5, 7e5])
def test_climb_to_the_worst_row(isa, dtype, offset, record_max):
    """Random few-valued rows; keep the worst, change a little, repeat: a search for the bound."""
    r = rng("climb", offset)
    values = (offset + r.uniform(-6, 0, (4000, 3))).astype(dtype)
    counts = r.integers(1, 33, (4000, 3))
    for _ in range(6):
        errors = few_valued_errors(values, counts, dtype)
        record_max(f"softmax {dtype.name}, crafted", errors, CRAFTED, offset)
        best = np.argsort(errors)[-200:].repeat(20)
        values, counts = values[best], counts[best]
        nudge = r.integers(-3, 4, values.shape) * np.spacing(values)
        values = (values + nudge).astype(dtype)
        counts = np.clip(counts + r.integers(-2, 3, counts.shape), 1, 40)


def test_the_worst_exp_of_a_row(isa, record_max):
    """exp is off one way at the numerator, and the other way at nearly all terms of the sum: |x|
    below 1/4 with a maximum that is not 0, and exps just above 2^n / sqrt 2.
    """
    for largest, target, many, count in (
        ("0x1.b204aep-3", "-0x1.13fe66p-3", "-0x1.033932p-3", 16_266),
        ("0x1.25d472p-1", "0x1.d332fep-3", "0x1.f233f2p-3", 32_397),
    ):
        values = [float.fromhex(text) for text in (largest, target, many)]
        x = np.repeat(np.array(values, F32), (1, 1, count))
        true = reference.softmax(x, precise=WIDE)
        error = np.abs(fs.softmax(x).astype(WIDE) - true) / spacing(true, F32)
        record_max("softmax float32, crafted", error, CRAFTED, count)


# --- log_softmax and logsumexp --------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_logarithms(isa, dtype, name, record_max):
    for x, log_softmax, logsumexp in logarithms_of_rows(name, dtype):
        m = np.abs(x.max(axis=-1, keepdims=True))
        for got, true, what in (
            (fs.log_softmax(x), log_softmax, "log_softmax"),
            (fs.logsumexp(x, axis=-1, keepdims=True), logsumexp, "logsumexp"),
        ):
            unit = spacing(np.maximum(np.maximum(m, 1), np.abs(true)), dtype)
            errors = np.abs(got.astype(WIDE) - true) / unit
            record_max(f"{what} {dtype.name}", errors, LOG, (name, x.shape), "ulp of the scale")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("name", ["scale 1", "scale 10", "scale 100", "constant", "spike"])
def test_logarithms_halves(isa, dtype, name, record_max):
    """Half an ulp of their own, and the float32 bound."""
    for x, true, _ in logarithms_of_rows(name, dtype):
        m = np.abs(x.max(axis=-1, keepdims=True))
        slack = LOG * spacing(np.maximum(np.maximum(m, 1), np.abs(true)), F32)
        errors = np.abs(fs.log_softmax(x).astype(WIDE) - true) - slack
        record_max(f"log_softmax {dtype.name}", errors / spacing(true, dtype), 0.5 + 2**-10, name)


@lru_cache(maxsize=1)
def dominated_rows(n):
    """[(gap, x, log_softmax in WIDE of its largest entry, the one in the middle)]."""
    gaps, tops = (0.5, 3.0, 8.0, 12.0, 16.0, 17.5, 25.0), (0.25, -5.3, 97.1, -801.7, 1023.9, 4e4)
    found = []
    for gap, top in itertools.product(gaps, tops):
        x = normal(n, F32, 0.5, "dominating", gap) - np.float32(gap + np.log(n) - top)
        x[n // 2] = top
        found.append((gap, x, reference.log_softmax(x, precise=WIDE)[n // 2]))
    return found


@pytest.mark.parametrize("n", [2, 3, 9, 16, 50, 300, 5000, 70_000])
def test_dominating_entry_of_log_softmax(isa, n, record_max):
    """log_softmax of the largest entry is -log1p(rest): tiny, and right in its own ulp.

    Wherever the row lies: exp of the maximum must be 1 to the last bit, on both sides of the
    switch in its reduction at 1024.
    """
    for gap, x, true in dominated_rows(n):
        got = fs.log_softmax(x)[n // 2]
        error = abs(got.astype(WIDE) - true) - n * DOMINATING_ABS_PER_ENTRY
        error = np.maximum(error, 0) / spacing(true, F32)
        record_max("log_softmax float32, dominating entry", error, DOMINATING, (n, gap))


# --- temperature and bias -------------------------------------------------------------------------


@lru_cache(maxsize=1)
def fused(dtype, temperature):
    """[(x, bias, softmax in WIDE)]."""
    scale = 10.0 * min(temperature or 1, 1e3)
    found = []
    for n in (1, 7, 64, 333):
        x = normal((20, n), dtype, scale, "fused")
        for bias in (None, normal((20, n), dtype, 3.0, "bias"), normal(n, np.float64, 3.0, "bias")):
            true = reference.softmax(x, bias=bias, temperature=temperature, precise=WIDE)
            found.append((x, bias, true))
    return found


@pytest.mark.parametrize("temperature", [None, 0.07, 0.125, 1.7, 3, 1e-4, 1e3])
@pytest.mark.parametrize("dtype", [*HALVES, *MEASURABLE], ids=dtype_id)
def test_temperature_and_bias_are_fused_with_one_rounding(isa, dtype, temperature, record_max):
    """z = fma(x, 1/T, bias) in the compute type: the softmax of z, without rounding x/T first."""
    bound = HALF if dtype in HALVES else PUBLISHED
    for x, bias, true in fused(dtype, temperature):
        got = fs.softmax(x, bias=bias, temperature=temperature)
        errors = reference.ulp_error(got, true, dtype)
        record_max(f"softmax {dtype.name}, fused", errors, bound, (temperature, x.shape))


# --- backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1, 10, 100])
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("dtype", MEASURABLE, ids=dtype_id)
def test_backward(isa, dtype, temperature, scale, record_max):
    unit = BACKWARD * np.finfo(dtype).epsneg  # 2^-24 or 2^-53
    r = WIDE(1) if temperature is None else WIDE(dtype.type(1 / temperature))
    for n in (1, 2, 8, 17, 64, 300, 4096, 40_000):
        shape = max(1, min(32, 4096 // n)), n
        x, grad = normal(shape, dtype, scale, "x"), normal(shape, dtype, 1.0, "grad")
        g = grad.astype(WIDE)
        for function, oracle, forward, weight in (
            (fs.softmax_backward, reference.softmax_backward, reference.softmax, lambda y: y),
            (
                fs.log_softmax_backward,
                reference.log_softmax_backward,
                reference.log_softmax,
                np.exp,
            ),
        ):
            y = forward(x, precise=WIDE).astype(dtype)
            w = weight(y.astype(WIDE))
            true = oracle(grad, y, temperature=temperature, precise=WIDE)
            got = function(grad, y, temperature=temperature).astype(WIDE)
            if function is fs.softmax_backward:
                size = w * (np.abs(g) + (np.abs(g) * w).sum(-1, keepdims=True))
            else:
                size = np.abs(g) + w * np.abs(g).sum(-1, keepdims=True)
            error = np.abs(got - true) - SMALLEST_SUBNORMAL[dtype]
            errors = np.maximum(error, 0) / np.where(error > 0, unit * r * size, 1)
            what = f"{function.__name__} {dtype.name}"
            record_max(what, BACKWARD * errors, BACKWARD, (n, scale), "half-ulp of the terms")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_backward_of_halves_is_the_float32_result_rounded(isa, dtype):
    grad, x = normal((9, 70), dtype, 1.0, "grad"), normal((9, 70), dtype, 2.0)
    for function, forward in (
        (fs.softmax_backward, fs.softmax),
        (fs.log_softmax_backward, fs.log_softmax),
    ):
        y = forward(x)
        want = function(grad.astype(F32), y.astype(F32)).astype(dtype)
        assert np.array_equal(function(grad, y), want), function.__name__
