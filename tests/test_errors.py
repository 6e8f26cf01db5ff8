"""Bad input: the class of the exception and what its message says; `out` stays as it was.

A message names the argument, shows what was given and says what is accepted.
"""

import numpy as np
import pytest
from common import F16, F32, F64, FAMILY
from numpy.exceptions import AxisError

import fastsoftmax as fs

X = np.linspace(-1, 1, 12, dtype=F32).reshape(3, 4)
MASKED = np.ma.masked_array([1.0, 2.0, 3.0], mask=[0, 1, 0])
SUPPORTED = ("float16", "bfloat16", "float32", "float64")


def family(x, *args, **kwargs):
    """A call of a softmax function that is wrong in one thing; `shape` is what out should have."""

    def call(f, **out):
        return f(x, *args, **kwargs, **out)

    call.shape = np.shape(x)
    return call


def bad_x(x, *words):
    return family(x), TypeError, ("x", *words)


def bad_t(t, *words, x=X, error=ValueError, axis=-1):
    return family(x, axis, temperature=t), error, ("temperature", *words)


# name: (call, exception, words of the message)
FAMILY_CASES = {
    # x
    "complex": bad_x(X + 1j, "complex", *SUPPORTED),
    "object": bad_x(np.array([1, None]), "object", *SUPPORTED),
    "strings": bad_x(np.array(["a", "b"]), "U1", *SUPPORTED),
    "bytes": bad_x(np.array([b"a"]), "S1", *SUPPORTED),
    "longdouble": bad_x(X.astype(np.longdouble), np.dtype(np.longdouble).name, *SUPPORTED),
    "datetime": bad_x(np.array(["2020-01-01"], "M8[D]"), "datetime64", *SUPPORTED),
    "timedelta": bad_x(np.array([1], "m8[s]"), "timedelta64", *SUPPORTED),
    "structured": bad_x(np.zeros(3, [("a", "f4")]), *SUPPORTED),
    "masked": bad_x(MASKED, "MaskedArray", "where=~mask"),
    "None": bad_x(None, *SUPPORTED),
    "a string": bad_x("abc", *SUPPORTED),
    # axis
    "axis 2": (family(X, 2), AxisError, ("axis 2", "dimension 2")),
    "axis -3": (family(X, -3), AxisError, ("axis -3", "dimension 2")),
    "axis in a tuple": (family(X, (0, 5)), AxisError, ("axis 5", "dimension 2")),
    "axis of 0-d": (family(np.float32(1), 1), AxisError, ("axis 1",)),
    "tuple for 0-d": (family(np.float32(1), (0,)), AxisError, ("axis 0", "dimension 0")),
    "huge axis": (family(X, 2**40), (AxisError, OverflowError), ()),
    "axis twice": (family(X, (0, 0)), ValueError, ("axis", "0")),
    "axis twice, spelt differently": (family(X, (1, -1)), ValueError, ("axis",)),
    "float axis": (family(X, 1.0), TypeError, ("axis", "1.0", "int")),
    "string axis": (family(X, "0"), TypeError, ("axis", "'0'", "int")),
    "float in a tuple": (family(X, (0, 1.0)), TypeError, ("axis", "1.0", "int")),
    # bias
    "bias too long": (family(X, bias=np.ones(5)), ValueError, ("bias", "(5,)", "(3, 4)")),
    "bias of other rows": (
        family(X, bias=np.ones((2, 1))),
        ValueError,
        ("bias", "(2, 1)", "(3, 4)"),
    ),
    "bias would enlarge": (
        family(X, bias=np.ones((2, 3, 4))),
        ValueError,
        ("bias", "(2, 3, 4)", "(3, 4)"),
    ),
    "bias would enlarge by 1": (
        family(X, bias=np.ones((1, 3, 4))),
        ValueError,
        ("bias", "(1, 3, 4)", "(3, 4)"),
    ),
    "bias enlarges length 1": (
        family(X[:, :1], bias=np.ones((3, 4))),
        ValueError,
        ("bias", "(3, 4)", "(3, 1)"),
    ),
    "bool bias": (family(X, bias=X > 0), TypeError, ("bias", "bool", "where")),
    "complex bias": (family(X, bias=X * 1j), TypeError, ("bias", "complex")),
    "masked bias": (
        family(MASKED.data, bias=MASKED),
        TypeError,
        ("bias", "MaskedArray", "where=~mask"),
    ),
    "string bias": (family(X, bias="zero"), TypeError, ("bias",)),
    # where
    "float where": (family(X, where=np.ones(4)), TypeError, ("where", "float64", "bool")),
    "int where": (family(X, where=[1, 0, 1, 1]), TypeError, ("where", "int", "bool")),
    "where too long": (family(X, where=np.ones(5, bool)), ValueError, ("where", "(5,)", "(3, 4)")),
    "where would enlarge": (
        family(X, where=np.ones((2, 3, 4), bool)),
        ValueError,
        ("where", "(2, 3, 4)", "(3, 4)"),
    ),
    "masked where": (
        family(X, where=np.ma.masked_array([True] * 4)),
        TypeError,
        ("where", "MaskedArray"),
    ),
    # temperature
    "temperature 0": bad_t(0, "finite and > 0", "0"),
    "temperature -0.0": bad_t(-0.0, "finite and > 0", "-0.0"),
    "temperature -1": bad_t(-1.0, "finite and > 0", "-1.0"),
    "temperature NaN": bad_t(np.nan, "finite and > 0", "nan"),
    "temperature inf": bad_t(np.inf, "finite and > 0", "inf"),
    "temperature -inf": bad_t(-np.inf, "finite and > 0", "-inf"),
    "1/temperature is inf": bad_t(1e-45, "1e-45"),
    "1/temperature is 0": bad_t(1e60, "1e+60"),
    "one bad temperature": bad_t(np.array([[1.0], [2.0], [-3.0]]), "finite and > 0", "-3.0"),
    "temperature along the axis": bad_t(np.ones(4), "(4,)", "axis"),
    "temperature along one of two axes": bad_t(np.ones((3, 1)), "(3, 1)", "axis", axis=None),
    "temperature of other rows": bad_t(np.ones((2, 1)), "(2, 1)", "(3, 4)"),
    "temperature would enlarge": bad_t(np.ones((2, 1, 1)), "(2, 1, 1)", "(3, 4)"),
    "bool temperature": bad_t(True, "bool", error=TypeError),
    "complex temperature": bad_t(1j, "complex", error=TypeError),
    "string temperature": bad_t("hot", error=TypeError),
    "masked temperature": bad_t(
        np.ma.masked_array([1.0], mask=[1]), "MaskedArray", error=TypeError
    ),
    # dtype
    "integer dtype": (family(X, dtype=np.int32), TypeError, ("dtype", "int32", *SUPPORTED)),
    "complex dtype": (family(X, dtype=complex), TypeError, ("dtype", "complex128", *SUPPORTED)),
    "longdouble dtype": (family(X, dtype=np.longdouble), TypeError, ("dtype", *SUPPORTED)),
    "bool dtype": (family(X, dtype=bool), TypeError, ("dtype", "bool", *SUPPORTED)),
    "no dtype": (family(X, dtype="float31"), TypeError, ("float31",)),
}


def untouched_out(shape=(3, 4), dtype=F32):
    return np.full(shape, 7, dtype)


def check(call, error, words, function, out=None):
    kwargs = {} if out is None else {"out": out}
    with pytest.raises(error) as caught:
        call(function, **kwargs)
    message = str(caught.value)
    for word in words:
        assert word.lower() in message.lower(), f"{word!r} is not in the message: {message}"
    assert out is None or (np.asarray(out) == 7).all(), "out was touched"
    # Plain sentences: no C names, no addresses.
    assert "0x" not in message and "NULL" not in message and len(message) < 400


@pytest.mark.parametrize("function", FAMILY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_family(function, name):
    call, error, words = FAMILY_CASES[name]
    check(call, error, words, function)
    if "dtype" not in name:
        check(call, error, words, function, untouched_out(call.shape))


# --- out ------------------------------------------------------------------------------------------


def read_only():
    out = untouched_out()
    out.setflags(write=False)
    return out


OUT_CASES = {
    "wrong shape": (lambda: untouched_out((4, 3)), ValueError, ("out", "(4, 3)", "(3, 4)")),
    "wrong ndim": (lambda: untouched_out((12,)), ValueError, ("out", "(12,)", "(3, 4)")),
    "broadcastable shape": (
        lambda: untouched_out((1, 3, 4)),
        ValueError,
        ("out", "(1, 3, 4)", "(3, 4)"),
    ),
    "read-only": (read_only, ValueError, ("out", "read-only")),
    "shares memory with itself": (
        lambda: np.lib.stride_tricks.as_strided(untouched_out(), (3, 4), (0, 4)),
        ValueError,
        ("out", "share"),
    ),
    "overlaps itself": (
        lambda: np.lib.stride_tricks.as_strided(untouched_out(), (3, 4), (8, 4)),
        ValueError,
        ("out", "share"),
    ),
    "int": (lambda: untouched_out(dtype=np.int32), TypeError, ("out", "int32", *SUPPORTED)),
    "complex": (lambda: untouched_out(dtype=complex), TypeError, ("out", "complex128", *SUPPORTED)),
    "longdouble": (lambda: untouched_out(dtype=np.longdouble), TypeError, ("out", *SUPPORTED)),
    "byte-swapped": (
        lambda: untouched_out(dtype=np.dtype(F32).newbyteorder()),
        TypeError,
        ("out", "byte"),
    ),
    "masked": (lambda: np.ma.masked_array(untouched_out()), TypeError, ("out", "MaskedArray")),
    "a list": (lambda: [7, 7], TypeError, ("out", "list", "ndarray")),
    "a tuple": (lambda: (untouched_out(),), TypeError, ("out", "tuple", "ndarray")),
    "a scalar": (lambda: np.float32(7), TypeError, ("out", "ndarray")),
}


@pytest.mark.parametrize("name", OUT_CASES)
def test_out(name):
    make, error, words = OUT_CASES[name]
    calls = [*FAMILY, lambda x, **kw: fs.softmax_backward(x, x, **kw)]
    calls += [lambda x, **kw: fs.log_softmax_backward(x, x, **kw)]
    for function in calls:
        check(lambda f, out: f(X, out=out), error, words, function, make())
    x = np.broadcast_to(X[..., None], (3, 4, 5))
    check(lambda f, out: f(x, -1, out=out), error, words, fs.logsumexp, make())


def test_out_and_dtype_disagree():
    for function in (*FAMILY, lambda x, **kw: fs.logsumexp(x, -1, **kw)):
        out = untouched_out((3, 4), F16)
        call = lambda f, out: f(X, dtype=np.float64, out=out)  # noqa: E731
        check(call, TypeError, ("dtype", "out", "float64", "float16"), function, out)


# --- logsumexp and the backward functions ---------------------------------------------------------

LSE_CASES = {
    "complex x": (
        lambda **o: fs.logsumexp(X * 1j, -1, **o),
        TypeError,
        ("x", "complex", *SUPPORTED),
    ),
    "masked x": (lambda **o: fs.logsumexp(MASKED, **o), TypeError, ("x", "where=~mask")),
    "axis": (lambda **o: fs.logsumexp(X, 2, **o), AxisError, ("axis 2", "dimension 2")),
    "axis twice": (lambda **o: fs.logsumexp(X, (0, 0), **o), ValueError, ("axis",)),
    "float axis": (lambda **o: fs.logsumexp(X, 0.5, **o), TypeError, ("axis", "0.5", "int")),
    "b too long": (
        lambda **o: fs.logsumexp(X, -1, b=np.ones(5), **o),
        ValueError,
        ("b", "(5,)", "(3, 4)"),
    ),
    "b would enlarge": (
        lambda **o: fs.logsumexp(X, -1, b=np.ones((2, 1, 1)), **o),
        ValueError,
        ("b", "(2, 1, 1)", "(3, 4)"),
    ),
    "complex b": (lambda **o: fs.logsumexp(X, -1, b=X * 1j, **o), TypeError, ("b", "complex")),
    "masked b": (
        lambda **o: fs.logsumexp(np.ones((3, 3)), -1, b=MASKED, **o),
        TypeError,
        ("b", "MaskedArray"),
    ),
    "float where": (
        lambda **o: fs.logsumexp(X, -1, where=X, **o),
        TypeError,
        ("where", "float32", "bool"),
    ),
    "where": (
        lambda **o: fs.logsumexp(X, -1, where=np.ones(3, bool), **o),
        ValueError,
        ("where", "(3,)", "(3, 4)"),
    ),
}


@pytest.mark.parametrize("name", LSE_CASES)
def test_logsumexp(name):
    call, error, words = LSE_CASES[name]
    check(lambda _, **o: call(**o), error, words, None)
    check(lambda _, **o: call(**o), error, words, None, untouched_out((3,)))


def test_logsumexp_dtype_and_out_shape():
    with pytest.raises(TypeError, match=r"dtype.*int8"):
        fs.logsumexp(X, dtype="int8")
    for keepdims, shape in ((False, (3, 1)), (True, (3,)), (False, (4,)), (False, ())):
        out = untouched_out(shape)
        with pytest.raises(ValueError, match="out") as caught:
            fs.logsumexp(X, -1, keepdims=keepdims, out=out)
        assert str(shape) in str(caught.value)
        assert (out == 7).all()


BACKWARD_CASES = {
    "shapes differ": (lambda f, **o: f(X, X.T, **o), ValueError, ("grad", "y", "(3, 4)", "(4, 3)")),
    "no broadcasting": (lambda f, **o: f(X, X[:1], **o), ValueError, ("(3, 4)", "(1, 4)")),
    "complex grad": (lambda f, **o: f(X * 1j, X, **o), TypeError, ("grad", "complex", *SUPPORTED)),
    "complex y": (lambda f, **o: f(X, X * 1j, **o), TypeError, ("y", "complex", *SUPPORTED)),
    "masked grad": (lambda f, **o: f(MASKED, MASKED.data, **o), TypeError, ("grad", "MaskedArray")),
    "masked y": (lambda f, **o: f(MASKED.data, MASKED, **o), TypeError, ("y", "MaskedArray")),
    "axis": (lambda f, **o: f(X, X, 2, **o), AxisError, ("axis 2", "dimension 2")),
    "float axis": (lambda f, **o: f(X, X, 1.0, **o), TypeError, ("axis", "1.0", "int")),
    "axis twice": (lambda f, **o: f(X, X, (0, -2), **o), ValueError, ("axis",)),
    "temperature": (
        lambda f, **o: f(X, X, temperature=-2.0, **o),
        ValueError,
        ("temperature", "-2.0", "finite and > 0"),
    ),
    "temperature NaN": (
        lambda f, **o: f(X, X, temperature=np.nan, **o),
        ValueError,
        ("temperature", "nan"),
    ),
    "temperature along the axis": (
        lambda f, **o: f(X, X, temperature=np.ones(4), **o),
        ValueError,
        ("temperature", "(4,)", "axis"),
    ),
}


@pytest.mark.parametrize(
    "function", [fs.softmax_backward, fs.log_softmax_backward], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_backward(function, name):
    call, error, words = BACKWARD_CASES[name]
    check(call, error, words, function)
    check(call, error, words, function, untouched_out())


# --- thread counts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, error",
    [
        *((n, ValueError) for n in (0, -1, 1025, 2**70)),
        *((n, TypeError) for n in (1.0, "2", None, True, np.float64(2), np.True_)),
    ],
)
def test_thread_counts(bad, error):
    before = fs.get_num_threads()
    with pytest.raises(error) as caught:
        fs.set_num_threads(bad)
    assert "1024" in str(caught.value) or error is TypeError
    assert "n " in str(caught.value) or "threads" in str(caught.value)
    with pytest.raises(error), fs.num_threads(bad):
        pass
    assert fs.get_num_threads() == before


def test_after_every_error_the_library_still_works():
    for call, _, _ in FAMILY_CASES.values():
        with pytest.raises((TypeError, ValueError, OverflowError, IndexError)):
            call(fs.softmax)
    assert fs.softmax(X).sum() == pytest.approx(3, abs=1e-6)


RAGGED = [[1.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: fs.softmax(RAGGED), "x"),
        (lambda: fs.log_softmax(X, bias=RAGGED), "bias"),
        (lambda: fs.softmin(X, where=RAGGED), "where"),
        (lambda: fs.logsumexp(X, b=RAGGED), "b"),
        (lambda: fs.softmax_backward(X, RAGGED), "y"),
        (lambda: fs.attention(X, X, X, mask=RAGGED), "mask"),
        (lambda: fs.attention(X, X, X, kv_lengths=RAGGED), "kv_lengths"),
        (lambda: fs.attention(X, X, X, scale=RAGGED), "scale"),
    ],
)
def test_what_numpy_cannot_read_is_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name} must be array_like, got list: .*inhomogeneous"):
        call()


@pytest.mark.parametrize("name", ["keepdims", "return_sign"])
def test_flags_of_logsumexp(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got ndarray"):
        fs.logsumexp(X, **{name: X})


@pytest.mark.parametrize("name", ["is_causal", "return_lse", "return_weights"])
def test_flags_of_attention(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got ndarray"):
        fs.attention(X, X, X, **{name: X})


def test_mode_of_show_config():
    for mode in ("html", None, X, np.zeros(2, [("a", "f4")])):
        with pytest.raises(ValueError, match=r"^mode must be 'stdout' or 'dicts', got"):
            fs.show_config(mode)


SIGNALLING = np.array(0x7FA00000, np.uint32).view(F32)


def test_signalling_nan_is_refused_or_computed_without_a_warning():
    """NumPy warns when it casts one."""
    x = np.zeros((2, 2), F32)
    for dtype in (F32, F64):
        with pytest.raises(ValueError, match="temperature must be finite"):
            fs.softmax(x.astype(dtype), temperature=SIGNALLING)
    for weight in (np.tile(SIGNALLING, 2), np.array([np.inf, -np.inf], F32)):
        assert np.isnan(fs.cross_entropy(x, [0, 1], weight=weight))
        assert np.isnan(fs.cross_entropy_backward(1, x, [0, 1], weight=weight)).all()
