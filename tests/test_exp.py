"""The internal exp of x <= 0, alone: the one function whose error enters every result."""

from functools import lru_cache

import numpy as np
import pytest
from common import ISAS, WIDE, assert_same_bits, rng

from fastsoftmax import _core

# Relative error of a normal result, in units of half an ulp at the bottom of a binade (2^-24,
# 2^-53): half an ulp for the last rounding, the rest for the polynomial and the reduction.
EXP32 = 1.25
EXP64 = 1.25
# A subnormal result is rounded a second time: half a unit more than the smallest normal's error.
SUBNORMAL = 0.5 + EXP32 / 2

# exp(-104) < 2^-150: everything from here down rounds to 0 in float32. float64: exp(-746).
LAST32, LAST64 = np.float32(-104), -746.0
# The bit patterns of [-104, -0] are consecutive integers.
PATTERNS = range(0x80000000, int(LAST32.view(np.uint32)) + 1)
# A step that is odd, so that the sample sees every value of the low bits.
SAMPLE = 257

needs_wide = pytest.mark.skipif(np.finfo(WIDE).nmant < 63, reason="np.longdouble is float64 here")


def float32_of(patterns):
    return np.arange(patterns.start, patterns.stop, patterns.step, dtype=np.uint32).view(np.float32)


@lru_cache(maxsize=1)
def sample32():
    x = float32_of(PATTERNS[::SAMPLE])
    return x, np.exp(x, dtype=np.float64)  # 29 bits to spare


@lru_cache(maxsize=1)
def sample64():
    r = rng("exp64")
    ln2 = np.log(WIDE(2))
    # Uniform in value, uniform in exponent, and where the reduction changes its integer.
    uniform = r.uniform(LAST64, 0, 400_000)
    tiny = -np.ldexp(r.uniform(0.5, 1, 100_000), r.integers(-60, 10, 100_000))
    edges = (-np.arange(0, 2152) * ln2 / 2).astype(np.float64)
    edges = np.concatenate([edges + k * np.spacing(edges) for k in range(-3, 4)])
    x = np.concatenate([uniform, tiny, edges])
    x = x[(x >= LAST64) & (x <= 0)]
    return x, np.exp(x.astype(WIDE))


def check(got, x, true, bounds, record_max, name):
    info = np.finfo(got.dtype)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert got.min() >= 0 and got.max() <= 1, "exp of x <= 0 must lie in [0, 1]: sums count on it"
    error = np.abs(got.astype(true.dtype) - true)
    normal = true >= info.smallest_normal
    record_max(name, error[normal] / true[normal] / info.epsneg, bounds, unit="* eps/2, relative")
    subnormal = error[~normal] / true.dtype.type(info.smallest_subnormal)
    record_max(f"{name}, subnormal results", subnormal, SUBNORMAL, unit="of the smallest")


def test_exp32_sample(isa, record_max):
    x, true = sample32()
    check(_core._exp32(x, isa), x, true, EXP32, record_max, "exp float32, 1/256 of all")


@pytest.mark.full
def test_exp32_every_float(record_max):
    chunk = 1 << 23
    for start in range(PATTERNS.start, PATTERNS.stop, chunk):
        x = float32_of(range(start, min(start + chunk, PATTERNS.stop)))
        got = _core._exp32(x, ISAS[0])
        check(got, x, np.exp(x, dtype=np.float64), EXP32, record_max, "exp float32, all")
        for other in ISAS[1:]:
            assert_same_bits(_core._exp32(x, other), got, other)


@needs_wide
def test_exp64_sample(isa, record_max):
    x, true = sample64()
    check(_core._exp64(x, isa), x, true, EXP64, record_max, "exp float64")


def test_every_isa_gives_the_same_bits(isa):
    for hook, (x, _) in ((_core._exp32, sample32()), (_core._exp64, sample64())):
        assert_same_bits(hook(x, isa), hook(x, "scalar"), isa)


def test_lengths(isa):
    """A tail of a vector gives the same bits as its middle."""
    for hook, (x, _) in ((_core._exp32, sample32()), (_core._exp64, sample64())):
        x = x[1000 : 1000 + 70 * 5000 : 5000].copy()
        for n in range(len(x)):
            assert_same_bits(hook(x[:n], isa), hook(x, isa)[:n], (isa, n))


def test_exact_at_zero(isa):
    """The row's largest entry has e = 1 exactly."""
    for hook, dtype in ((_core._exp32, np.float32), (_core._exp64, np.float64)):
        got = hook(np.array([0.0, -0.0] * 9, dtype), isa)
        assert_same_bits(got, np.ones(18, dtype), isa)


def test_zero_far_below(isa):
    """-inf and everything below the last subnormal give exactly +0."""
    patterns = range(PATTERNS.stop, 0xFF800000 + 1, 4099)
    x = np.concatenate([float32_of(patterns), np.array([-np.inf, -3.4e38], np.float32)])
    assert_same_bits(_core._exp32(x, isa), np.zeros_like(x), isa)
    x = -np.geomspace(746, 1.7e308, 1000)
    x = np.concatenate([x, [-np.inf, -np.finfo(np.float64).max]])
    assert_same_bits(_core._exp64(x, isa), np.zeros_like(x), isa)


def test_subnormals_are_not_flushed(isa):
    """Every subnormal power of two that exp can reach is there, and so are arguments near 0."""
    for hook, dtype in ((_core._exp32, np.float32), (_core._exp64, np.float64)):
        info = np.finfo(dtype)
        # At -k ln2, for 2^-k subnormal: the result is within one unit of 2^-k.
        k = np.arange(-info.minexp + 1, -info.minexp + info.nmant + 1)
        x = (-k * np.log(WIDE(2))).astype(dtype)
        want = np.ldexp(dtype(1), -k)
        assert want.all()
        got = hook(x, isa)
        assert (np.abs(got - want) <= 0.51 * want + info.smallest_subnormal).all(), (isa, dtype)
        assert got.all()
        tiny = -np.array([info.smallest_subnormal, info.smallest_normal, 1e-30], dtype)
        assert_same_bits(hook(tiny, isa), np.ones(3, dtype), isa)
