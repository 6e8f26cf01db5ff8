"""The interface: signatures, dtypes, axes, broadcasting, thread counts. (`out`: test_out.py)"""

import inspect
import threading

import numpy as np
import pytest
from common import (
    BF16,
    EPSILON,
    F16,
    F32,
    F64,
    FAMILY,
    FLOATS,
    HALVES,
    ISAS,
    KNOWN_ISAS,
    PUBLIC,
    assert_same_bits,
    bits,
    dtype_id,
    every_dtype,
    normal,
    the_family,
    unaligned,
    use_isa,
)

import fastsoftmax as fs
from fastsoftmax import reference

# --- names and signatures -------------------------------------------------------------------------

FAMILY_SIGNATURE = (
    "(x, /, axis=-1, *, bias=None, where=None, temperature=None, dtype=None, out=None)"
)
BACKWARD_SIGNATURE = "(grad, y, /, axis=-1, *, temperature=None, out=None)"
SIGNATURES = {
    "softmax": FAMILY_SIGNATURE,
    "log_softmax": FAMILY_SIGNATURE,
    "softmin": FAMILY_SIGNATURE,
    "logsumexp": "(x, /, axis=None, *, b=None, where=None, keepdims=False, dtype=None, out=None,"
    " return_sign=False)",
    "softmax_backward": BACKWARD_SIGNATURE,
    "log_softmax_backward": BACKWARD_SIGNATURE,
    "set_num_threads": "(n)",
    "get_num_threads": "()",
    "num_threads": "(n)",
    "isa": "()",
    "available_isas": "()",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = inspect.signature(getattr(fs, name))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    plain = str(inspect.Signature(parameters))
    # "(n)" may be positional-only.
    assert plain.replace("(n, /)", "(n)") == SIGNATURES[name]


def test_public_names():
    for name in PUBLIC:
        assert getattr(fs, name).__doc__, f"{name} has no docstring"
        assert name in dir(fs)
    assert fs.__version__[0].isdigit()
    if hasattr(fs, "__all__"):
        assert set(PUBLIC) <= set(fs.__all__)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin", "logsumexp",
                                  "softmax_backward", "log_softmax_backward"])  # fmt: skip
def test_the_reference_has_the_same_parameters(name):
    ours = inspect.signature(getattr(fs, name)).parameters
    theirs = inspect.signature(getattr(reference, name)).parameters
    shared = [p for p in ours if p not in ("dtype", "out")]
    assert [p for p in theirs if p in shared] == shared
    assert all(theirs[p].default == ours[p].default for p in shared)


def test_keywords_are_keywords():
    x = np.ones(3)
    for call in (
        lambda: fs.softmax(x=x),
        lambda: fs.softmax(x, -1, None),
        lambda: fs.logsumexp(x, None, None),
        lambda: fs.softmax_backward(x, x, -1, None),
        lambda: fs.softmax(x, axes=0),
        lambda: fs.softmax(),
    ):
        with pytest.raises(TypeError):
            call()
    assert fs.softmax(x, axis=0).shape == (3,)


# --- result type ----------------------------------------------------------------------------------


@the_family
@every_dtype
def test_the_result_has_the_type_of_x(isa, function, dtype):
    x = normal((3, 4), dtype)
    assert function(x).dtype == dtype
    for other in FLOATS:
        weights = np.ones(4, other)
        assert function(x, bias=weights, temperature=weights[:1]).dtype == dtype
        assert fs.logsumexp(x, b=weights).dtype == dtype
        assert function(x, dtype=other).dtype == other
        assert fs.logsumexp(x, dtype=other).dtype == other
        out = np.empty(x.shape, other)
        assert function(x, out=out) is out
        assert function(x, dtype=other, out=out) is out  # the same: no contradiction
        assert_same_bits(out, function(x, dtype=other))


@pytest.mark.parametrize("dtype", ["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q"])
def test_integers_and_bool_become_float64(isa, dtype):
    x = np.array([[0, 1, 1], [1, 0, 0]], dtype)
    for function in (*FAMILY, fs.logsumexp):
        assert_same_bits(function(x, -1), function(x.astype(F64), -1))
    assert_same_bits(
        fs.softmax(x, bias=x.astype(F32)), fs.softmax(x.astype(F64), bias=x.astype(F64))
    )
    if dtype != "?":
        assert_same_bits(fs.softmax(x.astype(F64), bias=x), fs.softmax(x, bias=x.astype(F64)))
        assert_same_bits(fs.logsumexp(x, b=x), fs.logsumexp(x.astype(F64), b=x.astype(F64)))
    for target in FLOATS:
        want = fs.softmax(x.astype(F64), dtype=target)
        assert fs.softmax(x, dtype=target).dtype == target
        difference = fs.softmax(x, dtype=target).astype(F64) - want.astype(F64)
        assert np.abs(difference).max() <= 2 * EPSILON[target]


def test_large_integers_keep_their_float64_value(isa):
    x = np.array([2**53, 2**53 - 1])
    assert_same_bits(fs.softmax(x), fs.softmax(np.array([1.0, 0.0])))


@pytest.mark.parametrize("spelling", ["float32", "f4", "<f4", np.float32, F32, "f", "single"])
def test_dtype_spellings(isa, spelling):
    assert fs.softmax([1, 2], dtype=spelling).dtype == F32


def test_bfloat16_is_known_by_its_dtype(isa):
    y = fs.softmax(np.zeros(4), dtype=BF16)
    assert y.dtype == BF16
    assert_same_bits(fs.softmax(np.zeros(4), dtype=BF16.type), y)


@every_dtype
def test_scalars(isa, dtype):
    """0-d in, NumPy scalar out; logsumexp over everything too."""
    for x in (dtype.type(2), np.array(2, dtype)):
        for function in (*FAMILY, fs.logsumexp):
            assert type(function(x)) is dtype.type
            out = np.empty((), dtype)
            assert function(x, out=out) is out
    assert type(fs.logsumexp(np.ones((2, 3), dtype))) is dtype.type
    assert type(fs.logsumexp(np.ones(3, dtype), 0)) is dtype.type
    value, sign = fs.logsumexp(np.ones(3, dtype), return_sign=True)
    assert type(value) is type(sign) is dtype.type
    assert type(fs.logsumexp(np.ones(3, dtype), keepdims=True)) is np.ndarray
    assert type(fs.softmax(np.ones(1, dtype))) is np.ndarray
    assert type(fs.softmax(2)) is type(fs.softmax(2.0)) is np.float64


def test_lists_and_array_likes(isa):
    class Boxed:
        def __array__(self, dtype=None, copy=None):
            return np.array([1.0, 2.0, 3.0], F32)

    want = fs.softmax(np.array([1.0, 2.0, 3.0]))
    assert_same_bits(fs.softmax([1, 2, 3]), want)
    assert_same_bits(fs.softmax((1.0, 2, 3)), want)
    assert_same_bits(fs.softmax(range(1, 4)), want)
    assert_same_bits(fs.softmax(Boxed()), fs.softmax(np.array([1, 2, 3], F32)))
    assert_same_bits(fs.softmax([1, 2, 3], where=[True, True, False]), [*fs.softmax([1, 2]), 0.0])
    assert_same_bits(fs.softmax([1, 2, 3], bias=[0, 0, -np.inf]), [*fs.softmax([1, 2]), 0.0])
    assert fs.logsumexp([0, 0], b=[1, 3]) == pytest.approx(np.log(4), abs=1e-15)


def test_subclasses_come_back_as_plain_arrays(isa):
    class Tagged(np.ndarray):
        pass

    x = normal((3, 4), F32)
    tagged = x.view(Tagged)
    for function in (*FAMILY, fs.logsumexp):
        y = function(tagged, axis=-1)
        assert type(y) is np.ndarray
        assert_same_bits(y, function(x, axis=-1))
    out = np.empty((3, 4), F32).view(Tagged)
    assert fs.softmax(x, out=out) is out
    assert_same_bits(np.asarray(out), fs.softmax(x))


# --- where arrays lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "u2", "i8"])
def test_byte_swapped_input_is_converted(isa, dtype):
    x = (10 * normal((4, 33), F64)).astype(dtype)
    swapped = x.astype(x.dtype.newbyteorder())
    assert swapped.dtype.byteorder != x.dtype.byteorder
    for function in (*FAMILY, fs.logsumexp):
        y = function(swapped, -1)
        assert y.dtype.isnative
        assert_same_bits(y, function(x, -1))
        assert_same_bits(function(swapped.T, 0), function(x.T, 0))
    y, z = normal((4, 33), F64), normal((4, 33), F64)
    assert_same_bits(fs.softmax(y, bias=swapped), fs.softmax(y, bias=x))
    assert_same_bits(fs.logsumexp(y, b=swapped), fs.logsumexp(y, b=x))
    positive = np.abs(x[:, :1]) + np.ones(1, x.dtype)
    t = positive.astype(swapped.dtype)
    assert_same_bits(fs.softmax(y, temperature=t), fs.softmax(y, temperature=positive))
    big = [a.astype(">f8") for a in (y, z)]
    assert_same_bits(fs.softmax_backward(*big), fs.softmax_backward(y, z))


def test_memmap_and_read_only(isa, tmp_path):
    x = normal((50, 77), F32)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", F32, "r", shape=x.shape)
    frozen = x.copy()
    frozen.setflags(write=False)
    for function in (*FAMILY, fs.logsumexp):
        for source in (mapped, frozen, frozen.T.copy().T):
            y = function(source, -1)
            assert type(y) is np.ndarray and y.flags.writeable
            assert_same_bits(y, function(x, -1))
    out = np.memmap(tmp_path / "y", F32, "w+", shape=x.shape)
    assert fs.softmax(mapped, out=out) is out
    out.flush()
    assert_same_bits(np.fromfile(tmp_path / "y", F32).reshape(x.shape), fs.softmax(x))


@every_dtype
def test_inputs_are_never_modified(isa, dtype):
    for shape, axis in (((5, 40), -1), ((40, 5), 0), ((3, 70_000), -1), ((4, 5, 6), (0, 2))):
        x, bias, grad = (normal(shape, dtype, 2.0, name) for name in ("x", "bias", "grad"))
        x.flat[3], bias.flat[4] = -np.inf, np.nan
        where = x > 0
        t = np.full([1] * x.ndim, 0.5)
        inputs = {"x": x, "bias": bias, "grad": grad, "where": where, "t": t}
        saved = {name: bits(a) for name, a in inputs.items()}
        for function in FAMILY:
            function(x, axis, bias=bias, where=where, temperature=t)
            function(x, axis)
        fs.logsumexp(x, axis, b=bias, where=where)
        fs.logsumexp(x, axis)
        fs.softmax_backward(grad, x, axis, temperature=t)
        fs.log_softmax_backward(grad, x, axis)
        for name, a in inputs.items():
            assert np.array_equal(bits(a), saved[name]), name


def test_the_result_owns_its_memory(isa):
    x = normal((8, 9), F32)
    for source in (x, x.T, x[::-1]):
        y = fs.softmax(source)
        assert not np.shares_memory(y, x) and y.flags.writeable


# --- axis -----------------------------------------------------------------------------------------


@the_family
def test_axis(isa, function):
    x = normal((3, 4, 5), F32)
    for axis in (0, 1, 2):
        want = np.moveaxis(function(np.moveaxis(x, axis, -1).copy()), -1, axis)
        for spelling in (axis, axis - 3, (axis,), np.int32(axis), [axis][0], (np.int64(axis - 3),)):
            assert_same_bits(function(x, spelling), want, spelling)
    want = function(x.reshape(-1)).reshape(x.shape)
    for axis in (None, (0, 1, 2), (2, 0, 1), (-1, -2, 0)):
        assert_same_bits(function(x, axis), want, axis)
    want = function(x.reshape(3, 20)).reshape(x.shape)
    for axis in ((1, 2), (2, 1), (-2, -1)):
        assert_same_bits(function(x, axis), want, axis)
    # No axis: every element is a row of its own.
    assert_same_bits(function(x, ()), function(x[..., None], -1)[..., 0])


def test_logsumexp_shapes(isa):
    x = normal((3, 4, 5), F32)
    for axis in (None, 0, 1, -1, (0, 2), (2, 1), (0, 1, 2), ()):
        kept = fs.logsumexp(x, axis, keepdims=True)
        assert kept.shape == x.sum(axis, keepdims=True).shape
        plain = fs.logsumexp(x, axis)
        assert np.shape(plain) == np.shape(x.sum(axis))
        assert_same_bits(plain, kept.reshape(np.shape(plain)))
        for keepdims, want in ((True, kept), (False, plain)):
            out = np.empty(np.shape(want), F32)
            assert fs.logsumexp(x, axis, keepdims=keepdims, out=out) is out
            assert_same_bits(out, want)
            got, sign = fs.logsumexp(x, axis, keepdims=keepdims, out=out, return_sign=True)
            assert got is out and np.shape(sign) == np.shape(want) and np.all(sign == 1)
    assert fs.logsumexp(x) == fs.logsumexp(x, None)  # everything, by default


# --- logsumexp's weights --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_id)
def test_logsumexp_weights(isa, dtype):
    for n in (1, 3, 16, 50, 333):
        x = normal((4, n), dtype, 2.0)
        for b in (
            np.abs(normal((4, n), dtype, 1.0, "b")),
            np.arange(1, n + 1),
            normal((4, 1), F32),
        ):
            total = (b * np.exp(x.astype(F64))).sum(-1)
            value, sign = fs.logsumexp(x, -1, b=b, return_sign=True)
            np.testing.assert_allclose(
                value, np.log(np.abs(total)), rtol=0, atol=20 * EPSILON[dtype]
            )
            assert np.array_equal(sign, np.sign(total).astype(dtype))
            plain = fs.logsumexp(x, -1, b=b)
            assert np.array_equal(np.isnan(plain), total < 0)
            assert np.array_equal(plain[total > 0], value[total > 0])
            assert_same_bits(fs.logsumexp(x.T.copy(), 0, b=np.transpose(b) if np.ndim(b) > 1 else
                                          b[:, None]), plain)  # fmt: skip
        value, sign = fs.logsumexp(x, -1, b=-1, return_sign=True)
        assert (sign == -1).all() and np.allclose(value, fs.logsumexp(x, -1), atol=1e-6)
    mixed = fs.logsumexp([1.0, 2.0, 3.0], b=[2, -3, 1], return_sign=True)
    total = 2 * np.e - 3 * np.e**2 + np.e**3
    assert mixed[1] == 1 and mixed[0] == pytest.approx(np.log(total), abs=1e-14)


# --- softmin --------------------------------------------------------------------------------------


@every_dtype
def test_softmin_is_softmax_of_the_negated(isa, dtype):
    x = normal((6, 50), dtype, 4.0)
    bias = normal(50, F32, 2.0, "bias")
    where = bias < 1.5
    for kwargs in (
        {},
        {"bias": bias},
        {"where": where},
        {"temperature": 0.3},
        {"temperature": 0.3, "bias": bias, "where": where},
        {"temperature": np.linspace(0.2, 5, 6)[:, None]},
    ):
        assert_same_bits(fs.softmin(x, **kwargs), fs.softmax(-x, **kwargs), kwargs)
    assert_same_bits(fs.softmin(x, 0), fs.softmax(-x, 0))
    assert_same_bits(fs.softmin(x, None, dtype=F64), fs.softmax(-x, None, dtype=F64))


# --- broadcasting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), None])
@pytest.mark.parametrize(
    "shape", [(), (1,), (6,), (5, 1), (1, 6), (4, 1, 1), (4, 5, 6), (1, 1, 6), (4, 1, 6)]
)
def test_bias_and_where_broadcast(isa, shape, axis):
    x = normal((4, 5, 6), F32)
    bias = np.asarray(normal(shape, F32, 2.0, "bias"))
    bias[bias > 2.5] = -np.inf
    where = np.asarray(normal(shape, F32, 2.0, "where")) > -1.5
    full_bias, full_where = (np.broadcast_to(a, x.shape).copy() for a in (bias, where))
    for function in FAMILY:
        want = function(x, axis, bias=full_bias, where=full_where)
        assert_same_bits(function(x, axis, bias=bias, where=where), want)
        views = {"bias": np.broadcast_to(bias, x.shape), "where": np.broadcast_to(where, x.shape)}
        assert_same_bits(function(x, axis, **views), want, "broadcast views")
        strided = {"bias": np.asfortranarray(full_bias)[:], "where": np.asfortranarray(full_where)}
        assert_same_bits(function(x, axis, **strided), want, "Fortran order")
        backward = {k: v[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1] for k, v in
                    (("bias", full_bias), ("where", full_where))}  # fmt: skip
        assert_same_bits(function(x, axis, **backward), want, "negative strides")
        odd = {"bias": unaligned(full_bias), "where": full_where}
        assert_same_bits(function(x, axis, **odd), want, "odd address")
    want = fs.logsumexp(x, axis, b=full_bias**2, where=full_where)
    assert_same_bits(fs.logsumexp(x, axis, b=bias**2, where=where), want)


def test_bias_against_the_oracle(isa):
    """`bias` is added, `where` removes: said once more in plain NumPy."""
    x, bias = normal((5, 9), F64), normal((5, 9), F64, 1.0, "bias")
    where = bias > -0.5
    e = np.exp(x / 2 + bias) * where
    np.testing.assert_allclose(
        fs.softmax(x, bias=bias, where=where, temperature=2),
        e / e.sum(-1, keepdims=True),
        rtol=1e-13,
    )


@every_dtype
def test_broadcast_input(isa, dtype):
    row = normal((1, 40), dtype)
    x = np.broadcast_to(row, (7, 40))
    for function in FAMILY:
        assert_same_bits(function(x), np.repeat(function(row), 7, axis=0))
        column = np.broadcast_to(row[:, :5].T, (5, 40))
        assert_same_bits(function(column), function(column.copy()))
        assert_same_bits(function(column, 0), function(column.copy(), 0))


def test_backward_formula(isa):
    """The vector-Jacobian product, from the Jacobian written out."""
    x, grad = normal(6, F64), normal(6, F64, 1.0, "grad")
    y, log_y = fs.softmax(x, temperature=0.7), fs.log_softmax(x, temperature=0.7)
    jacobian = (np.diag(y) - np.outer(y, y)) / 0.7
    np.testing.assert_allclose(
        fs.softmax_backward(grad, y, temperature=0.7), jacobian @ grad, rtol=0, atol=1e-15
    )
    jacobian = (np.eye(6) - np.outer(np.ones(6), y)) / 0.7
    np.testing.assert_allclose(
        fs.log_softmax_backward(grad, log_y, temperature=0.7), grad @ jacobian, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), None, ()])
def test_backward_axes_and_types(isa, axis):
    x, grad = normal((3, 4, 5), F64), normal((3, 4, 5), F64, 1.0, "grad")
    for forward, backward, oracle in (
        (fs.softmax, fs.softmax_backward, reference.softmax_backward),
        (fs.log_softmax, fs.log_softmax_backward, reference.log_softmax_backward),
    ):
        y = forward(x, axis)
        want = oracle(grad, y, axis, precise=np.float64)
        np.testing.assert_allclose(backward(grad, y, axis), want, rtol=1e-10, atol=1e-14)
        for a in FLOATS:
            for b in FLOATS:
                both = np.dtype(np.float32) if a in HALVES and b in HALVES and a != b else None
                expected = both or max(a, b, key=lambda t: t.itemsize)
                got = backward(grad.astype(a), y.astype(b), axis)
                assert got.dtype == expected, (a, b)
                out = np.empty(x.shape, F16)
                assert backward(grad.astype(a), y.astype(b), axis, out=out) is out
    x = x.sum(2)
    t = np.array([0.5, 1, 2])[:, None]
    want = np.stack([fs.softmax_backward(x[i], x[i], temperature=t[i, 0]) for i in range(3)])
    assert_same_bits(fs.softmax_backward(x, x, temperature=t), want)


# --- threads and ISA ------------------------------------------------------------------------------


def test_thread_counts(threads):
    assert isinstance(fs.get_num_threads(), int) and fs.get_num_threads() >= 1
    for n in (1, 3, 64, np.int64(2)):
        threads(n)
        assert fs.get_num_threads() == n
    threads(2)
    with fs.num_threads(5):
        assert fs.get_num_threads() == 5
        with fs.num_threads(1):
            assert fs.get_num_threads() == 1
        assert fs.get_num_threads() == 5
    assert fs.get_num_threads() == 2
    with pytest.raises(KeyError), fs.num_threads(7):
        raise KeyError
    assert fs.get_num_threads() == 2


def test_num_threads_belongs_to_its_thread(threads):
    """Another thread does not see the context manager, it does see set_num_threads."""
    threads(2)
    seen = []
    with fs.num_threads(3):
        worker = threading.Thread(target=lambda: seen.append(fs.get_num_threads()))
        worker.start()
        worker.join()
        assert fs.get_num_threads() == 3
    worker = threading.Thread(target=lambda: threads(4))
    worker.start()
    worker.join()
    assert seen == [2]
    assert fs.get_num_threads() == 4


def test_isas():
    assert ISAS == fs.available_isas() and isinstance(ISAS, tuple)
    assert set(ISAS) <= set(KNOWN_ISAS) and len(set(ISAS)) == len(ISAS)
    assert ISAS[-1] == "scalar", "the list is ordered, best first"
    assert fs.isa() in ISAS
    active = fs.isa()
    for name in ISAS:
        with use_isa(name):
            assert fs.isa() == name
            with use_isa("scalar"):
                assert fs.isa() == "scalar"
            assert fs.isa() == name
    assert fs.isa() == active
    with pytest.raises(ValueError, match="mmx"), use_isa("mmx"):
        pass


def test_show_config(capsys):
    config = fs.show_config(mode="dicts")
    assert {
        "version",
        "numpy",
        "isa",
        "available_isas",
        "openmp",
        "num_threads",
        "cpu",
        "cpus",
    } <= set(config)
    assert config["version"] == fs.__version__ and config["numpy"] == np.__version__
    assert config["isa"] == fs.isa() and tuple(config["available_isas"]) == ISAS
    assert config["num_threads"] == fs.get_num_threads() and config["cpus"] >= 1
    assert isinstance(config["openmp"], bool) and isinstance(config["cpu"], str)
    assert capsys.readouterr().out == ""
    assert fs.show_config() is None
    printed = capsys.readouterr().out
    for word in (fs.__version__, fs.isa(), "openmp"):
        assert word.lower() in printed.lower()
    with pytest.raises(ValueError, match="mode"):
        fs.show_config(mode="xml")
