"""Kinds of calls for the fuzzer (fuzz.py): softmax and its kin, losses, ufuncs."""

import numpy as np
from common import (
    EPSILON,
    F32,
    F64,
    FLOATS,
    HALVES,
    SINGLES,
    SMALLEST_SUBNORMAL,
    WIDE,
    assert_same_bits,
    compute_type,
    one_ulp,
)
from fuzz_draw import INTEGERS, Case, native
from test_cross_entropy import DROPPED, ULPS
from test_hypothesis import (
    HALF_ULP,
    ULP,
    assert_close_logarithms,
    assert_same_specials,
    check_gradients,
    check_within,
    size_of_gradients,
)

import fastsoftmax as fs
import fastsoftmax.compat.scipy
import fastsoftmax.compat.torch
from fastsoftmax import reference, reference_gradients, ufuncs


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
        return true, size_of_gradients(log, grad, y, axis, **options)

    def check(got, expected):
        assert got.dtype == final and np.shape(got) == np.shape(expected[0])
        check_gradients(got, *expected, inner)

    if out is not None:
        options["out"] = out
    return Case(getattr(fs, name), {"grad": grad, "y": y, "axis": axis}, options, oracle, check)


def loss_arguments(d):
    """logits, labels, axis; options; the reduction; the shape of the labels."""
    shape = d.shape(3) or (d.integer(1, 9),)
    axis = d.integer(-len(shape), len(shape) - 1)
    rows, n = tuple(np.delete(shape, axis)), shape[axis]
    x = d.values(shape, d.one_of(*FLOATS, *FLOATS, d.one_of(*INTEGERS)))
    kind = d.one_of(*INTEGERS[:-1])
    ignored = d.one_of(-100, -100, -1, 0) if kind.kind == "i" else d.one_of(100, 0)
    labels = d.g.integers(0, max(1, min(n, 100)), rows)  # what an int8 holds
    labels = np.where(d.g.random(rows) < (d.one_of(0, 0.3) if n else 1), ignored, labels)
    options = {"ignore_index": ignored} if ignored != -100 or d.chance(0.2) else {}
    if d.chance(0.4):
        weight = 3 * d.g.random(n) * (d.g.random(n) < d.one_of(0.5, 1))
        options["weight"] = d.laid_out(weight, d.one_of(*FLOATS, *INTEGERS[:-1]))
    if d.chance(0.4):
        options["label_smoothing"] = d.one_of(0, 0.1, np.float32(0.3), 1.0)
    reduction = d.one_of("mean", "sum", "none")
    if reduction != "mean" or d.chance(0.2):
        options["reduction"] = reduction
    return x, d.laid_out(labels, kind), axis, options, reduction, rows


def cross_entropy(d):
    x, labels, axis, options, reduction, rows = loss_arguments(d)
    final = result_dtype(x, None, None)
    inner = compute_type(final)

    def oracle(logits, labels, axis, weight=None, ignore_index=-100, label_smoothing=0, **more):
        """What is true, and how far off: the losses, what smoothing adds to them, their sum."""
        common = {"ignore_index": ignore_index, "precise": WIDE}
        true = reference_gradients.cross_entropy(
            logits, labels, axis, weight=weight, label_smoothing=label_smoothing, **common, **more
        )
        z, at, seen, w, each = reference_gradients._classes(
            logits, labels, axis, weight, ignore_index, WIDE
        )
        plain = reference_gradients.cross_entropy(logits, labels, axis, reduction="none", **common)
        s, n = float(label_smoothing), z.shape[-1]
        bound = ULPS[inner] * one_ulp(plain, inner) + n * DROPPED[inner]
        bound = ((1 - s) * w + (s / n * each.sum() if n else 0)) * bound
        if s and n:  # in float64
            own = np.abs(np.take_along_axis(z, at, -1)[..., 0])  # lse is plain + z of the label
            size = np.abs(each * z).sum(-1) + each.sum() * (plain + own)
            bound = bound + (n + 8) * EPSILON[F64] * s / n * size
        bound = np.where(seen, bound, 0)
        if more.get("reduction") != "none":
            bound = bound.sum() / (w.sum() if more.get("reduction", "mean") == "mean" else 1)
            bound = bound + bound.size * EPSILON[F64] * np.abs(true)
        return true, bound + SMALLEST_SUBNORMAL[inner]

    def check(got, expected):
        true, bound = expected
        assert got.dtype == final and np.shape(got) == (rows if reduction == "none" else ())
        check_within(got, true, bound + one_ulp(np.nan_to_num(true), inner), inner)

    arguments = {"logits": x, "labels": labels, "axis": axis}
    return Case(fs.cross_entropy, arguments, options, oracle, check)


def cross_entropy_backward(d):
    x, labels, axis, options, reduction, rows = loss_arguments(d)
    grad = d.numbers(rows if reduction == "none" else (), d.one_of(*FLOATS))
    if grad.ndim == 0 and d.chance(0.5):
        grad = float(grad)
    natural = result_dtype(x, None, None)
    out, (x, labels) = d.out(x.shape, natural if d.chance(0.7) else d.one_of(*FLOATS), x, labels)
    final = natural if out is None else out.dtype
    inner = F64 if F64 in (natural, final) else F32

    def oracle(grad, logits, labels, axis, out=None, **options):
        """What is true, and the size of what it is made of."""
        true = reference_gradients.cross_entropy_backward(
            grad, logits, labels, axis, **options, precise=WIDE
        )
        weight, ignored = options.get("weight"), options.get("ignore_index", -100)
        z, at, seen, w, each = reference_gradients._classes(
            logits, labels, axis, weight, ignored, WIDE
        )
        total = w.sum() if options.get("reduction", "mean") == "mean" else 1
        if not z.size or not total > 0:
            return true, None
        g = np.where(seen, np.abs(np.asarray(grad).astype(WIDE)), 0)[..., None] / total
        plain = reference_gradients.cross_entropy_backward(
            1.0, logits, labels, axis, reduction="sum", ignore_index=ignored, precise=WIDE
        )
        s, n = float(options.get("label_smoothing", 0)), z.shape[-1]
        share, hot = s / n * each.sum(), np.arange(n) == at
        of_row = (1 - s) * w[..., None] + share
        size = of_row * np.abs(np.moveaxis(plain, axis, -1)) + s / n * each + hot * 2 * share
        bound = g * (6 * EPSILON[inner] * size + n * DROPPED[inner] * of_row)
        return true, np.moveaxis(bound, -1, axis) + 4 * SMALLEST_SUBNORMAL[inner]

    def check(got, expected):
        true, bound = expected
        assert got.dtype == final and got.shape == true.shape
        if bound is not None:  # else the mean of nothing
            check_within(got, true, bound, inner)

    if out is not None:
        options["out"] = out
    arguments = {"grad": grad, "logits": x, "labels": labels, "axis": axis}
    return Case(fs.cross_entropy_backward, arguments, options, oracle, check)


def ufunc(d):
    name = d.one_of(*ufuncs.__all__)
    shape = d.shape() or (3,)
    x = d.values(shape, d.one_of(*FLOATS, *FLOATS, d.one_of(*INTEGERS)))
    options = {"axis": d.integer(-len(shape), len(shape) - 1)} if d.chance(0.8) else {}
    axis = options.get("axis", -1)
    final = result_dtype(x, None, None)
    if d.chance(0.2):  # a narrower one would have NumPy's warnings
        options["dtype"] = final = F64 if final in SINGLES else d.one_of(*SINGLES)
    if name == "logsumexp":
        if d.chance(0.3):
            options["keepdims"] = d.chance(0.5)
        shape = np.sum(np.zeros(shape), axis, keepdims=options.get("keepdims", False)).shape
    out, (x,) = d.out(shape, final, x)

    def oracle(x, axis=-1, keepdims=False, **options):
        x = np.asarray(x)  # not a masked array, which is read as it is
        keep = {"keepdims": keepdims} if name == "logsumexp" else {}
        return getattr(reference, name)(x, axis, **keep, precise=WIDE), x.astype(WIDE)

    def check(got, expected):
        true, z = expected
        assert got.dtype == final and np.shape(got) == shape
        check_family(name, final, got, true, z)

    if out is not None:
        options["out"] = out
    return Case(getattr(ufuncs, name), {"x": x}, options, oracle, check, f"ufuncs {name}")


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


_LOSS = ("weight", "reduction", "ignore_index", "label_smoothing")
KINDS = {
    softmax_family: (8, ("bias", "where", "temperature", "dtype", "out")),
    logsumexp: (4, ("b", "where", "keepdims", "dtype", "out", "return_sign")),
    backward: (3, ("temperature", "out")),
    cross_entropy: (2, _LOSS),
    cross_entropy_backward: (2, (*_LOSS, "out")),
    ufunc: (2, ("axis", "axes", "out", "keepdims", "casting", "order", "where")),
    compat_family: (2, ()),
}
