"""Random calls of the whole public API: results equal the oracle, or a documented exception.

    python tests/fuzz.py --calls 1000000 --seed 0     # make fuzz
    python tests/fuzz.py --seed 0 --only 4711         # one call again, as a failure says

Call number N is drawn from (seed, N) and nothing else. A call has random dtypes, shapes, layouts
(strides negative and zero, unaligned, byte-swapped, read-only), options, `out` fresh or over an
input; one in three has something in the place of an argument that should not be there. Then

- a result is within the bounds of the other tests, of the right dtype and shape, in `out` if given;
- an exception is one of EXCEPTIONS and names an argument that was given; `out` is as before;
- a call without garbage raises nothing, and what the oracle refuses raises;
- inputs keep every byte, and there are no warnings.
"""

import argparse
import collections
import decimal
import re
import sys
import time
import warnings

import numpy as np
from common import (
    EPSILON,
    F32,
    F64,
    FLOATS,
    HALVES,
    ISAS,
    SMALLEST_SUBNORMAL,
    WIDE,
    Attention,
    assert_same_bits,
    compute_type,
    one_ulp,
    relative_to,
    use_isa,
)
from test_hypothesis import (
    HALF_ULP,
    NASTY,
    ULP,
    assert_close_logarithms,
    assert_same_specials,
    quiet_cast,
)

import fastsoftmax as fs
import fastsoftmax.compat.scipy
import fastsoftmax.compat.torch
from fastsoftmax import reference

EXCEPTIONS = TypeError, ValueError, OverflowError, MemoryError, NotImplementedError
INTEGERS = tuple(np.dtype(c) for c in "bhilBHIL?")
BACKWARD = 8.0  # half-ulp of the terms: test_accuracy.py


class Draw:
    """What a call is made of, from one generator."""

    def __init__(self, seed, number):
        self.g = np.random.default_rng([seed, number])
        self.arrays = []  # all that were laid out

    def one_of(self, *choices):
        return choices[self.g.integers(len(choices))]

    def chance(self, p):
        return self.g.random() < p

    def integer(self, low, high):
        return int(self.g.integers(low, high + 1))

    def shape(self, most_dims=4):
        shape = [self.integer(0, 6) if self.chance(0.1) else self.integer(1, 6)
                 for _ in range(self.integer(0, most_dims))]  # fmt: skip
        if shape and self.chance(0.4):
            shape[self.integer(0, len(shape) - 1)] = self.one_of(15, 16, 17, 33, 64, 100, 150)
        return tuple(shape)

    def part_of(self, shape):
        """A shape that broadcasts to `shape`."""
        shape = tuple(1 if self.chance(0.4) else n for n in shape)
        return shape[self.integer(0, len(shape)) :] if self.chance(0.5) else shape

    def values(self, shape, dtype):
        """Gaussian numbers of one scale and offset, some of them nasty, of a dtype, in a layout."""
        if dtype.kind in "iub":
            return self.laid_out(self.g.integers(0, 2 if dtype.kind == "b" else 50, shape), dtype)
        a = self.one_of(0.0, 0.1, 3.0, 30.0, 1000.0) * self.g.standard_normal(shape)
        a += self.one_of(0.0, 0.0, 5.5, -300.0, 1e5, 3e6)
        nasty = self.g.random(shape) < self.one_of(0.0, 0.0, 0.1, 0.5)
        return self.laid_out(np.where(nasty, self.g.choice(NASTY, shape), a), dtype)

    def numbers(self, shape, dtype, scale=1.0):
        """Tame ones."""
        return self.laid_out(scale * self.g.standard_normal(shape), dtype)

    def laid_out(self, a, dtype, buffer=None):
        """The same values as another dtype: permuted axes, gaps, steps back, at an odd address."""
        a = quiet_cast(a, dtype) if np.dtype(dtype).kind != "b" else np.asarray(a, bool)
        if a.ndim and a.size and self.chance(0.1):  # a stride of 0
            axis = self.integer(0, a.ndim - 1)
            return np.broadcast_to(self.laid_out(a.take([0], axis), dtype), a.shape)
        view = self.blank(a.shape, a.dtype)
        view[...] = a
        if self.chance(0.05):
            view = view.astype(view.dtype.newbyteorder())
        if self.chance(0.1):
            view = view.view()
            view.flags.writeable = False
        return view

    def blank(self, shape, dtype, buffer=None, start=0):
        """Memory for an array in some layout; from `buffer`, or new."""
        plain = self.chance(0.4)
        order = range(len(shape)) if plain else self.g.permutation(len(shape))
        steps = [1 if plain else self.one_of(1, 1, -1, 2, -3) for _ in shape]
        if buffer is not None:
            steps = [max(-1, min(1, s)) for s in steps]
        extent = [shape[k] * abs(steps[k]) for k in order]
        size = int(np.prod(extent, dtype=int)) * dtype.itemsize
        if buffer is None:
            start = 0 if plain else self.one_of(0, 0, 1, 3)
            buffer = np.full(start + size, 0xA5, np.uint8)
        flat = buffer[start : start + size].view(dtype)
        base = flat.reshape(extent).transpose(np.argsort(order)) if shape else flat.reshape(())
        return base[(*(slice(None, None, s) for s in steps), ...)]

    def axis(self, ndim):
        if not ndim or self.chance(0.2):
            return None if self.chance(0.5) or not ndim else -1
        if self.chance(0.7):
            return self.one_of(int, np.int64)(self.integer(-ndim, ndim - 1))
        return tuple(int(k) for k in self.g.permutation(ndim)[: self.integer(0, ndim)])

    def out(self, shape, dtype, *inputs):
        """None, new, or in memory that an input has, too; and the inputs, of which one may move."""
        inputs = list(inputs)
        kind = self.g.random()
        if kind < 0.5:
            return None, inputs
        if kind < 0.7:
            return self.blank(shape, dtype), inputs
        which = self.integer(0, len(inputs) - 1)
        a = inputs[which]
        if (
            kind < 0.8
            and a.shape == shape
            and a.dtype == dtype
            and a.dtype.isnative
            and a.flags.writeable
        ):
            if 0 not in a.strides or a.size < 2:
                return a, inputs
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize
        buffer = np.full(a.nbytes + size + 64, 0xA5, np.uint8)
        moved = self.blank(a.shape, a.dtype, buffer, self.integer(0, size))
        moved[...] = a
        inputs[which] = moved
        return self.blank(shape, dtype, buffer, self.integer(0, a.nbytes)), inputs


# ---- what should not be there ----


class Hostile:
    """Has a length that it does not keep."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i > 1:
            raise IndexError
        return 1.0


class Vague:
    """Is neither true nor false."""

    def __bool__(self):
        raise ValueError("neither")


def garbage(d):
    """Anything at all."""
    numbers = (None, True, False, 0, 1, -1, 3, -7, 2**31, 2**70, -(2**70), 0.0, -0.0, 1.5, -2.0,
               np.nan, np.inf, -np.inf, 1e-320, 1e39, 1e308, 1j, np.float16(2), np.float32(np.nan),
               np.int8(-1), np.uint64(2**64 - 1), np.bool_(True), np.longdouble(1), np.complex64(1),
               decimal.Decimal("1.5"), np.datetime64("2020-01-01"), np.timedelta64(3, "s"),
    )  # fmt: skip
    objects = (
        "z", "float32", "axis", b"x", "", (), [], {}, {1}, (1, "a"), [None], [[1.0], [1.0, 2.0]],
        [[]], (0, 1), (None, None), (1.0, 2), (-1, 2), (2, 3, 4), range(3), slice(None), ...,
        object(), len, int, float, np.float16, np.float64, np.int32, np.dtype("f4"), complex,
        np.dtype("S3"), np.ndarray, bytearray(b"12345678"), memoryview(b"12345678"), Hostile(),
        Vague(), [2**80], [Vague()],
    )  # fmt: skip
    arrays = (
        lambda: d.values(d.shape(), d.one_of(*FLOATS)),
        lambda: d.values(d.shape(), d.one_of(*INTEGERS)),
        lambda: np.zeros(d.shape(), d.one_of("c8", "G", "O", "S2", "U1", "M8[s]", "m8[s]", "V3")),
        lambda: np.zeros(2, [("a", "f4"), ("b", "i2")]),
        lambda: np.ma.masked_array(np.ones(d.shape(2)), mask=d.chance(0.5)),
        lambda: np.ma.masked,
        lambda: np.ones((1,) * 63),  # the oracle adds one
        lambda: np.ones((1,) * 40, F32),
        lambda: np.rec.array(np.ones(3, F32)),
        lambda: np.array([None, 1.0]),
        lambda: np.array(1.0),
        lambda: np.arange(6.0)[::-1],
        lambda: np.empty((0, 3)),
        lambda: np.char.array(["a"]),
    )
    kind = d.one_of("number", "object", "array", "array")
    return (d.one_of(*numbers) if kind == "number" else
            d.one_of(*objects) if kind == "object" else d.one_of(*arrays)())  # fmt: skip


# ---- the functions ----


class Case:
    """A call: a function with its arguments by name, and what is true of its result."""

    def __init__(self, function, positional, keywords, oracle, check, name=None):
        self.function, self.oracle, self.check = function, oracle, check
        self.positional, self.keywords = positional, keywords
        self.name = name or function.__name__
        self.garbage = None

    def spoil(self, d, names):
        """Put garbage in the place of an argument, given or not."""
        self.garbage = d.one_of(*self.positional, *names)
        place = self.positional if self.garbage in self.positional else self.keywords
        place[self.garbage] = garbage(d)

    def call(self):
        return self.function(*self.positional.values(), **self.keywords)


def check_family(name, dtype, got, true, z):
    if name.startswith("log"):
        assert_same_specials(got, true, dtype)
        m = np.abs(z[np.isfinite(z)].astype(WIDE)).max(initial=1)
        assert_close_logarithms(np.atleast_1d(got), np.atleast_1d(true), m, dtype)
        return
    assert_same_specials(got, true, dtype)
    got, true = np.atleast_1d(got), np.atleast_1d(true)
    finite = np.isfinite(true)
    error = np.max(reference.ulp_error(got[finite], true[finite], dtype), initial=0)
    bound = HALF_ULP if dtype in HALVES else ULP
    assert error <= bound, f"error {error} ulp"


def native(array):
    return array.dtype.newbyteorder("=")


def result_dtype(x, dtype, out):
    if out is not None:
        return out.dtype
    if dtype is not None:
        return np.dtype(dtype)
    return native(x) if native(x) in FLOATS else F64


def softmax_family(d):
    name = d.one_of("softmax", "log_softmax", "softmin")
    shape = d.shape()
    x = d.values(shape, d.one_of(*FLOATS, *FLOATS, d.one_of(*INTEGERS)))
    options = {}
    if d.chance(0.3):
        options["bias"] = d.values(d.part_of(shape), d.one_of(*FLOATS, *INTEGERS[:-1]))
    if d.chance(0.3):
        options["where"] = d.laid_out(d.g.random(d.part_of(shape)) < d.one_of(0.1, 0.5, 0.9), bool)
    axis = d.axis(len(shape))
    if d.chance(0.3):
        options["temperature"] = d.one_of(0.5, 1, 3, 0.07, np.float32(1.7), 1e-3)
        if d.chance(0.3) and axis is not None and not isinstance(axis, tuple) and shape:
            per_row = [1 if k == axis % len(shape) else n for k, n in enumerate(shape)]
            options["temperature"] = d.laid_out(0.1 + d.g.random(per_row), F64)
    dtype = d.one_of(*FLOATS) if d.chance(0.2) else None
    natural = result_dtype(x, dtype, None)
    out, (x,) = d.out(shape, natural if dtype or d.chance(0.7) else d.one_of(*FLOATS), x)
    final = result_dtype(x, dtype, out)

    def oracle(x, axis=-1, out=None, dtype=None, **options):
        if dtype is None and out is not None:
            dtype = out.dtype
        f = getattr(reference, name)
        true = f(x, axis, **options, dtype=dtype, precise=WIDE)
        z, _, _ = reference._logits(x, axis, options.get("bias"), options.get("where"),
                                    options.get("temperature"), dtype)  # fmt: skip
        return true, z

    def check(got, expected):
        true, z = expected
        assert got.dtype == final and np.shape(got) == np.shape(true)
        assert type(got) is np.ndarray if np.ndim(true) or out is not None else np.isscalar(got)
        check_family(name, final, got, true, z)

    options = options | {"dtype": dtype, "out": out}
    options = {key: value for key, value in options.items() if value is not None}
    return Case(getattr(fs, name), {"x": x, "axis": axis}, options, oracle, check)


def logsumexp(d):
    shape = d.shape()
    x = d.values(shape, d.one_of(*FLOATS, *FLOATS, d.one_of(*INTEGERS)))
    options = {}
    if d.chance(0.4):
        b = d.one_of(0.0, 1.0) + d.g.standard_normal(d.part_of(shape))
        options["b"] = d.laid_out(np.where(d.chance(0.5) and b < 0.3, 0, b), d.one_of(*FLOATS))
    if d.chance(0.3):
        options["where"] = d.laid_out(d.g.random(d.part_of(shape)) < d.one_of(0.1, 0.5, 0.9), bool)
    options |= {"keepdims": d.chance(0.3), "return_sign": d.chance(0.4)}
    axis = d.axis(len(shape))
    reduced = np.shape(np.sum(np.zeros(shape), axis, keepdims=options["keepdims"]))
    out, (x,) = d.out(
        reduced, d.one_of(*FLOATS) if d.chance(0.3) else result_dtype(x, None, None), x
    )
    final = result_dtype(x, None, out)

    def oracle(x, axis=None, out=None, dtype=None, **options):
        if dtype is None and out is not None:
            dtype = out.dtype
        options = {**options, "dtype": dtype, "precise": WIDE}
        true = reference.logsumexp(x, axis, **options)
        cancellation = 1.0
        if options.get("b") is not None:
            plain = options | {"b": np.abs(options["b"]), "return_sign": False}
            value = true[0] if options["return_sign"] else true
            with np.errstate(all="ignore"):
                cancellation = np.exp(reference.logsumexp(x, axis, **plain) - value)
        return true, np.asarray(x).astype(WIDE), cancellation

    def check(got, expected):
        true, z, cancellation = expected
        if options["return_sign"]:
            assert isinstance(got, tuple) and len(got) == 2
            (got, sign), (true, true_sign) = got, true
            assert sign.dtype == got.dtype and np.shape(sign) == np.shape(got)
        assert got.dtype == final and np.shape(got) == np.shape(true)
        got, true, cancellation = map(np.atleast_1d, (got, true, cancellation))
        settled = np.broadcast_to(~(cancellation > 1e3), got.shape)
        if options["return_sign"]:
            same = np.atleast_1d(sign).astype(F64), np.atleast_1d(true_sign).astype(F64)
            assert np.array_equal(*(s[settled] for s in same), equal_nan=True), "sign"
        elif "b" in options:  # NaN stands for a negative sum, whose cancellation cannot be told
            settled = settled & ~np.isnan(true)
        got, true = got[settled], true[settled]
        assert_same_specials(got, true, final)
        m = np.abs(z[np.isfinite(z)]).max(initial=1)
        m = m + 2 * np.broadcast_to(cancellation, settled.shape)[settled] if "b" in options else m
        assert_close_logarithms(got, true, m, final)

    if out is not None:
        options["out"] = out
    return Case(fs.logsumexp, {"x": x, "axis": axis}, options, oracle, check)


def backward(d):
    log = d.chance(0.5)
    shape = d.shape()
    dtype, axis = d.one_of(*FLOATS), d.axis(len(shape))
    forward = fs.log_softmax if log else fs.softmax
    logits = d.numbers(shape, F64, d.one_of(0.1, 3.0, 30.0))
    y = d.laid_out(forward(logits, axis, where=d.g.random(shape) < 0.9), dtype)
    grad = d.numbers(shape, d.one_of(dtype, dtype, *FLOATS))
    options = {"temperature": d.one_of(0.5, 3, np.float32(1.7))} if d.chance(0.3) else {}
    inner = F64 if F64 in (native(grad), dtype) else F32
    natural = dtype if native(grad) == dtype else inner
    out, (grad, y) = d.out(shape, natural if d.chance(0.7) else d.one_of(*FLOATS), grad, y)
    final = natural if out is None else out.dtype
    inner = F64 if final == F64 else inner
    name = "log_softmax_backward" if log else "softmax_backward"

    def oracle(grad, y, axis=-1, out=None, **options):
        grad = np.asarray(grad).astype(inner) if inner == F64 else grad
        true = getattr(reference, name)(grad, y, axis, **options, precise=WIDE)
        g, y, r, axes = reference._gradients(grad, y, axis, options.get("temperature"), WIDE)
        part = y != (-np.inf if log else 0)
        w = np.exp(y) if log else y
        size = np.abs(g) if log else np.abs(g) * w
        size = size + w * np.sum(
            np.where(part, np.abs(g) * (1 if log else w), 0), axes, keepdims=True
        )
        return true, r * np.where(part, size, 0)

    def check(got, expected):
        true, size = expected
        assert got.dtype == final and np.shape(got) == np.shape(true)
        bound = BACKWARD / 2 * EPSILON[inner] * size + 2 * SMALLEST_SUBNORMAL[final]
        if final in HALVES or final != inner:
            bound = bound + one_ulp(np.asarray(true), final)
        errors = relative_to(bound, np.asarray(got), np.asarray(true))
        assert np.all(errors <= 1), f"error {np.max(errors)} of the bound"

    if out is not None:
        options["out"] = out
    return Case(getattr(fs, name), {"grad": grad, "y": y, "axis": axis}, options, oracle, check)


def at_most(name, errors, bound, what="", unit="ulp"):
    worst = float(np.max(errors, initial=0.0))
    assert worst <= bound, f"{name}: error {worst:.4g} {unit}, bound {bound:.4g}"


def attention_arrays(d):
    """q, k, v; leading dimensions; shape of the scores."""
    dtype = d.one_of(*FLOATS)
    lead = tuple(d.integer(1, 2) for _ in range(d.integer(0, 2)))
    kv_heads, group = d.integer(1, 2), d.integer(1, 3)
    queries, keys = d.one_of(1, 1, d.integer(0, 9), 17), d.one_of(d.integer(0, 9), 20, 65)
    depth, v_depth = d.integer(1, 9), d.one_of(d.integer(0, 9), 17)
    ends = (kv_heads * group, queries, depth), (kv_heads, keys, depth), (kv_heads, keys, v_depth)
    shapes = [d.part_of(lead) + end for end in ends]
    if single := kv_heads == group == 1 and d.chance(0.5):
        shapes = [end[1:] for end in ends]
    scale = d.one_of(0.3, 1.0, 2.0)
    q, k, v = (d.numbers(shape, dtype, scale) for shape in shapes)
    lead = () if single else np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    scores = (queries, keys) if single else (*lead, kv_heads * group, queries, keys)
    return q, k, v, lead, scores


def attention(d):
    q, k, v, lead, scores = attention_arrays(d)
    heads, (queries, keys) = scores[-3] if len(scores) > 2 else 1, scores[-2:]
    options = {}

    def maybe(name, value, p=0.25):
        if d.chance(p):
            options[name] = value()

    def bias():
        a = d.one_of(0.0, 1.0, 10.0) * d.g.standard_normal(d.part_of(scores))
        a = np.where(d.g.random(a.shape) < d.one_of(0, 0.5), -np.inf, a)
        return d.laid_out(a, d.one_of(*FLOATS))

    def offset():
        return d.one_of(keys - queries, -2, 2**62, -(2**62), d.g.integers(-5, 70, lead))

    maybe("mask", lambda: d.laid_out(d.g.random(d.part_of(scores)) < d.one_of(0.1, 0.9), bool))
    maybe("bias", bias)
    maybe("is_causal", lambda: True)
    maybe("q_offset", offset)
    maybe("kv_lengths", lambda: d.one_of(d.integer(0, keys), d.g.integers(0, keys + 1, lead)))
    maybe("window", lambda: tuple(d.one_of(None, 0, d.integer(0, 70), 2**70) for _ in "lr"))
    maybe("scale", lambda: d.one_of(0.0, 0.1, 1, -0.5, np.float32(0.7)))
    maybe("softcap", lambda: d.one_of(0.5, 3, 50.0))
    maybe("sinks", lambda: d.numbers(heads, d.one_of(F32, F64, q.dtype), 3.0))
    if abs(np.max(np.abs(options.get("q_offset", 0)), initial=0)) < 2**32:
        maybe("alibi_slopes", lambda: d.numbers(heads, d.one_of(F32, F64), 0.1))
    if "kv_lengths" in options and np.ndim(options["kv_lengths"]) == 0:
        options["kv_lengths"] = int(options["kv_lengths"])
    wanted = {"return_lse": d.chance(0.5), "return_weights": d.chance(0.5)}
    out, (q, k, v) = d.out((*scores[:-1], v.shape[-1]), native(q), q, k, v)

    def oracle(q, k, v, out=None, return_lse=False, return_weights=False, **options):
        return Attention(*(a.astype(native(a)) for a in map(np.asarray, (q, k, v))), **options)

    def check(got, expected):
        got = list(got) if isinstance(got, tuple) else [got]
        assert len(got) == 1 + sum(wanted.values())
        results = [got.pop(0)]
        results += [got.pop(0) if asked else None for asked in wanted.values()]
        expected.check(at_most, "attention", results=results)

    options |= {key: value for key, value in wanted.items() if value}
    if out is not None:
        options["out"] = out
    return Case(fs.attention, {"q": q, "k": k, "v": v}, options, oracle, check)


def merge_attention(d):
    dtype, shape = d.one_of(*FLOATS), d.shape(3)
    columns, inner = d.one_of(0, 1, 3, 16, 33), compute_type(dtype)
    arrays = {}
    for half in "ab":
        lse = np.where(d.g.random(shape) < 0.2, -np.inf, 4 * d.g.standard_normal(shape))
        lse = np.where(d.g.random(shape) < d.one_of(0, 0.1), np.nan, lse)
        arrays[f"out_{half}"] = d.numbers((*shape, columns), dtype)
        arrays[f"lse_{half}"] = d.laid_out(lse, inner)

    def oracle(out_a, lse_a, out_b, lse_b):
        halves = (np.asarray(a) for a in (out_a, lse_a, out_b, lse_b))
        a, la, b, lb = (h.astype(native(h)) for h in halves)
        with np.errstate(all="ignore"):
            apart = np.nan_to_num(np.abs(la.astype(F64) - lb), nan=0.0, posinf=0.0)[..., None]
        size = np.abs(a.astype(F64)) + np.abs(b.astype(F64))
        return reference.merge_attention(a, la, b, lb, precise=WIDE), apart, size

    def check(got, expected):
        (true, true_lse), apart, size = expected
        out, lse = got
        assert out.dtype == dtype and lse.dtype == inner and np.shape(lse) == np.shape(true_lse)
        bound = EPSILON[inner] / 2 * (16 + 2 * apart) * size + 2 * SMALLEST_SUBNORMAL[inner]
        bound = bound + (one_ulp(true, dtype) if dtype in HALVES else 0)
        at_most("merge", relative_to(bound, out, true), 1.0)
        bound = EPSILON[inner] / 2 * (8 + 4 * np.maximum(1, np.abs(true_lse)))
        at_most("merge lse", relative_to(bound, np.asarray(lse), np.asarray(true_lse)), 1.0)

    return Case(fs.merge_attention, arrays, {}, oracle, check)


def compat_family(d):
    """The bits of the function that it stands for."""
    name = d.one_of("softmax", "log_softmax", "softmin", "logsumexp")
    like_torch = name == "softmin" or d.chance(0.5)
    module = fastsoftmax.compat.torch if like_torch else fastsoftmax.compat.scipy
    x = d.values(d.shape() or (3,), d.one_of(*FLOATS, *INTEGERS))
    axis = d.integer(-x.ndim, x.ndim - 1)
    names = (("input", "dim", "keepdim") if like_torch else
             ("a" if name == "logsumexp" else "x", "axis", "keepdims"))  # fmt: skip
    options = {names[2]: d.chance(0.5)} if name == "logsumexp" else {}

    def oracle(x, axis, keep=None):
        keep = {} if keep is None else {"keepdims": keep}
        axis = tuple(axis) if like_torch and isinstance(axis, list) else axis
        return getattr(fs, name)(x, axis, **keep)

    def check(got, expected):
        assert_same_bits(got, expected)

    arguments = {names[0]: x, names[1]: axis}
    case = Case(getattr(module, name), arguments, options, lambda *a, **k: oracle(*a, *k.values()),
                check, f"compat {name}")  # fmt: skip
    return case


def compat_attention(d):
    q, k, v, _, scores = attention_arrays(d)
    options = {"enable_gqa": True}
    kind = d.one_of("none", "causal", "mask", "bias")
    if kind == "causal":
        options["is_causal"] = True
    if kind == "mask":
        options["attn_mask"] = d.laid_out(d.g.random(d.part_of(scores)) < 0.5, bool)
    if kind == "bias":
        options["attn_mask"] = d.numbers(d.part_of(scores), d.one_of(*FLOATS))
    if d.chance(0.3):
        options["scale"] = d.one_of(0.1, 2)

    def oracle(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
        mine = {}
        if attn_mask is not None:
            mine["mask" if np.asarray(attn_mask).dtype == bool else "bias"] = attn_mask
        return fs.attention(query, key, value, **mine, is_causal=is_causal, scale=scale)

    function = fastsoftmax.compat.torch.scaled_dot_product_attention
    arrays = {"query": q, "key": k, "value": v}
    return Case(function, arrays, options, oracle, assert_same_bits)


def settings(d):
    """The functions that take a number of threads, or a name."""
    name = d.one_of("set_num_threads", "num_threads", "show_config")
    value = "dicts" if name == "show_config" else d.integer(1, 3)
    function = getattr(fs, name)
    argument = {"mode" if name == "show_config" else "n": value}
    return Case(function, argument, {}, lambda *a, **k: None, lambda got, expected: None)


# How to draw a call; how often; which arguments besides those by position garbage may take.
_FUSED = ("bias", "where", "temperature", "dtype", "out")
_OPTIONS = ("mask", "bias", "is_causal", "q_offset", "kv_lengths", "window", "scale", "softcap",
            "sinks", "alibi_slopes", "out", "return_lse", "return_weights")  # fmt: skip
KINDS = {
    softmax_family: (8, _FUSED),
    logsumexp: (4, ("b", "where", "keepdims", "dtype", "out", "return_sign")),
    backward: (3, ("temperature", "out")),
    attention: (5, _OPTIONS),
    merge_attention: (1, ()),
    compat_family: (2, ()),
    compat_attention: (1, ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")),
    settings: (0.3, ()),
}
_WEIGHTS = np.array([weight for weight, _ in KINDS.values()], float)


# ---- a call ----


def make(seed, number):
    d = Draw(seed, number)
    kind = list(KINDS)[d.g.choice(len(KINDS), p=_WEIGHTS / _WEIGHTS.sum())]
    case = kind(d)
    if d.chance(1 / 3):
        case.spoil(d, KINDS[kind][1])
    return case


def keep(value):
    """A copy of an argument, as good for the oracle."""
    return value.copy() if type(value) is np.ndarray and value.size < 2**20 else value


# Those that call functions with other names for their arguments: these may be in the message, too.
_ALIASES = {
    "dim": {"axis"}, "query": {"q"}, "key": {"k"}, "value": {"v"}, "keepdim": {"keepdims"},
    "attn_mask": {"mask", "bias"},
}  # fmt: skip


def names_in(message):
    return set(re.findall(r"\w+", message))


def run(case):
    """Make the call; raises AssertionError if anything is wrong. What came of it, in a word."""
    arguments = case.positional | case.keywords
    out = case.keywords.get("out")
    out = None if isinstance(out, np.ma.MaskedArray) else out
    copies = {name: keep(value) for name, value in arguments.items()}
    positional = [copies[name] for name in case.positional]
    keywords = {name: copies[name] for name in case.keywords}
    before = out.tobytes() if isinstance(out, np.ndarray) and out.size < 2**20 else None
    try:
        got = case.call()
    except EXCEPTIONS as error:
        got, raised = None, error
    else:
        raised = None
    for name, value in arguments.items():
        if name != "out" and type(value) is np.ndarray and value.size < 2**20:
            written = raised is None and type(out) is np.ndarray and np.may_share_memory(value, out)
            assert written or value.tobytes() == copies[name].tobytes(), f"{name} was modified"
    if raised is not None:
        assert case.garbage is not None, f"raised {raised!r}"
        assert before is None or out.tobytes() == before, f"out was modified, then {raised!r}"
        known = {case.garbage, *case.positional, *case.keywords}
        known = known.union(*(_ALIASES.get(name, ()) for name in known))
        assert isinstance(raised, MemoryError) or names_in(str(raised)) & known, (
            f"no argument is named in {raised!r}"
        )
        return type(raised).__name__
    if isinstance(out, np.ndarray):
        assert (got[0] if isinstance(got, tuple) else got) is out, "the result is not out"
    if case.garbage is not None:  # the checks are about other arguments
        try:
            with np.errstate(all="ignore"):
                case.oracle(*positional, **keywords)
        except Exception as error:
            raise AssertionError(f"no exception, but the oracle has {error!r}") from None
        return "accepted"
    with np.errstate(all="ignore"):
        case.check(got, case.oracle(*positional, **keywords))
    return "right"


def fuzz(calls, seed=0, isa=None, only=None, keep_going=False):
    """Run the calls; Counter of what came of them by function. The first that is wrong raises, or
    is printed."""
    seen = collections.Counter()
    with use_isa(isa or fs.isa()):
        for number in range(calls) if only is None else [only]:
            case = make(seed, number)
            threads = fs.get_num_threads()
            try:
                seen[case.name, run(case)] += 1
            except Exception as error:
                again = f"python tests/fuzz.py --seed {seed} --only {number} --isa {fs.isa()}"
                what = {k: v for k, v in (case.positional | case.keywords).items()}
                message = (
                    f"{again}\n{case.name}: {error or type(error).__name__}, garbage in "
                    f"{case.garbage}\n{what!r:.3000}"
                )
                if not keep_going:
                    raise AssertionError(message) from error
                print(message, flush=True)
                seen[case.name, "WRONG"] += 1
            finally:
                fs.set_num_threads(threads)
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    parser.add_argument("--isa", choices=ISAS, default=fs.isa())
    parser.add_argument("--keep-going", action="store_true", help="print what is wrong, go on")
    args = parser.parse_args()
    warnings.simplefilter("error")
    begun = time.monotonic()
    seen = fuzz(args.calls, args.seed, args.isa, args.only, args.keep_going)
    for (name, what), count in sorted(seen.items()):
        print(f"{name:30} {what:20} {count:9}")
    seconds = time.monotonic() - begun
    print(f"{seen.total()} calls, seed {args.seed}, {args.isa}, {seconds:.0f} s")
    return any(what == "WRONG" for _, what in seen)


if __name__ == "__main__":
    sys.exit(main())
