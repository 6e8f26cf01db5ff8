"""cross_entropy and its gradient against the oracle, and what they refuse.

Bounds of a row's loss and gradient, in ulp of their own value (src_c/loss.inc.h): exp has 1.5
units of 2^-24, the sum as many, and the last rounding half of one, so 3.5 and, at the label of a
maximum, as many; 4 with the room that log1p and float64's double rounding take. Halves: 0.51 of
theirs. What the sum drops is relative to the largest exponential: n * 2^-45 (2^-103).
"""

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest
from common import (
    BF16,
    F16,
    F32,
    F64,
    FLOATS,
    HALVES,
    SMALLEST_SUBNORMAL,
    WIDE,
    GuardedPages,
    assert_canonical_nan,
    assert_same_bits,
    bits,
    every_dtype,
    normal,
    one_ulp,
    relative_to,
    rng,
    unaligned,
)

import fastsoftmax as fs
from fastsoftmax import reference_gradients as reference

ULPS = {F16: 0.51, BF16: 0.51, F32: 4, F64: 4}
DROPPED = {F16: 2.0**-45, BF16: 2.0**-45, F32: 2.0**-45, F64: 2.0**-103}


def a_case(shape, axis, dtype, *key, scale=3.0):
    x = normal(shape, dtype, scale, axis, *key)
    r = rng("labels", shape, axis, *key)
    rows = [n for d, n in enumerate(shape) if d != axis % len(shape)]
    labels = r.integers(0, shape[axis], rows)
    return x, np.where(r.random(rows) < 0.15, -100, labels)


def check(record_max, x, labels, axis, what, scale=1):
    precise = WIDE if x.dtype == F64 else np.float64
    n, dtype = x.shape[axis], x.dtype
    got = fs.cross_entropy(x, labels, axis, reduction="none")
    true = reference.cross_entropy(x, labels, axis, reduction="none", precise=precise)
    grads = normal(np.shape(labels), F32, 1.0, "grads") * scale
    dx = fs.cross_entropy_backward(grads, x, labels, axis, reduction="none")
    true_dx = reference.cross_entropy_backward(
        grads, x, labels, axis, reduction="none", precise=precise
    )
    assert dx.shape == x.shape and np.shape(got) == np.shape(labels)
    assert got.dtype == dx.dtype == dtype
    size = np.expand_dims(np.abs(grads), axis)
    for name, a, t, dropped in (("loss", got, true, 1), ("gradient", dx, true_dx, size)):
        allowed = ULPS[dtype] * one_ulp(t, dtype) + n * DROPPED[dtype] * dropped
        errors = relative_to(allowed + SMALLEST_SUBNORMAL[dtype], np.asarray(a), np.asarray(t))
        record_max(f"cross entropy, {name} {dtype.name}", errors, 1.0, what, "of the bound")


SHAPES = [
    *((n,) for n in (1, 2, 7, 8, 9, 31, 32, 33, 64, 100, 1023, 1024, 1025)),
    *((rows, n) for rows in (1, 3, 16, 17, 65) for n in (1, 2, 10, 32, 33, 130)),
    (3, 5, 7),
    (2, 40, 3),
]


@every_dtype
def test_shapes(isa, dtype, record_max):
    for shape in SHAPES:
        for axis in range(-len(shape), 0):
            check(record_max, *a_case(shape, axis, dtype), axis, (shape, axis))


@every_dtype
def test_spread(isa, dtype, record_max):
    """Losses and gradients from tiny to huge, also those that differ little from 0 and from 1."""
    for scale in (0.01, 1, 10, 100, 1000):
        x, labels = a_case((40, 50), -1, dtype, scale=scale)
        check(record_max, x, labels, -1, scale)
        check(record_max, x, np.asarray(x, F32).argmax(-1), -1, (scale, "the largest"))
    for rest in (-5, -20, -60):
        x = np.full((3, 40), rest, dtype)
        x[:, 7] = 1
        check(record_max, x, [7, 7, 0], -1, rest)


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=lambda d: d.name)
def test_long_rows(isa, dtype, record_max, threads):
    """Rows that are read in chunks, and by several threads: the same bits."""
    for shape, axis in (((2, 300_001), -1), ((140_000, 3), 0), ((300, 2000), -1)):
        x, labels = a_case(shape, axis, dtype)
        check(record_max, x, labels, axis, shape)
        threads(1)
        one = fs.cross_entropy_backward(1.0, x, labels, axis), fs.cross_entropy(x, labels, axis)
        threads(3)
        two = fs.cross_entropy_backward(1.0, x, labels, axis), fs.cross_entropy(x, labels, axis)
        for a, b in zip(one, two, strict=True):
            assert_same_bits(a, b)


@every_dtype
def test_strides_and_places(isa, dtype):
    for shape in ((5, 33), (20, 9), (3, 200)):
        x, labels = a_case(shape, -1, dtype)
        want = fs.cross_entropy(x, labels, reduction="none")
        dx = fs.cross_entropy_backward(np.arange(shape[0]), x, labels, reduction="none")
        for change in (
            unaligned,
            np.asfortranarray,
            lambda a: a[..., ::-1].copy()[..., ::-1],
            lambda a: a[::-1].copy()[::-1],
            lambda a: np.repeat(a, 3, -1)[..., 1::3],
        ):
            y = change(x)
            assert_same_bits(fs.cross_entropy(y, labels, reduction="none"), want)
            got = fs.cross_entropy_backward(np.arange(shape[0]), y, labels, reduction="none")
            assert_same_bits(np.ascontiguousarray(got), dx)
            into = change(np.zeros_like(x))
            got = fs.cross_entropy_backward(
                np.arange(shape[0]), y, labels, reduction="none", out=into
            )
            assert got is into
            assert_same_bits(np.ascontiguousarray(into), dx)
            got = fs.cross_entropy_backward(
                np.arange(shape[0]), y, labels[::-1].copy()[::-1], reduction="none", out=y
            )
            assert got is y
            assert_same_bits(np.ascontiguousarray(y), dx, "in place")
        assert_same_bits(fs.cross_entropy(x.T, labels, 0, reduction="none"), want)


@pytest.mark.parametrize("kind", "bhilqBHILQ")
def test_labels_of_any_integer_type(isa, kind):
    x, labels = a_case((20, 9), -1, F32)
    ignored = -100 if kind.islower() else 100
    given = np.where(labels < 0, ignored, labels).astype(kind)
    for function in (fs.cross_entropy, functools.partial(fs.cross_entropy_backward, 1.0)):
        assert_same_bits(function(x, given, ignore_index=ignored), function(x, labels))
    assert_same_bits(fs.cross_entropy(x, labels.tolist()), fs.cross_entropy(x, labels))


@every_dtype
def test_reductions_and_weights(isa, dtype):
    """Against the oracle: one rounding of the result, and the losses' own errors."""
    x, labels = a_case((6, 9, 4), 1, dtype)
    weight = rng("weight").random(9).astype(F32)
    within = {"rtol": 4 * one_ulp(np.ones(()), dtype), "atol": 0}
    for w, smoothing in itertools.product((None, weight), (0, 0.1, 1)):
        for reduction in ("mean", "sum", "none"):
            options = {"weight": w, "reduction": reduction, "label_smoothing": smoothing}
            got = fs.cross_entropy(x, labels, 1, **options)
            want = reference.cross_entropy(x, labels, 1, **options)
            assert got.dtype == dtype
            np.testing.assert_allclose(np.asarray(got, F64), want, **within)
            grad = normal(labels.shape, dtype, 1.0) if reduction == "none" else 0.7
            got = fs.cross_entropy_backward(grad, x, labels, 1, **options)
            want = reference.cross_entropy_backward(grad, x, labels, 1, **options)
            # With smoothing a difference of two parts: its error is that of the larger one.
            size = np.abs(want).max() if smoothing else SMALLEST_SUBNORMAL[dtype]
            near = within["rtol"] * (size if smoothing else 1)
            np.testing.assert_allclose(
                got.astype(F64), want, rtol=within["rtol"], atol=near if smoothing else size
            )


def test_against_differences(isa):
    x, labels = a_case((6, 9), -1, F64)
    weight, step = rng("weight").random(9), 1e-6
    for options in (
        {}, {"weight": weight}, {"weight": weight, "reduction": "sum"}, {"label_smoothing": 0.2},
        {"weight": weight, "label_smoothing": 0.7},
    ):  # fmt: skip
        way = rng("way").normal(size=x.shape)
        up, down = (fs.cross_entropy(x + s * way, labels, **options) for s in (step, -step))
        got = np.sum(fs.cross_entropy_backward(1.0, x, labels, **options) * way)
        assert abs(got - (up - down) / (2 * step)) < 1e-8


def test_against_torch(isa):
    torch = pytest.importorskip("torch")
    from fastsoftmax.compat.torch import cross_entropy

    for shape in ((5,), (6, 9), (3, 7, 4), (2, 5, 3, 4)):
        axis = min(1, len(shape) - 1)
        x, labels = a_case(shape, axis, F32)
        weight = rng("weight").random(shape[axis]).astype(F32)
        labels = np.abs(labels) if len(shape) == 1 else labels
        labels = np.where(labels >= shape[axis], 0, labels)
        for reduction in ("mean", "sum", "none"):
            for w, smoothing in itertools.product((None, weight), (0.0, 0.1, 1.0)):
                t = torch.from_numpy(x).requires_grad_()
                want = torch.nn.functional.cross_entropy(
                    t, torch.tensor(labels), None if w is None else torch.from_numpy(w),
                    reduction=reduction, label_smoothing=smoothing,
                )  # fmt: skip
                got = cross_entropy(x, labels, w, reduction=reduction, label_smoothing=smoothing)
                np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-5, atol=1e-6)
                grad = np.ones(want.shape, F32)
                want.backward(torch.from_numpy(grad))
                got = fs.cross_entropy_backward(
                    grad, x, labels, axis, weight=w, reduction=reduction, label_smoothing=smoothing
                )
                np.testing.assert_allclose(got, t.grad.numpy(), rtol=1e-5, atol=1e-7)


# --- special values -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 5), (8, 40), (8, 3000)], ids=str)
@every_dtype
def test_special(isa, dtype, shape):
    """Rows with NaN, +inf, -inf only; -inf at the label; ignored rows, whatever they hold."""
    x, _ = a_case(shape, -1, dtype)
    clean, labels = x.copy(), np.array([1, 1, 1, 1, -100, 2, 2, 2])
    x[0, 2], x[1, 0], x[2], x[3, 1], x[4, 3], x[5, 0] = (
        np.nan,
        np.inf,
        -np.inf,
        -np.inf,
        np.nan,
        -np.inf,
    )
    want = reference.cross_entropy(x, labels, reduction="none")
    np.testing.assert_array_equal(
        np.isnan(want), [True, True, True, False, False, False, False, False]
    )
    got = fs.cross_entropy(x, labels, reduction="none")
    assert_canonical_nan(got[:3])
    assert got[3] == np.inf and got[4] == 0
    assert_same_bits(got[6:], fs.cross_entropy(clean, labels, reduction="none")[6:])
    dx = fs.cross_entropy_backward(np.full(8, 0.5), x, labels, reduction="none")
    assert_canonical_nan(dx[:3])
    assert dx[3, 1] == -0.5 and not dx[4].any() and dx[5, 0] == 0
    before = fs.cross_entropy_backward(np.full(8, 0.5), clean, labels, reduction="none")
    assert_same_bits(dx[6:], before[6:])
    assert_canonical_nan(fs.cross_entropy_backward(np.nan, x[6:], labels[6:]))


@pytest.mark.parametrize("shape", [(40, 7), (3, 100), (2, 5000)], ids=str)
@every_dtype
def test_infinite_gradients(isa, dtype, shape):
    """Of the loss. Where exp is 0 they become NaN, the one that we have; rows are of their own."""
    x = np.zeros(shape, dtype)
    x[:, 1] = -1000
    grad, labels = np.ones(shape[0]), np.zeros(shape[0], int)
    for smoothing in (0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        want = fs.cross_entropy_backward(grad, x, labels, **options)
        for grad[1] in (np.inf, -np.inf, np.nan):
            got = fs.cross_entropy_backward(grad, x, labels, **options)
            assert_canonical_nan(got[1, [1]])
            odd = np.isnan(got[1].astype(np.float64))
            assert_canonical_nan(got[1, odd])
            assert np.isinf(got[1, ~odd].astype(np.float64)).all()
            for rows in (slice(1), slice(2, None)):
                assert_same_bits(got[rows], want[rows])


def test_smoothing_of_special_values(isa):
    """As in PyTorch: an excluded class costs infinitely much, or NaN if its weight is 0."""
    x = np.array([[1, 2, -np.inf], [-np.inf, 1, 2], [0, np.nan, 1], [np.inf, 0, 0], [0, 1, 2]], F32)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    labels = [0, 0, 1, 0, -100]
    got = fs.cross_entropy(x, labels, **options)
    np.testing.assert_array_equal(got, [np.inf, np.inf, np.nan, np.nan, 0])
    assert np.isnan(fs.cross_entropy(x, labels, **options, weight=[1, 2, 0])[0])
    np.testing.assert_array_equal(got, reference.cross_entropy(x, labels, **options).astype(F32))
    dx = fs.cross_entropy_backward(np.ones(5), x, labels, **options)
    want = reference.cross_entropy_backward(np.ones(5), x, labels, **options)
    np.testing.assert_allclose(dx, want, 1e-6, 1e-7)
    assert not dx[4].any() and not bits(dx[4]).any()
    far = fs.cross_entropy(x[4:] + F32.type(1e6), [2], label_smoothing=0.1)
    assert far == fs.cross_entropy(x[4:], [2], label_smoothing=0.1)


@every_dtype
def test_smoothing_keeps_to_its_arrays(isa, dtype):
    """In place, of another type, of any strides: the same numbers as into a fresh array."""
    x, labels = a_case((20, 70), -1, dtype)
    options = {"label_smoothing": 0.3, "weight": rng("weight").random(70), "reduction": "sum"}
    want = fs.cross_entropy_backward(1.5, x, labels, **options)
    y = x.copy()
    assert fs.cross_entropy_backward(1.5, y, labels, **options, out=y) is y
    assert_same_bits(y, want)
    wide = np.full((20, 140), 7, dtype)
    fs.cross_entropy_backward(1.5, x, labels, **options, out=wide[:, ::2])
    assert_same_bits(wide[:, ::2].copy(), want)
    assert (wide[:, 1::2] == 7).all()
    got = fs.cross_entropy_backward(1.5, x.T, labels, 0, **options).T
    assert_same_bits(np.ascontiguousarray(got), want)
    for empty, none in ((np.zeros((0, 5), dtype), []), (np.zeros((3, 0), dtype), [-100] * 3)):
        assert fs.cross_entropy(empty, none, label_smoothing=0.5, reduction="sum") == 0
        assert fs.cross_entropy_backward(1, empty, none, label_smoothing=0.5).shape == empty.shape


def test_nothing(isa):
    empty = np.zeros((0, 5), F32)
    assert np.isnan(fs.cross_entropy(empty, np.zeros(0, int)))
    assert fs.cross_entropy(empty, [], reduction="sum") == 0
    assert fs.cross_entropy_backward(1.0, empty, []).shape == (0, 5)
    x = np.ones((3, 5), F16)
    assert np.isnan(fs.cross_entropy(x, [-100] * 3))
    assert not fs.cross_entropy_backward(1.0, x, [-100] * 3).any()
    none = np.zeros((3, 0))
    assert not fs.cross_entropy(none, [-100] * 3, reduction="none").any()
    assert type(fs.cross_entropy(x[0], 2)) is np.float16
    assert fs.cross_entropy(np.array([1, 2, 3]), 2).dtype == F64


@pytest.mark.parametrize("at", ["start", "end"])
@every_dtype
def test_guard_pages(isa, dtype, at):
    pages = [GuardedPages(1 << 17) for _ in range(3)]
    for shape, axis in (((1, 1), -1), ((5, 7), -1), ((5, 7), 0), ((3, 65), -1), ((33, 40), 0)):
        x, labels = a_case(shape, axis, dtype)
        gx, gl = pages[0].copy_of(x, at), pages[1].copy_of(labels, at)
        out = pages[2].array(shape, dtype, at)
        fs.cross_entropy_backward(1.0, gx, gl, axis, out=out)
        assert_same_bits(out, fs.cross_entropy_backward(1.0, x, labels, axis))
        assert_same_bits(fs.cross_entropy(gx, gl, axis), fs.cross_entropy(x, labels, axis))


# --- errors ---------------------------------------------------------------------------------------

X, LABELS = np.ones((3, 4, 5), F32), np.zeros((3, 4), int)


@pytest.mark.parametrize(
    "error, words, x, labels, options",
    [
        (ValueError, ("labels", "0 to 4", "5"), X, LABELS + 5, {}),
        (ValueError, ("labels", "-1"), X, LABELS - 1, {}),
        (ValueError, ("labels", "-100"), X, LABELS - 100, {"ignore_index": -1}),
        (ValueError, ("labels", "(3, 4)", "(3, 5)"), X, np.zeros((3, 5), int), {}),
        (TypeError, ("labels", "float64"), X, LABELS + 0.0, {}),
        (TypeError, ("labels", "bool"), X, LABELS > 0, {}),
        (TypeError, ("labels", "MaskedArray"), X, np.ma.masked_array(LABELS), {}),
        (TypeError, ("logits", "complex"), X + 0j, LABELS, {}),
        (ValueError, ("logits", "()"), 1.0, 0, {}),
        (np.exceptions.AxisError, ("3",), X, LABELS, {"axis": 3}),
        (TypeError, ("axis",), X, LABELS, {"axis": (0, 1)}),
        (TypeError, ("ignore_index",), X, LABELS, {"ignore_index": 0.5}),
        (ValueError, ("reduction", "'max'"), X, LABELS, {"reduction": "max"}),
        (ValueError, ("weight", "(5,)", "(4,)"), X, LABELS, {"weight": np.ones(4)}),
        (TypeError, ("weight", "bool"), X, LABELS, {"weight": np.ones(5, bool)}),
        (ValueError, ("label_smoothing", "1.1"), X, LABELS, {"label_smoothing": 1.1}),
        (ValueError, ("label_smoothing", "-0.1"), X, LABELS, {"label_smoothing": -0.1}),
        (ValueError, ("label_smoothing", "nan"), X, LABELS, {"label_smoothing": np.nan}),
        (TypeError, ("label_smoothing", "str"), X, LABELS, {"label_smoothing": "x"}),
        (TypeError, ("label_smoothing", "ndarray"), X, LABELS, {"label_smoothing": np.ones(3)}),
    ],
)
def test_errors(error, words, x, labels, options):
    out = np.full(np.shape(x), 7, F32)
    for call in (
        lambda: fs.cross_entropy(x, labels, **options),
        lambda: fs.cross_entropy_backward(1.0, x, labels, **options, out=out),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value), caught.value
    assert (out == 7).all()


def test_errors_of_backward():
    for grad, options, error, word in (
        (np.ones(3), {}, ValueError, "grad"),
        (1.0, {"reduction": "none"}, ValueError, "grad"),
        ("x", {}, TypeError, "grad"),
        (1.0, {"out": np.ones((3, 4, 6), F32)}, ValueError, "out"),
        (1.0, {"out": np.ones((3, 4, 5), int)}, TypeError, "out"),
        (1.0, {"out": [1.0]}, TypeError, "out"),
    ):
        with pytest.raises(error, match=word):
            fs.cross_entropy_backward(grad, X, LABELS, **options)


def test_torch_refuses():
    from fastsoftmax.compat.torch import cross_entropy

    with pytest.raises(NotImplementedError, match="probabilities"):
        cross_entropy(X, X)
    with pytest.raises(TypeError, match="reduction="):
        cross_entropy(X, LABELS, reduce=True)


def test_out_of_another_type(isa):
    """out= decides the type, also that of the calculation."""
    x, labels = a_case((5, 40), -1, F32)
    for dtype in FLOATS:
        out = np.empty(x.shape, dtype)
        fs.cross_entropy_backward(1.0, x, labels, out=out)
        want = fs.cross_entropy_backward(1.0, x.astype(F64) if dtype == F64 else x, labels)
        exact = want.astype(F32) if dtype in HALVES else want
        assert_same_bits(
            out, exact.astype(dtype) if dtype != ml_dtypes.bfloat16 else exact.astype(BF16)
        )
