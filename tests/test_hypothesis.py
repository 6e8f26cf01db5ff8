"""Random everything against the oracle: shapes, dtypes, axes, strides, masks, nasty values."""

import numpy as np
from common import (
    BF16,
    EPSILON,
    F64,
    FLOATS,
    HALVES,
    SMALLEST_SUBNORMAL,
    WIDE,
    assert_canonical_nan,
    compute_type,
    one_ulp,
    relative_to,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastsoftmax as fs
from fastsoftmax import reference

# In ulp of the result: crafted rows are allowed 3.5 (test_accuracy.py). Logarithms in ulp of their
# largest term. An oracle that is no wider than float64 errs, too.
ULP, HALF_ULP, LOG_ULP = (3.0, 0.51, 2.0) if WIDE is np.longdouble else (6.0, 0.51, 4.0)

BACKWARD = 8.0  # half-ulp of the terms: test_accuracy.py

NASTY = (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, 1e-310, 88.7, -87.3, -103.9, 104.0,
         -745.0, 709.7, 65504.0, 1e30, -1e30, 3.4e38, 1e300, -1e300)  # fmt: skip


def quiet_cast(a, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(a, F64).astype(dtype)


@st.composite
def values(draw, shape, special=0.1):
    """Gaussian logits of one scale and offset, a part of them replaced by nasty ones."""
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0, 1000.0]))
    offset = draw(st.sampled_from([0.0, 0.0, 5.5, -300.0, 1e5, 3e6]))
    a = offset + scale * r.standard_normal(shape)
    nasty = r.random(shape) < draw(st.sampled_from([0.0, 0.0, special, 0.5]))
    return np.where(nasty, r.choice(NASTY, shape), a)


@st.composite
def strided(draw, a):
    """The same values in another memory layout: permuted axes, gaps, negative steps."""
    a = np.asarray(a)
    order = draw(st.permutations(range(a.ndim)))
    steps = [draw(st.sampled_from([1, 1, -1, 2, -3])) for _ in range(a.ndim)]
    shape = [a.shape[k] * abs(steps[k]) for k in order]
    base = np.zeros(shape, a.dtype).transpose(np.argsort(order))
    view = base[(*(slice(None, None, s) for s in steps), ...)]
    view[...] = a
    return view


def some_axes(draw, ndim):
    choices = [st.none()]
    if ndim:
        choices.append(st.integers(-ndim, ndim - 1))
        choices.append(hnp.valid_tuple_axes(ndim))
    return draw(st.one_of(choices))


def part_of(draw, shape):
    """A shape that broadcasts to `shape`: some lengths become 1, leading ones may go."""
    shape = tuple(1 if draw(st.booleans()) else n for n in shape)
    return shape[draw(st.integers(0, len(shape))) :]


@st.composite
def calls(draw):
    """(x, axis, keyword arguments) of the softmax family."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=7))
    if shape and draw(st.booleans()):  # one long side, so that vectors fill
        side = draw(st.integers(0, len(shape) - 1))
        longer = draw(st.sampled_from([15, 16, 33, 64, 100, 150]))
        shape = tuple(longer if k == side else min(n, 3) for k, n in enumerate(shape))
    x = draw(strided(quiet_cast(draw(values(shape)), dtype)))
    axis = some_axes(draw, len(shape))
    kwargs = {}
    if draw(st.booleans()):
        bias_dtype = draw(st.sampled_from(FLOATS))
        bias = quiet_cast(draw(values(part_of(draw, shape), 0.2)), bias_dtype)
        kwargs["bias"] = draw(strided(bias))
    if draw(st.booleans()):
        part = part_of(draw, shape)
        r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        kwargs["where"] = draw(strided(r.random(part) < draw(st.sampled_from([0.1, 0.5, 0.9]))))
    if draw(st.booleans()):
        kwargs["temperature"] = draw(st.sampled_from([0.5, 1, 3, 0.07, np.float32(1.7), 1e-3]))
    return x, axis, kwargs


def assert_same_specials(got, true, dtype):
    """NaN where the oracle has NaN (the canonical one), the same infinities."""
    got, true = np.atleast_1d(got), np.atleast_1d(true)
    assert np.array_equal(np.isnan(got), np.isnan(true))
    assert_canonical_nan(got[np.isnan(got)])
    overflowed = np.isfinite(true) & (np.abs(true) > largest(dtype))  # finite for the oracle only
    for infinity in (np.inf, -np.inf):
        assert np.array_equal((got == infinity)[~overflowed], (true == infinity)[~overflowed])


def largest(dtype):
    return np.finfo(dtype).max if dtype != BF16 else float.fromhex("0x1.fep127")


def logits_of(x, bias, temperature):
    """z in the compute type, and its largest finite magnitude, for the scale of a logarithm."""
    inner = compute_type(x.dtype).type
    r = WIDE(inner(1.0 / np.float64(1 if temperature is None else temperature)))
    with np.errstate(all="ignore"):
        z = x.astype(WIDE) * r
        if bias is not None:
            z = z + bias.astype(inner).astype(WIDE)
        return z.astype(inner)


@given(call=calls())
def test_softmax(isa, call):
    x, axis, kwargs = call
    bound = HALF_ULP if x.dtype in HALVES else ULP
    for name in ("softmax", "softmin"):
        with np.errstate(all="ignore"):
            true = getattr(reference, name)(x, axis, **kwargs, precise=WIDE)
        got = getattr(fs, name)(x, axis, **kwargs)
        assert got.shape == x.shape and got.dtype == x.dtype
        assert_same_specials(got, true, x.dtype)
        finite = np.isfinite(np.atleast_1d(true))
        errors = reference.ulp_error(
            np.atleast_1d(got)[finite], np.atleast_1d(true)[finite], x.dtype
        )
        assert np.max(errors, initial=0) <= bound
        excluded = np.broadcast_to(~kwargs.get("where", np.True_), x.shape)
        assert not np.asarray(got)[excluded].any()


@given(call=calls())
def test_log_softmax(isa, call):
    x, axis, kwargs = call
    with np.errstate(all="ignore"):
        true = np.atleast_1d(reference.log_softmax(x, axis, **kwargs, precise=WIDE))
    got = np.atleast_1d(fs.log_softmax(x, axis, **kwargs))
    assert got.dtype == x.dtype and got.shape == true.shape
    assert_same_specials(got, true, x.dtype)
    z = logits_of(x, kwargs.get("bias"), kwargs.get("temperature")).astype(WIDE)
    m = np.abs(z[np.isfinite(z)]).max(initial=1)
    assert_close_logarithms(got, true, m, x.dtype)


def assert_close_logarithms(got, true, m, dtype):
    finite = np.isfinite(true) & np.isfinite(got.astype(WIDE))
    got, true, m = got[finite].astype(WIDE), true[finite], np.broadcast_to(m, true.shape)[finite]
    inner = EPSILON[compute_type(dtype)]
    bound = LOG_ULP * inner * np.maximum(m, np.abs(true)) + SMALLEST_SUBNORMAL[dtype]
    if dtype in HALVES:
        bound = bound + 0.5 * EPSILON[dtype] * np.abs(true)
    assert (np.abs(got - true) <= bound).all()


def check_within(got, true, bound, inner):
    """A bound in the compute type; where that is not the type of the result it is rounded again."""
    got, true, dtype = np.asarray(got), np.asarray(true), got.dtype
    if dtype != inner:
        bound = bound + one_ulp(np.where(np.isfinite(true), true, 0), dtype)
    beyond = np.isinf(got) & (np.copysign(1, got) * true + bound >= largest(dtype))
    errors = np.where(beyond, 0, relative_to(bound, got, true))
    assert np.all(errors <= 1), f"error {np.max(errors)} of the bound"


def size_of_gradients(log, grad, y, axis, temperature=None):
    """What the error of (log_)softmax_backward is measured by: the sum of its terms' sizes."""
    g, y, r, axes = reference._gradients(grad, y, axis, temperature, WIDE)
    part = y != (-np.inf if log else 0)
    w = np.exp(y) if log else y
    terms = np.where(part, np.abs(g) * (1 if log else w), 0)
    size = np.abs(g) * (1 if log else w) + w * np.sum(terms, axes, keepdims=True)
    return r * np.where(part, size, 0)


def check_gradients(got, true, size, inner):
    bound = BACKWARD / 2 * EPSILON[inner] * size + 2 * SMALLEST_SUBNORMAL[got.dtype]
    check_within(got, true, bound, inner)


@given(call=calls(), keepdims=st.booleans())
def test_logsumexp(isa, call, keepdims):
    x, axis, kwargs = call
    where = kwargs.get("where")
    with np.errstate(all="ignore"):
        true = reference.logsumexp(x, axis, where=where, keepdims=keepdims, precise=WIDE)
    got = fs.logsumexp(x, axis, where=where, keepdims=keepdims)
    assert got.dtype == x.dtype and np.shape(got) == np.shape(true)
    got, true = np.atleast_1d(got), np.atleast_1d(true)
    assert_same_specials(got, true, x.dtype)
    z = x.astype(WIDE)
    assert_close_logarithms(got, true, np.abs(z[np.isfinite(z)]).max(initial=1), x.dtype)


@given(call=calls())
def test_weighted_logsumexp(isa, call):
    """With weights of either sign: as good as the cancellation among the terms allows."""
    x, axis, kwargs = call
    b, where = kwargs.get("bias", np.float32(-2)), kwargs.get("where")
    with np.errstate(all="ignore"):
        true, true_sign = reference.logsumexp(
            x, axis, b=b, where=where, return_sign=True, precise=WIDE
        )
        magnitude = reference.logsumexp(x, axis, b=np.abs(b), where=where, precise=WIDE)
        cancellation = np.atleast_1d(np.exp(magnitude - true))
    got, sign = fs.logsumexp(x, axis, b=b, where=where, return_sign=True)
    assert got.dtype == sign.dtype == x.dtype and np.shape(got) == np.shape(sign) == np.shape(true)
    got, sign, true, true_sign = map(np.atleast_1d, (got, sign, true, true_sign))
    settled = ~(cancellation > 1e3)  # beyond, the sign and even -inf may go either way
    got, sign, true, true_sign = got[settled], sign[settled], true[settled], true_sign[settled]
    assert_same_specials(got, true, x.dtype)
    assert np.array_equal(sign.astype(F64), true_sign.astype(F64), equal_nan=True)
    z = x.astype(WIDE)
    m = np.abs(z[np.isfinite(z)]).max(initial=1) + 2 * cancellation[settled]
    assert_close_logarithms(got, true, m, x.dtype)


@given(call=calls(), data=st.data())
def test_backward(isa, call, data):
    x, axis, kwargs = call
    temperature = kwargs.get("temperature")
    grad = data.draw(strided(quiet_cast(data.draw(values(x.shape)), x.dtype)))
    for forward, name in (
        (fs.softmax, "softmax_backward"),
        (fs.log_softmax, "log_softmax_backward"),
    ):
        y = data.draw(strided(forward(x, axis, **kwargs)))
        with np.errstate(all="ignore"):
            true = np.atleast_1d(
                getattr(reference, name)(grad, y, axis, temperature=temperature, precise=WIDE)
            )
        got = np.atleast_1d(getattr(fs, name)(grad, y, axis, temperature=temperature))
        assert got.dtype == x.dtype and got.shape == true.shape
        masked = np.atleast_1d(y == 0 if forward is fs.softmax else np.isneginf(y))
        assert not got[masked].any(), "an excluded entry has a gradient"
        # Finite gradients that stay finite: the same specials. (Sums of 1e300 may overflow or not.)
        if np.abs(grad[np.isfinite(grad)].astype(F64)).max(initial=0) < 1e30:
            nan = np.isnan(true)
            assert np.isnan(got[nan]).all()
            assert_canonical_nan(got[np.isnan(got)])
            with np.errstate(all="ignore"):
                log = forward is fs.log_softmax
                size = np.atleast_1d(size_of_gradients(log, grad, y, axis, temperature))
                check_gradients(got[~nan], true[~nan], size[~nan], compute_type(x.dtype))


@given(call=calls(), data=st.data())
def test_out_and_layout_change_nothing(isa, call, data):
    """The same call on contiguous copies, with and without `out`, gives the same bits."""
    x, axis, kwargs = call
    plain = {
        k: np.array(v, order="C") if isinstance(v, np.ndarray) else v for k, v in kwargs.items()
    }
    want = np.asarray(fs.softmax(np.array(x, order="C"), axis, **plain))
    out = data.draw(strided(np.zeros(x.shape, x.dtype)))
    assert fs.softmax(x, axis, **kwargs, out=out) is out
    assert out.tobytes() == want.tobytes()
    work = data.draw(strided(x))
    fs.softmax(work, axis, **kwargs, out=work)
    assert work.tobytes() == want.tobytes()
