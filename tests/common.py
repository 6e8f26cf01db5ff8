"""Plain helpers that every test file may import: dtypes, bits, buffers beside a guard page.

Fixtures (``isa``, ``record_max``, ``threads``) live in conftest.py.
"""

import ctypes
import functools
import mmap
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax as fs
from fastsoftmax import _core, reference

# --- instruction sets and dtypes ------------------------------------------------------------------

KNOWN_ISAS = ("scalar", "avx2", "avx512", "amx", "neon")
ISAS = tuple(fs.available_isas())
use_isa = _core._use_isa

F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
HALVES = (F16, BF16)
SINGLES = (F32, F64)
FLOATS = HALVES + SINGLES

# The canonical quiet NaN of each type: positive, top payload bit only; the bits of np.nan.
CANONICAL_NAN = {F16: 0x7E00, BF16: 0x7FC0, F32: 0x7FC00000, F64: 0x7FF8000000000000}
EPSILON = {F16: 2.0**-10, BF16: 2.0**-7, F32: 2.0**-23, F64: 2.0**-52}
SMALLEST_SUBNORMAL = {F16: 2.0**-24, BF16: 2.0**-133, F32: 2.0**-149, F64: 2.0**-1074}

# The softmax family: functions of (x, axis) whose result has x's shape.
FAMILY = (fs.softmax, fs.log_softmax, fs.softmin)
PUBLIC = (
    "softmax",
    "log_softmax",
    "softmin",
    "logsumexp",
    "softmax_backward",
    "log_softmax_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "attention",
    "attention_backward",
    "attention_varlen",
    "merge_attention",
    "set_num_threads",
    "get_num_threads",
    "num_threads",
    "isa",
    "available_isas",
    "show_config",
    "get_include",
)

# np.longdouble is wider than float64 only where the hardware has x87 (or a software quad).
WIDE = np.longdouble if np.finfo(np.longdouble).nmant >= 63 else np.float64


every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
the_family = pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)


def compute_type(dtype):
    """The type the arithmetic runs in: float32 for the halves and itself, float64 for the rest."""
    return F32 if dtype in (*HALVES, F32) else F64


def dtype_id(dtype):
    return np.dtype(dtype).name


# --- bits -----------------------------------------------------------------------------------------


def bits(a):
    """The bit patterns of an array (or NumPy scalar) as unsigned integers of the same shape."""
    a = np.asarray(a)
    # Not ascontiguousarray, which turns 0-d into 1-d.
    return a.copy(order="C").view(f"u{a.dtype.itemsize}")


def assert_same_bits(got, want, what=""):
    """The same dtype, shape and bit patterns: NaN equals NaN, +0 does not equal -0."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    differ = bits(got) != bits(want)
    if differ.any():
        at = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(differ)))
        pair = np.atleast_1d(got)[at], np.atleast_1d(want)[at]
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.size} elements differ, "
            f"first at {at}: got {pair[0]!r}, expected {pair[1]!r}"
        )


def assert_canonical_nan(a, what=""):
    """Every element is the one canonical quiet NaN."""
    a = np.asarray(a)
    wrong = bits(a) != CANONICAL_NAN[a.dtype]
    assert not wrong.any(), f"{what}: not the canonical NaN: {[hex(b) for b in bits(a)[wrong][:4]]}"


def assert_plus_zero(a, what=""):
    """Every element is +0, not -0 and not a tiny number."""
    assert not bits(a).any(), f"{what}: not all +0: {np.asarray(a)!r}"


# --- buffers --------------------------------------------------------------------------------------


class GuardedPages:
    """`size` bytes between two pages that nobody may touch.

    ``array(shape, dtype, at="end")`` carves out an array whose last byte is the last byte before
    the upper guard page, ``at="start"`` one whose first byte follows the lower one: a kernel which
    reads or writes one byte too many dies with SIGSEGV (pytest's faulthandler names the test).
    """

    def __init__(self, size=1 << 16):
        page = mmap.PAGESIZE
        self._size = -(-size // page) * page
        self._map = mmap.mmap(-1, self._size + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for guard in (base, base + page + self._size):
            if libc.mprotect(guard, page, 0):  # PROT_NONE
                raise OSError(ctypes.get_errno(), "mprotect failed")
        self._bytes = np.frombuffer(self._map, np.uint8, self._size, offset=page)

    def array(self, shape, dtype, at="end", order="C"):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        assert size <= self._size, "GuardedPages is too small for this test"
        start = self._size - size if at == "end" else 0
        return self._bytes[start : start + size].view(dtype).reshape(shape, order=order)

    def copy_of(self, a, at="end", order="C"):
        """A copy of `a` beside the guard page."""
        guarded = self.array(a.shape, a.dtype, at, order)
        guarded[...] = a
        return guarded


def unaligned(a):
    """A copy of `a` whose data starts at an odd address."""
    raw = np.empty(a.nbytes + 1, np.uint8)
    raw = raw[1 - raw.ctypes.data % 2 :][: a.nbytes]
    copy = raw.view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def rng(*key):
    """A generator that depends on the names and numbers given and on nothing else."""
    return np.random.default_rng(np.frombuffer(repr(key).encode(), np.uint8))


def normal(shape, dtype, scale=3.0, *key):
    """Gaussian logits of a dtype, the same in every run."""
    values = scale * rng("normal", np.shape(shape) or shape, scale, *key).standard_normal(shape)
    return values.astype(dtype)


# --- attention ------------------------------------------------------------------------------------

KEY_BLOCK = 64  # keys that the kernel takes at once
QUERY_BLOCKS = (24, 48)  # and queries


class Size(NamedTuple):
    """The lengths of an attention problem."""

    lead: tuple = (2,)
    heads: int = 4
    kv_heads: int = 2
    queries: int = 53
    keys: int = 70
    depth: int = 9
    v_depth: int = 5

    @property
    def scores(self):
        return (*self.lead, self.heads, self.queries, self.keys)

    def qkv(self, dtype, *key, scale=1.5):
        """Gaussian q, k and v, the same in every run."""
        shapes = (
            (*self.lead, self.heads, self.queries, self.depth),
            (*self.lead, self.kv_heads, self.keys, self.depth),
            (*self.lead, self.kv_heads, self.keys, self.v_depth),
        )
        return [normal(s, dtype, scale, n, *key) for n, s in zip("qkv", shapes, strict=True)]


def _random_bias(r, n):
    return np.where(r.random(n.scores) < 0.3, -np.inf, r.normal(0, 2, n.scores))


# Every option of attention in several forms: functions of a generator and a Size.
ATTENTION_OPTIONS = {
    "mask": {
        "full": lambda r, n: r.random(n.scores) < 0.7,
        "[.., 1, 1, K]": lambda r, n: r.random((*n.lead, 1, 1, n.keys)) < 0.7,
        "[Q, K]": lambda r, n: r.random((n.queries, n.keys)) < 0.3,
        "[H, Q, 1]": lambda r, n: r.random((n.heads, n.queries, 1)) < 0.7,
    },
    "bias": {
        "full": lambda r, n: r.normal(0, 2, n.scores).astype(F32),
        "-inf here and there": _random_bias,
        "float16 [H, 1, K]": lambda r, n: r.normal(0, 2, (n.heads, 1, n.keys)).astype(F16),
        "bfloat16 [Q, K]": lambda r, n: r.normal(0, 2, (n.queries, n.keys)).astype(BF16),
        "int [K]": lambda r, n: r.integers(-3, 4, n.keys),
    },
    "is_causal": {"": lambda r, n: True},
    "q_offset": {
        "K - Q": lambda r, n: n.keys - n.queries,
        "-7": lambda r, n: -7,
        "array": lambda r, n: r.integers(-n.queries, n.keys + 1, n.lead),
    },
    "kv_lengths": {
        "int": lambda r, n: n.keys * 2 // 3,
        "array": lambda r, n: r.integers(0, n.keys + 1, n.lead),
        "0": lambda r, n: 0,
    },
    "window": {
        "both": lambda r, n: (n.keys // 4, 3),
        "left": lambda r, n: (5, None),
        "right": lambda r, n: [None, 2],
        "itself": lambda r, n: (0, 0),
        "open": lambda r, n: (None, None),
    },
    "scale": {
        "0.3": lambda r, n: 0.3,
        "negative": lambda r, n: np.float32(-0.2),
        "0": lambda r, n: 0,
    },
    "softcap": {"2.5": lambda r, n: 2.5, "30": lambda r, n: 30},
    "sinks": {
        "normal": lambda r, n: r.normal(0, 2, n.heads).astype(F32),
        "some -inf": lambda r, n: np.where(r.random(n.heads) < 0.5, -np.inf, r.normal(0, 2)),
    },
    "alibi_slopes": {
        "powers": lambda r, n: 2.0 ** -np.arange(1, n.heads + 1),
        "any sign": lambda r, n: r.normal(0, 0.1, n.heads).astype(F16),
    },
}  # fmt: skip


def some_option(name, r, size):
    """An option of attention, in a form drawn from those that it has."""
    forms = list(ATTENTION_OPTIONS[name].values())
    return forms[r.integers(len(forms))](r, size)


def _with_heads(a):
    return a if a.ndim > 2 else a[None]


def _positions(n_queries, q_offset):
    """[.., 1, Q, 1]: the position of each query."""
    return np.arange(n_queries)[:, None] + np.asarray(q_offset)[..., None, None, None]


def visible_keys(
    q, k, v, *, mask=None, bias=None, is_causal=False, q_offset=0, kv_lengths=None, window=None, **_
):
    """Which keys each query may see, bool [.., H, Q, K] ([1, Q, K] for 2-D): the contract again."""
    q, k, v = map(_with_heads, (q, k, v))
    lead = np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    j, p = np.arange(k.shape[-2]), _positions(q.shape[-2], q_offset)
    seen = np.ones((*lead, *q.shape[-3:-1], k.shape[-2]), bool)
    if mask is not None:
        seen &= mask
    if bias is not None:
        with np.errstate(over="ignore"):
            seen &= np.asarray(bias).astype(compute_type(q.dtype)) != -np.inf
    if is_causal:
        seen &= j <= p
    if kv_lengths is not None:
        seen &= j < np.asarray(kv_lengths)[..., None, None, None]
    left, right = window or (None, None)
    if left is not None:
        seen &= j >= p - left
    if right is not None:
        seen &= j <= p + right
    return seen


class Attention:
    """A call of attention, what is true of its results and how far from that they may be."""

    def __init__(self, q, k, v, **options):
        self.arrays, self.options, self.dtype = (q, k, v), options, q.dtype
        asked = {**options, "return_lse": True, "return_weights": True}
        precise = WIDE if q.dtype == F64 else np.float64
        with np.errstate(all="ignore"):
            self.true = reference.attention(q, k, v, **asked, precise=precise)
            self.bounds = reference.attention_bound(q, k, v, **asked)

    @functools.cached_property
    def size(self):
        """sum_j w_j |v_j|, which errors of out are measured by."""
        q, k, v = self.arrays
        with np.errstate(all="ignore"):
            return reference.attention(q, k, np.abs(v), **self.options)

    def check(self, record_max, name, what="", results=None, slack=None):
        """Run the call, or take its (out, lse, weights), and compare with what is true.

        Halves may be off by an ulp of theirs more, and everything by what a sum of subnormal
        numbers loses. ``slack`` gives the bounds more room.
        """
        if results is None:
            results = fs.attention(
                *self.arrays, **self.options, return_lse=True, return_weights=True
            )
        inner = compute_type(self.dtype)
        v = np.abs(self.arrays[2].astype(F64))
        tiny = SMALLEST_SUBNORMAL[inner] * (1 + v[np.isfinite(v)].sum())
        dtypes = self.dtype, inner, self.dtype
        named = zip(("out", "lse", "weights"), results, self.true, self.bounds, dtypes, strict=True)
        for result, got, true, bound, dtype in named:
            if got is None:
                continue
            assert type(got) is np.ndarray and got.dtype == dtype, (what, result, got.dtype)
            assert got.shape == true.shape, (what, result, got.shape)
            allowed = bound + tiny + (one_ulp(true, dtype) if dtype in HALVES else 0)
            if slack is not None:
                allowed = allowed + slack[result]
            errors = relative_to(allowed, got, true)
            record_max(f"{name}, {result} {self.dtype.name}", errors, 1.0, what, "of the bound")


def one_ulp(true, dtype):
    """One unit in the last place that dtype has at `true`."""
    smallest_normal = SMALLEST_SUBNORMAL[dtype] / EPSILON[dtype]
    _, exponent = np.frexp(np.maximum(np.abs(true), smallest_normal))
    return EPSILON[dtype] * np.ldexp(1.0, exponent - 1)


def relative_to(allowed, got, true):
    """|got - true| in units of `allowed`; 0 where both are NaN or the same infinity."""
    with np.errstate(all="ignore"):
        got = got.astype(true.dtype)
        same = (got == true) | np.isnan(got) & np.isnan(true)
        return np.where(same, 0, np.abs(got - true) / allowed)
