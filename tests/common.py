"""Plain helpers that every test file may import: dtypes, bits, buffers beside a guard page.

Fixtures (``isa``, ``record_max``, ``threads``) live in conftest.py.
"""

import ctypes
import mmap

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax as fs
from fastsoftmax import _core

# --- instruction sets and dtypes ------------------------------------------------------------------

KNOWN_ISAS = ("scalar", "avx2", "avx512", "neon")
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
    "set_num_threads",
    "get_num_threads",
    "num_threads",
    "isa",
    "available_isas",
    "show_config",
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
