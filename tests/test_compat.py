"""fastsoftmax.compat: the peers' names and semantics, compared with the peers where they are there.

SciPy, PyTorch, pandas and xarray are not requirements of the tests: what needs one is skipped
without it.
"""

import inspect
import subprocess
import sys
import warnings
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from common import (
    BF16,
    EPSILON,
    F16,
    F32,
    F64,
    FLOATS,
    SINGLES,
    assert_same_bits,
    normal,
    rng,
    unaligned,
)

import fastsoftmax as fs
from fastsoftmax.compat import scipy as ours_scipy
from fastsoftmax.compat import torch as ours_torch


@pytest.fixture(scope="module")
def special():
    return pytest.importorskip("scipy.special")


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def assert_close(got, want, ulps, what=""):
    """The same type, dtype, shape, NaN and infinities; otherwise within ulps of max(1, |want|)."""
    assert type(got) is type(want), (what, type(got), type(want))
    assert got.dtype == want.dtype, (what, got.dtype, want.dtype)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    eps = EPSILON[np.dtype(got.dtype)]
    got, want = np.asarray(got, F64), np.asarray(want, F64)
    np.testing.assert_allclose(got, want, ulps * eps, ulps * eps, equal_nan=True, err_msg=str(what))


def quietly(function, *args, **options):
    """What a peer returns, without its floating-point warnings."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(*args, **options)


# --- the package ----------------------------------------------------------------------------------


def test_import_is_on_demand():
    """fastsoftmax does not import compat, and compat does not import the peers."""
    code = """
import sys, fastsoftmax
assert not [name for name in sys.modules if name.startswith("fastsoftmax.compat")]
import fastsoftmax.compat
assert "fastsoftmax.compat.torch" not in sys.modules
import fastsoftmax.compat.scipy, fastsoftmax.compat.torch
assert not {"scipy", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_scipy_signatures(special, name):
    """The same parameters, in the same order, with the same defaults."""
    ours = inspect.signature(getattr(ours_scipy, name))
    assert ours == inspect.signature(getattr(special, name))


SIGNATURES = {
    "cross_entropy": "(input, target, weight=None, size_average=None, ignore_index=-100, "
    "reduce=None, reduction='mean', label_smoothing=0.0)",
    "softmax": "(input, dim, dtype=None)",
    "log_softmax": "(input, dim, dtype=None)",
    "softmin": "(input, dim, dtype=None)",
    "logsumexp": "(input, dim, keepdim=False)",
    "gumbel_softmax": "(logits, tau=1, hard=False, eps=1e-10, dim=-1, *, rng=None)",
    "scaled_dot_product_attention": "(query, key, value, attn_mask=None, dropout_p=0.0,"
    " is_causal=False, scale=None, enable_gqa=False)",
}


def test_torch_signatures():
    assert sorted(SIGNATURES) == ours_torch.__all__
    for name, signature in SIGNATURES.items():
        assert str(inspect.signature(getattr(ours_torch, name))) == signature


# --- SciPy ----------------------------------------------------------------------------------------

SCIPY_ULPS = {F32: 8, F64: 8}  # SciPy's own error, on these rows, is most of it
SHAPES_AND_AXES = [
    ((), [None, 0, -1]),
    ((1,), [None, 0, -1]),
    ((7,), [None, 0, -1, (0,)]),
    ((3, 5), [None, 0, 1, -2, (0, 1), (1, 0), (-1,), ()]),
    ((2, 1, 9), [None, 0, 1, 2, (0, 2), (2, 0, 1), (-3, -2)]),
    ((2, 3, 4, 5), [None, 1, (1, 3), (0, -1), (3, 2, 1, 0)]),
]
GRID = [(shape, axis) for shape, axes in SHAPES_AND_AXES for axis in axes]
grid = pytest.mark.parametrize(("shape", "axis"), GRID, ids=str)
singles = pytest.mark.parametrize("dtype", SINGLES, ids=lambda dtype: dtype.name)


@grid
@singles
def test_scipy_softmax(special, shape, axis, dtype):
    x = np.asarray(normal(shape, dtype))
    for name in ("softmax", "log_softmax"):
        got, want = (getattr(module, name)(x, axis=axis) for module in (ours_scipy, special))
        if x.ndim == 0:  # SciPy: a scalar of log_softmax, an array or a scalar of softmax
            got, want = got[()], want[()]
        assert_close(got, want, SCIPY_ULPS[dtype], name)
        assert_same_bits(got, getattr(fs, name)(x, axis))


@grid
@singles
@pytest.mark.parametrize("keepdims", [False, True])
def test_scipy_logsumexp(special, shape, axis, dtype, keepdims):
    x = np.asarray(normal(shape, dtype))
    b = np.asarray(normal(shape, dtype, 3.0, "b"))
    for weights, signed in product((None, abs(b), b, np.where(b > 0, b, 0)), (False, True)):
        options = {"axis": axis, "b": weights, "keepdims": keepdims, "return_sign": signed}
        got, want = ours_scipy.logsumexp(x, **options), special.logsumexp(x, **options)
        pairs = zip(got, want, strict=True) if signed else [(got, want)]
        for one, other in pairs:
            if x.ndim == 0:  # differs: SciPy's has one dimension with keepdims, or axis=()
                assert np.ndim(one) == 0
                other = other.reshape(())[()]
            # Weights of both signs cancel: SciPy's error grows, as does ours.
            assert_close(one, other, 100 if weights is b else SCIPY_ULPS[dtype], options)


@pytest.mark.parametrize("b_dtype", ["?", "b", "H", "i", "l", "f", "d"])
@pytest.mark.parametrize("a_dtype", ["?", "B", "i", "l", "f", "d"])
def test_scipy_logsumexp_promotes(special, a_dtype, b_dtype):
    a, b = np.array([1, 0, 1], a_dtype), np.array([[1, 1, 0], [0, 1, 1]], b_dtype)
    got, want = ours_scipy.logsumexp(a, b=b), special.logsumexp(a, b=b)
    assert_close(got, want, 4)
    assert_close(ours_scipy.logsumexp(a, 1, b), special.logsumexp(a, 1, b), 4)
    assert_close(ours_scipy.logsumexp(b, 0, a), special.logsumexp(b, 0, a), 4)
    for number in (2, 0.5, True, np.float64(2), np.float32(2), [1, 2, 3]):
        assert_close(ours_scipy.logsumexp(a, b=number), special.logsumexp(a, b=number), 4, number)
        assert_close(ours_scipy.logsumexp(number, b=a), special.logsumexp(number, b=a), 4, number)
    assert_close(ours_scipy.logsumexp(1, b=2), special.logsumexp(1, b=2), 4)


def test_scipy_logsumexp_of_halves():
    for a, b, want in (
        (F16, F16, F16),
        (F16, "b", F16),
        (F16, F32, F32),
        (F16, "l", F64),
        (F32, BF16, F32),
        (BF16, BF16, BF16),
        (BF16, "l", BF16),
        (BF16, F64, BF16),
    ):
        got = ours_scipy.logsumexp(np.ones(4, a), b=np.ones(4, b))
        assert got.dtype == want, (a, b)
        assert float(got) == pytest.approx(1 + np.log(4), rel=EPSILON[BF16])
    assert ours_scipy.logsumexp(np.ones(4, BF16), b=0.5).dtype == BF16
    assert ours_scipy.logsumexp(np.ones(4, BF16)).dtype == BF16


INF, NAN = np.inf, np.nan
SPECIAL_ROWS = [[a, b, c] for a, b, c in product((-INF, -1e308, 0.0, 3.5, INF, NAN), repeat=3)]


def test_scipy_softmax_special_values(special):
    x = np.array(SPECIAL_ROWS)
    assert_close(ours_scipy.softmax(x, 1), quietly(special.softmax, x, 1), 2)
    sane = (x < INF).all(1) | np.isnan(x).any(1)  # what differs with +inf is tested below
    x = x[sane]
    assert_close(ours_scipy.log_softmax(x, 1), quietly(special.log_softmax, x, 1), 2)


@pytest.mark.parametrize("signed", [False, True])
def test_scipy_logsumexp_special_values(special, signed):
    """Everything but what the list of differences names."""
    a = np.array(SPECIAL_ROWS)
    for b in (None, *product((-INF, -2.0, -0.0, 1.0, 3.0, INF, NAN), repeat=3)):
        got = ours_scipy.logsumexp(a, 1, b, return_sign=signed)
        want = quietly(special.logsumexp, a, 1, b, return_sign=signed)
        got, want = (got, want) if signed else ([got], [want])
        w = np.ones(3) if b is None else np.array(b)
        underflows = (np.isinf(w) & (a == -1e308)).any(1)
        hides = ((w == 0) & (np.isnan(a) | (a == INF))).any(1)
        same = ~underflows & (~hides | np.isfinite(want[0]))
        if not signed:  # negative, but in SciPy 0
            same &= ~((want[0] == -INF) & ((w < 0) & (a == -1e308)).any(1))
        for one, other in zip(got, want, strict=True):
            assert_close(one[same], other[same], 4, b)
        shown = ours_scipy.logsumexp(np.where(w == 0, 0, a), 1, b, return_sign=signed)
        for one, other in zip(got, shown if signed else [shown], strict=True):
            assert_same_bits(one, other, b)


def test_scipy_sign_of_a_small_sum(special):
    for x in (np.array([-1000.0, -1001.0]), np.array([-200.0], F32), np.array([-INF, -1e308])):
        got, want = (f(x, return_sign=True) for f in (ours_scipy.logsumexp, special.logsumexp))
        assert got[1] == want[1] == 1


def test_scipy_zero_weights_hide(special):
    for hidden in (INF, NAN, -INF, 1e308):
        a, b = [1.0, hidden, 2.0], [1, 0, -1]
        got = ours_scipy.logsumexp(a, b=b, return_sign=True)
        assert got[1] == -1
        assert got == ours_scipy.logsumexp([1.0, 2.0], b=[1, -1], return_sign=True)
        assert got == pytest.approx(special.logsumexp(a, b=b, return_sign=True), rel=1e-15)
        assert np.isnan(ours_scipy.logsumexp(a, b=b))  # negative, and no sign to say so
        assert ours_scipy.logsumexp(a, b=np.array(b, bool)) == ours_scipy.logsumexp([1.0, 2.0])


def test_scipy_layouts(special):
    x = normal((4, 5, 6), F32)
    for view in (x.T, x[::-1, ::2], np.asfortranarray(x), unaligned(x), x.astype(">f4")):
        for axis in (None, 0, (0, 2)):
            want = special.softmax(np.ascontiguousarray(view, F32), axis)
            assert_close(ours_scipy.softmax(view, axis), want, 8)
            want = special.logsumexp(np.ascontiguousarray(view, F32), axis, [2.0] * view.shape[2])
            assert_close(
                ours_scipy.logsumexp(view, axis, [2.0] * view.shape[2]).astype(F64), want, 8
            )


def test_scipy_errors(special):
    for axis, error in ((2, np.exceptions.AxisError), ((0, 0), ValueError), (1.0, TypeError)):
        for module in (ours_scipy, special):
            for function in (module.softmax, module.log_softmax, module.logsumexp):
                with pytest.raises(error):
                    function(np.ones((2, 3)), axis)
    for module in (ours_scipy, special):
        with pytest.raises(ValueError):
            module.logsumexp(np.ones(3), b=np.ones(2))


def test_scipy_unsupported():
    masked = np.ma.array([1.0, 2.0], mask=[False, True])
    for x in (np.array([1j]), np.longdouble([1]), masked, np.array(["a"]), None):
        if getattr(x, "dtype", None) == F64 and x is not masked:  # longdouble is float64 there
            continue
        for function in (ours_scipy.softmax, ours_scipy.log_softmax, ours_scipy.logsumexp):
            with pytest.raises(TypeError):
                function(x)
        with pytest.raises(TypeError, match=r"^a "):
            ours_scipy.logsumexp(x, b=2.0)
        if x is not None:
            with pytest.raises(TypeError, match=r"^b "):
                ours_scipy.logsumexp(2.0, b=x)


def test_scipy_documented_differences(special):
    """Each, on both sides: the list in the docstring is right."""
    many = np.zeros(100_000, F16)
    assert np.all(quietly(special.softmax, many) == 0)
    assert np.all(ours_scipy.softmax(many) == F16.type(1e-5))
    assert quietly(special.logsumexp, many) == INF
    assert ours_scipy.logsumexp(many) == F16.type(np.log(1e5))
    equal = np.zeros(1000, BF16)
    assert 3.8 < special.softmax(equal).astype(F64).sum() < 4
    assert ours_scipy.softmax(equal).astype(F64).sum() == pytest.approx(1, abs=EPSILON[BF16])
    try:
        assert special.logsumexp(equal).dtype == F64
    except TypeError as refused:  # NumPy, asked by SciPy what kind of type that of ml_dtypes 0.7 is
        assert "must be a NumPy dtype" in str(refused)

    for dtype in "?bBhHiIlL":
        x = np.array([1, 0, 1], dtype)
        assert_same_bits(ours_scipy.softmax(x), fs.softmax(x.astype(F64)))
        assert_same_bits(ours_scipy.log_softmax(x), fs.log_softmax(x.astype(F64)))
    assert quietly(special.softmax, np.array([1, 0], "b")).dtype == F16
    assert np.isnan(quietly(special.softmax, np.array([1, 2, 3], "B"))).any()
    with pytest.raises(TypeError):
        special.softmax(np.array([True]))

    with pytest.raises(ValueError):
        special.softmax(np.empty((2, 0)), 1)
    assert ours_scipy.softmax(np.empty((2, 0)), 1).shape == (2, 0)
    assert special.logsumexp([], return_sign=True) == (-INF, -1)
    assert ours_scipy.logsumexp([], return_sign=True) == (-INF, 0)

    np.testing.assert_array_equal(quietly(special.log_softmax, [INF, 0.0]), [NAN, -INF])
    np.testing.assert_array_equal(ours_scipy.log_softmax([INF, 0.0]), [NAN, NAN])
    assert np.isnan(quietly(special.logsumexp, [-1e308, 0.0], b=[INF, 1]))
    assert ours_scipy.logsumexp([-1e308, 0.0], b=[INF, 1]) == INF
    assert quietly(special.logsumexp, [-1000.0], b=[-1]) == -INF
    assert np.isnan(ours_scipy.logsumexp([-1000.0], b=[-1]))
    assert np.isnan(quietly(special.logsumexp, [INF], b=[0]))
    assert ours_scipy.logsumexp([INF], b=[0]) == -INF
    assert special.logsumexp(1.0, keepdims=True).shape == (1,)
    assert ours_scipy.logsumexp(1.0, keepdims=True).shape == ()


# --- PyTorch --------------------------------------------------------------------------------------

TORCH_ULPS = {F32: 100, F64: 100, F16: 2, BF16: 2}  # its float32 is off by 20 ulp and more


def to_tensor(torch, array):
    array = np.array(array, order="C")  # from_numpy wants it writable, without negative strides
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(torch, tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def functional(torch, name):
    return getattr(torch.nn.functional, name, None) or getattr(torch, name)


floats = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)


@floats
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin", "logsumexp"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 0), (2, 1, 3, 33)], ids=str
)
def test_torch_softmax(torch, name, dtype, shape):
    x = np.asarray(normal(shape, dtype))
    for dim in range(-max(x.ndim, 1), max(x.ndim, 1)):
        want = to_array(torch, functional(torch, name)(to_tensor(torch, x), dim=dim))
        got = getattr(ours_torch, name)(x, dim)
        assert_close(np.asarray(got), want, TORCH_ULPS[dtype], dim)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_torch_dtype(torch, name):
    x = normal((3, 17), F16)
    for dtype in FLOATS:
        tensor_type = getattr(torch, dtype.name)
        want = functional(torch, name)(to_tensor(torch, x), dim=1, dtype=tensor_type)
        got = getattr(ours_torch, name)(x, 1, dtype=dtype)
        assert_close(got, to_array(torch, want), TORCH_ULPS[dtype] if dtype != BF16 else 8)
    assert_same_bits(ours_torch.softmax(x, 1, F32), fs.softmax(x.astype(F32)))


def test_torch_special_values(torch):
    x = np.array(SPECIAL_ROWS)
    for name in ("softmax", "log_softmax", "softmin", "logsumexp"):
        want = functional(torch, name)(to_tensor(torch, x), 1).numpy()
        assert_close(getattr(ours_torch, name)(x, 1), want, 4, name)


def test_torch_logsumexp_dims(torch):
    x = normal((2, 3, 4), F32)
    for dim, keepdim in product((0, -1, (0, 2), [1, 2], (-1, 0, 1)), (False, True)):
        want = torch.logsumexp(to_tensor(torch, x), dim, keepdim).numpy()
        assert_close(np.asarray(ours_torch.logsumexp(x, dim, keepdim)), want, 8)
        assert np.shape(ours_torch.logsumexp(x, dim=dim, keepdim=keepdim)) == want.shape


def test_torch_messages_have_torch_names():
    for name in ("softmax", "log_softmax", "softmin", "logsumexp"):
        function = getattr(ours_torch, name)
        with pytest.raises(TypeError, match=r"^input has dtype object"):
            function(None, 0)
        with pytest.raises(TypeError, match=r"^dim must be an integer, got 1\.5$"):
            function([1.0], 1.5)
    with pytest.raises(TypeError, match=r"^dim must be an integer, got 1\.5$"):
        ours_torch.logsumexp([1.0], [0, 1.5])
    with pytest.raises(TypeError, match=r"^a has dtype object"):
        ours_scipy.logsumexp(None)


def test_torch_dim_is_required():
    x = np.ones((2, 3))
    for name in ("softmax", "log_softmax", "softmin", "logsumexp"):
        function = getattr(ours_torch, name)
        with pytest.raises(TypeError):
            function(x)
        with pytest.raises(TypeError):
            function(x, None)
        with pytest.raises(np.exceptions.AxisError):
            function(x, 2)
        if name != "logsumexp":
            with pytest.raises(TypeError):
                function(x, (0, 1))
    with pytest.raises(TypeError):
        ours_torch.gumbel_softmax(x, dim=None)


# --- gumbel_softmax -------------------------------------------------------------------------------


@floats
@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax(dtype, hard):
    x = normal((4, 5, 6), dtype)
    for dim in range(-3, 3):
        y = ours_torch.gumbel_softmax(x, hard=hard, dim=dim, rng=1)
        assert type(y) is np.ndarray and y.dtype == dtype and y.shape == x.shape
        np.testing.assert_allclose(y.astype(F64).sum(dim), 1, atol=8 * EPSILON[dtype])
        if hard:
            assert np.isin(y.astype(F64), (0, 1)).all()
            assert (y.astype(F64).sum(dim) == 1).all()
    assert_same_bits(y, ours_torch.gumbel_softmax(x, hard=hard, dim=2, rng=1))


def test_gumbel_softmax_is_softmax_of_noisy_logits():
    x = normal((3, 5), F64)
    noise = np.random.default_rng(7).gumbel(size=x.shape)
    for tau in (1, 0.3, 4.0, np.float32(0.5)):
        y = ours_torch.gumbel_softmax(x, tau, rng=7)
        np.testing.assert_allclose(y, fs.softmax((x + noise) / tau), rtol=1e-12)


def test_gumbel_softmax_rng():
    x = np.zeros(8)
    draw = ours_torch.gumbel_softmax
    seeds = 5, np.int64(5), np.random.default_rng(5), np.random.SeedSequence(5), np.random.PCG64(5)
    for rng_like in seeds:
        assert_same_bits(draw(x, rng=rng_like), draw(x, rng=5))
    generator = np.random.default_rng(5)
    assert not np.array_equal(draw(x, rng=generator), draw(x, rng=generator))
    assert not np.array_equal(draw(x), draw(x))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw(x)
    assert np.array_equal(np.random.get_state()[1], before)  # the global state is left alone
    with pytest.raises(TypeError, match=r"^rng must be .* got 'five'$"):
        draw(x, rng="five")


@pytest.mark.parametrize("tau", [0.1, 1, 10])
def test_gumbel_softmax_draws_by_probability(tau):
    """The largest entry is a sample of the categorical distribution, whatever tau is."""
    p, n = np.array([0.0, 0.1, 0.2, 0.7]), 40_000
    with np.errstate(divide="ignore"):
        logits = np.tile(np.log(p), (n, 1))
    frequency = ours_torch.gumbel_softmax(logits, tau, True, rng=3).mean(0)
    assert frequency[0] == 0
    assert np.all(abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n))


def test_gumbel_softmax_edges():
    for hard in (False, True):
        assert ours_torch.gumbel_softmax(3.0, hard=hard) == 1
        assert ours_torch.gumbel_softmax(np.empty((0, 3)), hard=hard).shape == (0, 3)
        y = ours_torch.gumbel_softmax([[NAN, 0.0], [0.0, 0.0]], hard=hard)
        assert np.isnan(y[0]).all() and y[1].sum() == pytest.approx(1)
    assert ours_torch.gumbel_softmax([1, 2]).dtype == F64
    tied = ours_torch.gumbel_softmax(np.zeros((100, 4), BF16), tau=1e9, hard=True)
    assert (tied.astype(F64).sum(-1) == 1).all()
    assert ours_torch.gumbel_softmax(np.empty((3, 0)), hard=True).shape == (3, 0)
    for tau in (0, -1.0, INF, NAN):
        with pytest.raises(ValueError, match="tau must be finite"):
            ours_torch.gumbel_softmax([1.0, 2.0], tau)
    with pytest.raises(ValueError, match=r"^tau must be finite and > 0, and its reciprocal"):
        ours_torch.gumbel_softmax([1.0, 2.0], 1e-320)
    for tau in ("a", None, np.ones(5)):
        with pytest.raises(TypeError, match="tau must be a number"):
            ours_torch.gumbel_softmax([1.0, 2.0], tau)
    with pytest.raises(ValueError, match="input must be array_like"):
        ours_torch.cross_entropy([[1, 2], [3]], [0, 1])
    with pytest.raises(ValueError, match="target must be array_like"):
        ours_torch.cross_entropy(np.zeros((2, 3)), [0, [1]])
    with pytest.raises(ValueError, match=r"^target must have the shape of input"):
        ours_torch.cross_entropy(np.zeros((2, 3)), [0])
    with pytest.raises(TypeError, match="target must be"):
        ours_torch.cross_entropy(np.zeros((2, 3)), np.ma.array([0, 1]))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_has_torchs_distribution(torch, hard):
    """Means of samples agree, and so do means of their squares: a check of tau and noise."""
    logits, n, tau = np.log([0.1, 0.3, 0.6]), 40_000, 0.7
    batch = np.tile(logits, (n, 1))
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    theirs = functional(torch, "gumbel_softmax")(torch.from_numpy(batch), tau, hard).numpy()
    torch.random.set_rng_state(state)
    ours = ours_torch.gumbel_softmax(batch, tau, hard, rng=0)
    for power in (1, 2):
        a, b = ours**power, theirs**power
        assert np.all(abs(a.mean(0) - b.mean(0)) <= 5 * np.sqrt((a.var(0) + b.var(0)) / n))


# --- scaled_dot_product_attention -----------------------------------------------------------------

ATTENTION_SHAPES = [  # query, key, value
    ((5, 8), (7, 8), (7, 4)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ((2, 3, 1, 16), (2, 3, 70, 16), (2, 3, 70, 16)),
    ((2, 3, 5, 8), (3, 7, 8), (1, 3, 7, 4)),
    ((4, 1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 4)),  # one head of keys: broadcast without enable_gqa
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 1, 7, 4)),
    ((3, 5, 8), (7, 8), (7, 4)),
    ((5, 8), (3, 7, 8), (7, 4)),
]


def some_qkv(shapes, dtype):
    return [normal(s, dtype, 1.0, name) for s, name in zip(shapes, "qkv", strict=True)]


def compare_attention(torch, arrays, mask=None, **options):
    """Against PyTorch in float64: its float32 is less accurate than ours."""
    got = ours_torch.scaled_dot_product_attention(*arrays, mask, **options)
    wide = [to_tensor(torch, a.astype(F64)) for a in arrays]
    if mask is not None:
        mask = to_tensor(torch, mask if mask.dtype == bool else mask.astype(F64))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(*wide, mask, **options).numpy()
    dtype = arrays[0].dtype
    assert type(got) is np.ndarray and got.dtype == dtype and got.shape == want.shape
    np.testing.assert_allclose(got.astype(F64), want, rtol=0, atol=64 * EPSILON[dtype])


@floats
@pytest.mark.parametrize("shapes", ATTENTION_SHAPES, ids=str)
def test_attention(torch, shapes, dtype):
    arrays = some_qkv(shapes, dtype)
    compare_attention(torch, arrays)
    compare_attention(torch, arrays, is_causal=True)
    compare_attention(torch, arrays, scale=0.3)
    lead = np.broadcast_shapes(*(a.shape[:-2] for a in arrays))
    scores = (*lead, arrays[0].shape[-2], arrays[1].shape[-2])
    r = rng("masks", shapes)
    for shape in (scores, scores[-2:], (scores[-2], 1), (1, scores[-1]), (1,) * len(scores)):
        compare_attention(torch, arrays, r.random(shape) < 0.7)
        compare_attention(torch, arrays, r.normal(0, 2, shape).astype(dtype))
        bias = np.where(r.random(shape) < 0.3, -INF, r.normal(0, 2, shape)).astype(dtype)
        compare_attention(torch, arrays, bias, scale=1.0)


@floats
def test_attention_grouped(torch, dtype):
    for heads, kv_heads in ((6, 1), (6, 2), (6, 3), (6, 6)):
        shapes = (2, heads, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 4)
        arrays = some_qkv(shapes, dtype)
        compare_attention(torch, arrays, enable_gqa=True)
        compare_attention(torch, arrays, is_causal=True, enable_gqa=True)
        mask = rng("gqa").random((2, heads, 5, 7)) < 0.5
        compare_attention(torch, arrays, mask, enable_gqa=True)


def test_attention_sees_nothing(torch):
    arrays = some_qkv(((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)), F32)
    mask = np.ones((5, 7), bool)
    mask[2] = False
    compare_attention(torch, arrays, mask)
    y = ours_torch.scaled_dot_product_attention(*arrays, mask)
    assert not y[:, :, 2].any() and y[:, :, 3].all()
    y = ours_torch.scaled_dot_product_attention(*arrays, np.where(mask, 0, -INF))
    assert not y[:, :, 2].any() and y[:, :, 3].all()


def test_attention_hidden_nan_does_nothing(torch):
    q, k, v = some_qkv(((3, 5, 8), (3, 7, 8), (3, 7, 4)), F32)
    mask = np.arange(7) < 4
    want = ours_torch.scaled_dot_product_attention(q, k, v, mask[None])
    k[:, 4:] = v[:, 4:] = NAN
    assert_same_bits(ours_torch.scaled_dot_product_attention(q, k, v, mask[None]), want)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(to_tensor(torch, a) for a in (q, k, v)), to_tensor(torch, np.tile(mask, (5, 1)))
    )
    assert theirs.isnan().any()  # the documented difference


def test_attention_errors():
    sdpa = ours_torch.scaled_dot_product_attention
    q, k, v = some_qkv(((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 4)), F32)
    mask = np.ones((5, 7), bool)
    for p in (0.1, 1.0, np.float32(0.5)):
        with pytest.raises(NotImplementedError, match="dropout_p must be 0"):
            sdpa(q, k, v, dropout_p=p)
    sdpa(q, k, v, mask, 0.0, False)
    for both in (mask, mask.astype(F32)):
        with pytest.raises(ValueError, match="attn_mask and is_causal"):
            sdpa(q, k, v, both, is_causal=True)
    with pytest.raises(TypeError, match="attn_mask must be of bool or floats, got int64"):
        sdpa(q, k, v, mask.astype(np.int64))
    with pytest.raises(TypeError, match="attn_mask has dtype complex64"):
        sdpa(q, k, v, mask.astype(np.complex64))
    for kv_heads in (2, 3, 4):
        with pytest.raises(ValueError, match="enable_gqa=True"):
            sdpa(q, k[:, :kv_heads], v[:, :kv_heads])
    with pytest.raises(ValueError, match="multiple of their number of heads"):
        sdpa(q, k[:, :4], v[:, :4], enable_gqa=True)
    for wrong in (np.ones((5, 6), bool), np.ones((5, 6))):
        with pytest.raises(ValueError, match=r"^attn_mask has shape \(5, 6\)"):
            sdpa(q, k, v, wrong)
    with pytest.raises(ValueError):
        sdpa(q[0, 0, 0], k, v)
    with pytest.raises(TypeError, match=r"^query, key and value must have the same dtype"):
        sdpa(q, k.astype(F64), v)
    with pytest.raises(TypeError):
        sdpa(*(a.astype(np.int64) for a in (q, k, v)))
    with pytest.raises(TypeError, match=r"^query must not be a MaskedArray"):
        sdpa(np.ma.array(q), k, v)
    with pytest.raises(ValueError):
        sdpa(q, k, v, scale=INF)


# --- one import line ------------------------------------------------------------------------------


def run_script(script, **given):
    """What a script leaves in `result`."""
    scope = dict(given)
    exec(compile(script, "script", "exec"), scope)
    return scope["result"]


def lines_changed(before, after):
    return sum(a != b for a, b in zip(before.split("\n"), after.split("\n"), strict=True))


SCIPY_SCRIPT = """
from scipy.special import log_softmax, logsumexp, softmax

def gaussian_mixture(x, means, weights):
    log_p = -0.5 * ((x[:, None, :] - means) ** 2).sum(-1)
    evidence = logsumexp(log_p, axis=1, b=weights, keepdims=True)
    responsibilities = softmax(log_p, axis=1)
    return evidence, responsibilities

evidence, responsibilities = gaussian_mixture(x, means, weights)
total = logsumexp(log_softmax(x))
difference, sign = logsumexp(x, axis=(0, 1), b=-1, return_sign=True)
result = [evidence, responsibilities, total, difference, sign, softmax(total), log_softmax(x, -1)]
"""


def test_a_scipy_script(special):
    data = {
        "x": normal((50, 3), F64, 1.0),
        "means": normal((4, 3), F64, 1.0, "means"),
        "weights": np.array([0.1, 0.2, 0.3, 0.4]),
    }
    want = run_script(SCIPY_SCRIPT, **data)
    changed = SCIPY_SCRIPT.replace(
        "from scipy.special import", "from fastsoftmax.compat.scipy import"
    )
    assert lines_changed(SCIPY_SCRIPT, changed) == 1
    for got, expected in zip(run_script(changed, **data), want, strict=True):
        assert_close(got, expected, 16)


TORCH_SCRIPT = """
import torch.nn.functional as F

def heads(x, n):
    return x.reshape(*x.shape[:-1], n, -1).swapaxes(-2, -3)

def layer(x, w):
    x = x - x.mean(-1)[..., None]
    q, k, v = heads(x @ w["q"], 4), heads(x @ w["k"], 2), heads(x @ w["v"], 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + y.swapaxes(-2, -3).reshape(*x.shape) @ w["out"]
    gate = F.softmax(x @ w["gate"], dim=-1)
    return x + gate @ w["experts"]

for w in layers:
    tokens = F.scaled_dot_product_attention(tokens, tokens, tokens, padding) + tokens
    tokens = layer(tokens, w)
result = F.log_softmax(tokens @ unembed, dim=-1), F.softmin(tokens, 1)
"""


def test_a_torch_script(torch):
    """A small transformer: with tensors and PyTorch, with arrays and fastsoftmax."""
    size = 16
    shapes = {"q": 16, "k": 8, "v": 8, "out": 16, "gate": 6}

    def weights(i):
        w = {n: normal((size, s), F32, 0.25, n, i) for n, s in shapes.items()}
        return {**w, "experts": normal((6, size), F32, 0.25, i)}

    data = {
        "layers": [weights(i) for i in range(3)],
        "tokens": normal((2, 10, size), F32, 1.0),
        "padding": np.tile(np.arange(10) < np.array([10, 6])[:, None, None], (1, 10, 1)),
        "unembed": normal((size, 30), F32, 0.25),
    }
    as_tensors = {
        n: [{m: to_tensor(torch, a) for m, a in w.items()} for w in x]
        if n == "layers"
        else to_tensor(torch, x)
        for n, x in data.items()
    }
    want = run_script(TORCH_SCRIPT, **as_tensors)
    changed = TORCH_SCRIPT.replace(
        "import torch.nn.functional as", "import fastsoftmax.compat.torch as"
    )
    assert lines_changed(TORCH_SCRIPT, changed) == 1
    for got, expected in zip(run_script(changed, **data), want, strict=True):
        assert type(got) is np.ndarray and got.dtype == F32
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)


# --- what is accepted -----------------------------------------------------------------------------


class OnlyDLPack:
    """An array that nothing but DLPack reads."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnlyArray:
    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array


KINDS = {
    "DLPack": OnlyDLPack,
    "__array__": OnlyArray,
    "buffer": memoryview,
    "list": lambda array: array.tolist(),
    "torch": lambda array: pytest.importorskip("torch").from_numpy(array),
    "pandas": lambda array: pytest.importorskip("pandas").DataFrame(array),
    "xarray": lambda array: pytest.importorskip("xarray").DataArray(array),
}


@pytest.mark.parametrize("kind", KINDS)
def test_array_likes(kind):
    x, b = normal((3, 4), F64), normal((3, 4), F64, 1.0, "b")
    like, b_like = KINDS[kind](x), KINDS[kind](b)
    for function in (fs.softmax, fs.log_softmax, fs.softmin, fs.logsumexp):
        assert_same_bits(function(like), function(x))
        assert type(function(like, axis=0)) is np.ndarray
    assert_same_bits(fs.softmax(like, bias=b_like), fs.softmax(x, bias=b))
    assert_same_bits(fs.softmax_backward(b_like, like), fs.softmax_backward(b, x))
    assert_same_bits(ours_scipy.softmax(like), ours_scipy.softmax(x))
    assert_same_bits(ours_scipy.log_softmax(like), ours_scipy.log_softmax(x))
    assert_same_bits(ours_scipy.logsumexp(like, 1, b_like), ours_scipy.logsumexp(x, 1, b))
    for name in ("softmax", "log_softmax", "softmin", "logsumexp"):
        function = getattr(ours_torch, name)
        assert_same_bits(function(like, dim=1), function(x, dim=1))
    got = ours_torch.gumbel_softmax(like, hard=True, rng=0)
    assert_same_bits(got, ours_torch.gumbel_softmax(x, hard=True, rng=0))
    mask = np.tri(3, dtype=bool)
    mask_like = KINDS[kind](mask)
    got = ours_torch.scaled_dot_product_attention(like, b_like, like, mask_like)
    assert_same_bits(got, ours_torch.scaled_dot_product_attention(x, b, x, mask))
    assert type(got) is np.ndarray


def test_pandas_series():
    pandas = pytest.importorskip("pandas")
    x = normal(5, F32)
    assert_same_bits(ours_scipy.softmax(pandas.Series(x)), fs.softmax(x))
    assert_same_bits(ours_scipy.softmax(pandas.Series(x).iloc[::2]), fs.softmax(x[::2]))
    missing = pandas.Series([1.0, None, 2.0], dtype=object)
    with pytest.raises(TypeError, match="dtype object"):
        ours_scipy.softmax(missing)


def test_dlpack_strides_and_types():
    x = normal((6, 4), F32)
    for view in (x, x.T, x[::2, 1:]):
        assert_same_bits(fs.softmax(OnlyDLPack(view)), fs.softmax(view))
    for dtype in (F16, F64, np.int32, np.uint8, bool):
        array = np.array([0, 1, 1], dtype)
        assert_same_bits(fs.softmax(OnlyDLPack(array)), fs.softmax(array))
    with pytest.raises(TypeError, match="x has dtype complex128"):
        fs.softmax(OnlyDLPack(np.array([1j])))
    for x in (object(), np.array([1.0, None])):
        with pytest.raises(TypeError, match="x has dtype object"):
            fs.softmax(x)


def test_tensors(torch):
    """CPU tensors are read where they lie, with their strides; a result never shares memory."""
    t = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for view in (t, t.T, t[::2, 1:], t.half(), t.double(), t.long()):
        assert_same_bits(ours_torch.softmax(view, 0), fs.softmax(view.numpy(), 0))
    before = t.clone()
    ours_torch.softmax(t, 0)[...] = 0
    assert torch.equal(t, before)
    with pytest.raises(ValueError, match=r"input must be array_like, got Tensor: .*detach"):
        ours_torch.softmax(t.requires_grad_(), 0)


def test_bfloat16_tensors(torch):
    """The lines that the documentation of compat shows."""
    t = torch.randn(3, 8).bfloat16()
    with pytest.raises(TypeError, match="BFloat16"):
        ours_torch.softmax(t, -1)
    x = t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    assert x.dtype == BF16 and x.ctypes.data == t.data_ptr()
    y = ours_torch.softmax(x, -1)
    assert y.dtype == BF16
    tensor = torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)
    want = torch.softmax(t, -1)
    assert tensor.dtype == want.dtype
    assert torch.allclose(tensor, want, rtol=2.0**-7, atol=0)
    for line in ("t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)",
                 "torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)"):  # fmt: skip
        assert line in sys.modules["fastsoftmax.compat"].__doc__


class Vague:
    def __bool__(self):
        raise ValueError("neither")


class Tensor:
    def __bool__(self):
        raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")


VAGUE = {"vague": Vague(), "array": np.array([True, False]), "tensor": Tensor(), "text": "False"}


@pytest.mark.parametrize("value", VAGUE.values(), ids=VAGUE)
def test_flags_of_torch_that_are_neither(value):
    x = np.zeros((1, 2, 2), F32)
    for name in ("is_causal", "enable_gqa"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            ours_torch.scaled_dot_product_attention(x, x, x, **{name: value})
    with pytest.raises(TypeError, match="hard must be True or False"):
        ours_torch.gumbel_softmax(x, hard=value)
    with pytest.raises(NotImplementedError, match="dropout_p must be 0"):
        ours_torch.scaled_dot_product_attention(x, x, x, dropout_p=value)
    with pytest.raises(TypeError, match="label_smoothing must be a real number"):
        ours_torch.cross_entropy(x[0], [0, 0], label_smoothing=value)
