"""Bad input to the attention functions: the class of the exception and what its message says.

Nothing is done before it is raised: `out` stays as it was, and arrays that would need more memory
than there is are refused in the same way.
"""

import numpy as np
import pytest
from common import BF16, F16, F32, F64, FLOATS
from numpy.lib.stride_tricks import as_strided

import fastsoftmax as fs

SUPPORTED = ("float16", "bfloat16", "float32", "float64")
ARGUMENTS = ("q", "k", "v")
HUGE = {"queries": 2**40, "keys": 2**40 + 2}


def inputs(queries=5, keys=7):
    """q, k and v in no memory: ones, broadcast."""
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 6)
    return [np.broadcast_to(F32.type(1), shape) for shape in shapes]


Q, K, V = inputs()
OUT = (2, 4, 5, 6)
SCORES = "(2, 4, 5, 7)"


def filled(shape=OUT, dtype=F32):
    return np.full(shape, 7, dtype)


def read_only(a):
    a.setflags(write=False)
    return a


def check(error, words, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in the message: {message}"
    if "out" in kwargs:
        assert (np.asarray(kwargs["out"]) == 7).all(), "out was touched"
    # Plain sentences: no C names, no addresses.
    assert "0x" not in message and "NULL" not in message and len(message) < 400


# --- q, k and v -----------------------------------------------------------------------------------

# What none of the three may be: (value from the right array, exception, words of the message)
EACH = {
    "int": (lambda a: np.broadcast_to(1, a.shape), TypeError, ("int64", *SUPPORTED)),
    "bool": (lambda a: np.broadcast_to(True, a.shape), TypeError, ("bool", *SUPPORTED)),
    "complex": (lambda a: np.broadcast_to(1j, a.shape), TypeError, ("complex128", *SUPPORTED)),
    "longdouble": (
        lambda a: np.broadcast_to(np.longdouble(1), a.shape),
        TypeError,
        (np.dtype(np.longdouble).name, *SUPPORTED),
    ),
    "None": (lambda a: None, TypeError, SUPPORTED),
    "a string": (lambda a: "abc", TypeError, SUPPORTED),
    "masked": (np.ma.masked_array, TypeError, ("MaskedArray", "pass its data")),
    "another dtype": (
        lambda a: np.broadcast_to(1.0, a.shape),
        TypeError,
        ("q, k and v", "float64", "float32"),
    ),
    "1-D": (lambda a: a[0, 0, 0], ValueError, ("shape", "positions, columns")),
    "0-D": (lambda a: F32.type(1), ValueError, ("shape", "()")),
    "another batch": (
        lambda a: np.broadcast_to(a[:1], (3, *a.shape[1:])),
        ValueError,
        ("q, k and v", "before the heads", "(3, ", "(2, "),
    ),
}


@pytest.mark.parametrize("size", [{}, HUGE], ids=["small", "huge"])
@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_of_q_k_v(name, case, size):
    make, error, words = EACH[case]
    arrays = dict(zip(ARGUMENTS, inputs(**size), strict=True))
    arrays[name] = make(arrays[name])
    check(error, (name, *words), fs.attention, *arrays.values())
    check(error, (name, *words), fs.attention, *arrays.values(), out=filled())


@pytest.mark.parametrize("ours", FLOATS, ids=lambda d: d.name)
@pytest.mark.parametrize("theirs", FLOATS, ids=lambda d: d.name)
def test_dtypes_that_differ(ours, theirs):
    if ours != theirs:
        arrays = Q.astype(ours), K.astype(ours), V.astype(theirs)
        check(TypeError, ("q, k and v", ours.name, theirs.name), fs.attention, *arrays)


# (q, k, v, words of the message)
SHAPES = {
    "heads do not divide": (Q[:, :3], K, V, ("q", "heads", "multiple", "(2, 3, 5, 8)")),
    "fewer heads than k": (Q[:, :1], K, V, ("q", "heads", "multiple", "(2, 1, 5, 8)")),
    "no KV heads": (Q, K[:, :0], V[:, :0], ("k and v", "heads", "(2, 0, 7, 8)")),
    "no heads at all": (Q[:, :0], K[:, :0], V[:, :0], ("k and v", "at least 1 head")),
    "heads of k": (Q, K[:, :1], V, ("k and v", "heads", "(2, 1, 7, 8)")),
    "heads of v": (Q, K, V[:, :1], ("k and v", "heads", "(2, 1, 7, 6)")),
    "keys of k": (Q, K[:, :, 1:], V, ("k and v", "keys", "(2, 2, 6, 8)")),
    "keys of v": (Q, K, V[:, :, 1:], ("k and v", "keys", "(2, 2, 6, 6)")),
    "one value for all keys": (Q, K, V[:, :, :1], ("k and v", "keys", "(2, 2, 1, 6)")),
    "columns of q": (Q[..., 1:], K, V, ("q and k", "columns", "(2, 4, 5, 7)")),
    "columns of k": (Q, K[..., :1], V, ("q and k", "columns", "(2, 2, 7, 1)")),
    "no columns": (Q[..., :0], K[..., :0], V, ("q and k", "columns", "at least 1")),
    "2-D, columns": (Q[0, 0, :, 1:], K[0, 0], V[0, 0], ("q and k", "columns")),
    "2-D q, two KV heads": (Q[0, 0], K, V, ("q", "heads", "multiple")),
    "batch of two leading dimensions": (
        np.broadcast_to(Q, (3, *Q.shape)),
        np.broadcast_to(K, (2, *K.shape)),
        V,
        ("before the heads", "(3, 2, 4, 5, 8)", "(2, 2, 2, 7, 8)"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    *arrays, words = SHAPES[name]
    check(ValueError, words, fs.attention, *arrays)
    check(ValueError, words, fs.attention, *arrays, out=filled())


# --- the options ----------------------------------------------------------------------------------


class Index:
    """It has __index__ and nothing else, and what it says when compared is wrong."""

    def __init__(self, n):
        self.n = n

    def __index__(self):
        return self.n

    def __lt__(self, other):
        return False


def option(name, value, error, *words):
    return {name: value}, error, (name, *words)


def wrong_shape(name, value, target):
    return option(name, value, ValueError, str(np.shape(value)), target)


def not_integers(name, value, *words):
    return option(name, value, TypeError, "integer", *words)


# (arguments, exception, words of the message)
OPTIONS = {
    # mask
    "float mask": option("mask", np.ones(7, F32), TypeError, "bool", "float32", "bias="),
    "bfloat16 mask": option("mask", np.ones(7, BF16), TypeError, "bool", "bfloat16", "bias="),
    "int mask": option("mask", [1, 0, 1, 1, 1, 1, 1], TypeError, "bool", "int64"),
    "masked mask": option("mask", np.ma.masked_array([True] * 7), TypeError, "MaskedArray"),
    "string mask": option("mask", "causal", TypeError),
    "mask too long": wrong_shape("mask", np.ones(8, bool), SCORES),
    "mask of other queries": wrong_shape("mask", np.ones((3, 1), bool), SCORES),
    "mask of the KV heads": wrong_shape("mask", np.ones((2, 2, 1, 1), bool), SCORES),
    "mask by batch and key": wrong_shape("mask", np.ones((2, 9), bool), SCORES),
    "mask would enlarge": wrong_shape("mask", np.ones((1, 2, 4, 1, 1), bool), SCORES),
    "no mask": wrong_shape("mask", np.ones(0, bool), SCORES),
    # bias
    "bool bias": option("bias", np.ones(7, bool), TypeError, "bool", "mask="),
    "complex bias": option("bias", np.ones(7, complex), TypeError, "complex"),
    "masked bias": option("bias", np.ma.masked_array(np.ones(7)), TypeError, "mask=~mask"),
    "string bias": option("bias", "alibi", TypeError),
    "bias too long": wrong_shape("bias", np.ones(8), SCORES),
    "bias of other heads": wrong_shape("bias", np.ones((3, 1, 1)), SCORES),
    "bias would enlarge": wrong_shape("bias", np.ones((3, 2, 4, 1, 1)), SCORES),
    # q_offset
    "float offset": not_integers("q_offset", 1.0, "float"),
    "offset array of floats": not_integers("q_offset", np.ones(2, F32), "float32"),
    "bool offset": not_integers("q_offset", True, "bool"),
    "offset array of bool": not_integers("q_offset", np.ones(2, bool), "bool"),
    "no offset": not_integers("q_offset", None, "None"),
    "string offset": not_integers("q_offset", "2", "str"),
    "masked offset": not_integers("q_offset", np.ma.masked_array([1, 2]), "MaskedArray"),
    "offset per head": wrong_shape("q_offset", np.ones((2, 4), int), "(2,)"),
    "offset of another batch": wrong_shape("q_offset", [1, 2, 3], "(2,)"),
    "offset too large": option("q_offset", 2**63, ValueError, str(2**63), str(2**63 - 1)),
    "offset too low": option("q_offset", -(2**80), ValueError, str(-(2**80)), str(-(2**63))),
    "one offset too large": option("q_offset", np.array([0, 2**64 - 1], "u8"), ValueError),
    # kv_lengths
    "float length": not_integers("kv_lengths", 3.0, "float"),
    "bool length": not_integers("kv_lengths", np.True_, "bool"),
    "lengths array of bool": not_integers("kv_lengths", [True, False], "bool"),
    "masked lengths": not_integers("kv_lengths", np.ma.masked_array([1, 2]), "MaskedArray"),
    "negative length": option("kv_lengths", -1, ValueError, "from 0 to 7", "-1"),
    "length > K": option("kv_lengths", 2**41, ValueError, "from 0 to 7", str(2**41)),
    "huge length": option("kv_lengths", 2**80, ValueError, "from 0 to 7", str(2**80)),
    "one length > K": option("kv_lengths", np.array([7, 2**41]), ValueError, "from 0 to 7"),
    "one negative length": option("kv_lengths", [3, -2], ValueError, "from 0 to 7", "-2"),
    "unsigned length": option("kv_lengths", np.array(2**64 - 1, "u8"), ValueError, "from 0 to 7"),
    "lengths of another batch": wrong_shape("kv_lengths", [1, 2, 3], "(2,)"),
    "lengths per head": wrong_shape("kv_lengths", np.ones((2, 4), int), "(2,)"),
    # window
    "int window": option("window", 2, TypeError, "pair", "int"),
    "window of one": option("window", (2,), TypeError, "pair", "(2,)"),
    "window of three": option("window", (2, 0, 1), TypeError, "pair", "(2, 0, 1)"),
    "string window": option("window", "ab", TypeError, "pair", "'ab'"),
    "window array": option("window", np.array([1, 2]), TypeError, "pair", "ndarray"),
    "float window": option("window", (2.0, 0), TypeError, "integers", "2.0"),
    "bool window": option("window", (None, True), TypeError, "integers", "True"),
    "negative left": option("window", (-1, None), ValueError, ">= 0", "-1"),
    "negative right": option("window", [None, -3], ValueError, ">= 0", "-3"),
    "index that is no number": option("window", (Index(-5), None), ValueError, ">= 0"),
    # scale
    "NaN scale": option("scale", np.nan, ValueError, "finite", "nan"),
    "inf scale": option("scale", np.inf, ValueError, "finite", "inf"),
    "-inf scale": option("scale", -F32.type(np.inf), ValueError, "finite", "-inf"),
    "bool scale": option("scale", True, TypeError, "real number", "bool"),
    "complex scale": option("scale", 1j, TypeError, "real number", "complex"),
    "string scale": option("scale", "0.5", TypeError, "real number", "str"),
    "scale per head": option("scale", np.ones(4), TypeError, "real number", "ndarray"),
    # softcap
    "softcap 0": option("softcap", 0, ValueError, "> 0", "0"),
    "softcap -0.0": option("softcap", -0.0, ValueError, "> 0", "-0.0"),
    "softcap -30": option("softcap", -30, ValueError, "> 0", "-30"),
    "NaN softcap": option("softcap", np.nan, ValueError, "finite", "nan"),
    "inf softcap": option("softcap", np.inf, ValueError, "finite", "inf"),
    "bool softcap": option("softcap", False, TypeError, "real number", "bool"),
    "string softcap": option("softcap", "30", TypeError, "real number", "str"),
    "softcap per head": option("softcap", np.ones(4), TypeError, "real number", "ndarray"),
    # sinks and alibi_slopes
    **{
        f"{name}: {what}": option(name, value, error, *words)
        for name in ("sinks", "alibi_slopes")
        for what, value, error, *words in (
            ("a number", 1.0, ValueError, "(4,)", "()"),
            ("of the KV heads", np.ones(2), ValueError, "(4,)", "(2,)"),
            ("one for all heads", np.ones(1), ValueError, "(4,)", "(1,)"),
            ("2-D", np.ones((1, 4)), ValueError, "(4,)", "(1, 4)"),
            ("a column", np.ones((4, 1)), ValueError, "(4,)", "(4, 1)"),
            ("bool", np.ones(4, bool), TypeError, "bool", "real"),
            ("complex", np.ones(4, complex), TypeError, "complex"),
            ("masked", np.ma.masked_array(np.ones(4)), TypeError, "MaskedArray"),
            ("strings", ["a", "b", "c", "d"], TypeError),
        )
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    kwargs, error, words = OPTIONS[name]
    check(error, words, fs.attention, Q, K, V, **kwargs)
    check(error, words, fs.attention, Q, K, V, **kwargs, out=filled())
    everything = {"is_causal": True, "return_lse": True, "return_weights": True}
    check(error, words, fs.attention, Q, K, V, **kwargs, **everything)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_looked_at_before_memory_is_taken(name):
    kwargs, error, (argument, *_) = OPTIONS[name]
    check(error, (argument,), fs.attention, *inputs(**HUGE), **kwargs, return_weights=True)


def test_there_is_no_memory_for_the_huge_result():
    """Or the test above would show nothing."""
    with pytest.raises(MemoryError):
        fs.attention(*inputs(**HUGE))


def test_2d_input_has_no_dimension_for_a_mask_of_heads():
    for name, value in (("mask", np.ones((1, 5, 7), bool)), ("bias", np.ones((1, 5, 7)))):
        words = name, "(1, 5, 7)", "(5, 7)"
        check(ValueError, words, fs.attention, Q[0, 0], K[0, 0], V[0, 0], **{name: value})
    for name in ("q_offset", "kv_lengths"):
        check(ValueError, (name, "(1,)", "()"), fs.attention, Q[0], K[0], V[0], **{name: [1]})


def test_options_are_keywords():
    with pytest.raises(TypeError):
        fs.attention(Q, K, V, np.ones(7, bool))
    with pytest.raises(TypeError):
        fs.attention(Q, K, v=V)
    with pytest.raises(TypeError):
        fs.attention(Q, K, V, attn_mask=None)


# --- out ------------------------------------------------------------------------------------------

# (a function that makes out, exception, words of the message)
OUTS = {
    "shape of q": (lambda: filled(Q.shape), ValueError, ("(2, 4, 5, 8)", str(OUT))),
    "no batch": (lambda: filled(OUT[1:]), ValueError, (str(OUT[1:]), str(OUT))),
    "broadcastable": (lambda: filled((1, *OUT)), ValueError, (str((1, *OUT)), str(OUT))),
    "read-only": (lambda: read_only(filled()), ValueError, ("read-only",)),
    "broadcast": (lambda: as_strided(filled(), OUT, (0, 120, 24, 4)), ValueError, ("share",)),
    "overlaps itself": (
        lambda: as_strided(filled(), OUT, (480, 120, 20, 4)),
        ValueError,
        ("share",),
    ),
    "float16": (lambda: filled(dtype=F16), TypeError, ("float16", "float32", "q")),
    "float64": (lambda: filled(dtype=F64), TypeError, ("float64", "float32", "q")),
    "int": (lambda: filled(dtype=int), TypeError, ("int64", *SUPPORTED)),
    "complex": (lambda: filled(dtype=complex), TypeError, ("complex128", *SUPPORTED)),
    "byte-swapped": (lambda: filled(dtype=F32.newbyteorder()), TypeError, ("byte order",)),
    "masked": (lambda: np.ma.masked_array(filled()), TypeError, ("MaskedArray", "ndarray")),
    "a list": (lambda: [7, 7], TypeError, ("list", "ndarray")),
    "a scalar": (lambda: np.float32(7), TypeError, ("ndarray",)),
    "a tuple": (lambda: (filled(),), TypeError, ("tuple", "ndarray")),
}


@pytest.mark.parametrize("name", OUTS)
def test_out(name):
    make, error, words = OUTS[name]
    check(error, ("out", *words), fs.attention, Q, K, V, out=make())
    check(error, ("out", *words), fs.attention, Q, K, V, out=make(), return_weights=True)


def test_out_of_2d_input_is_2d():
    out = filled((1, 5, 6))
    check(ValueError, ("out", "(1, 5, 6)", "(5, 6)"), fs.attention, Q[0, 0], K[0, 0], V[0, 0],
          out=out)  # fmt: skip


# --- merge_attention ------------------------------------------------------------------------------

O_A, LSE_A = np.ones((2, 5, 6), F32), np.zeros((2, 5), F32)
HALF = O_A.astype(F16)

# (arguments, exception, words of the message)
MERGES = {
    "shapes of out": (
        (O_A, LSE_A, O_A[:1], LSE_A),
        ValueError,
        ("out_b", "(2, 5, 6)", "(1, 5, 6)"),
    ),
    "out broadcasts": ((O_A, LSE_A, O_A[0], LSE_A[0]), ValueError, ("out_b", "(5, 6)")),
    "0-D out": ((F32.type(1), LSE_A, F32.type(1), LSE_A), ValueError, ("out_a", "columns", "()")),
    "shape of lse_a": ((O_A, LSE_A.T, O_A, LSE_A), ValueError, ("lse_a", "(5, 2)", "(2, 5)")),
    "shape of lse_b": ((O_A, LSE_A, O_A, LSE_A[0]), ValueError, ("lse_b", "(5,)", "(2, 5)")),
    "lse keeps its dimension": (
        (O_A, LSE_A[..., None], O_A, LSE_A),
        ValueError,
        ("lse_a", "(2, 5, 1)", "(2, 5)"),
    ),
    "dtypes of out": ((O_A, LSE_A, HALF, LSE_A), TypeError, ("out_b", "float32", "float16")),
    "float16 lse": ((HALF, LSE_A, HALF, LSE_A.astype(F16)), TypeError, ("lse_b", "float32")),
    "float64 lse": ((O_A, LSE_A.astype(F64), O_A, LSE_A), TypeError, ("lse_a", "float32")),
    "float32 lse of float64": (
        (O_A.astype(F64), LSE_A, O_A.astype(F64), LSE_A),
        TypeError,
        ("lse_a", "float64", "float32"),
    ),
    "int out": ((O_A.astype(int), LSE_A, O_A, LSE_A), TypeError, ("out_a", "int64", *SUPPORTED)),
    "int lse": ((O_A, LSE_A, O_A, LSE_A.astype(int)), TypeError, ("lse_b", "int64", *SUPPORTED)),
    "complex out": ((O_A, LSE_A, O_A * 1j, LSE_A), TypeError, ("out_b", "complex64", *SUPPORTED)),
    "masked out": ((O_A, LSE_A, np.ma.masked_array(O_A), LSE_A), TypeError, ("out_b", "Masked")),
    "masked lse": ((O_A, np.ma.masked_array(LSE_A), O_A, LSE_A), TypeError, ("lse_a", "Masked")),
    "no lse": ((O_A, None, O_A, None), TypeError, ("lse_a", *SUPPORTED)),
    "a pair": (((O_A, LSE_A), LSE_A, O_A, LSE_A), (TypeError, ValueError), ()),
}


@pytest.mark.parametrize("name", MERGES)
def test_merge_attention(name):
    args, error, words = MERGES[name]
    check(error, words, fs.merge_attention, *args)


def test_after_every_error_the_library_still_works():
    for kwargs, error, _ in OPTIONS.values():
        with pytest.raises(error):
            fs.attention(Q, K, V, **kwargs)
    assert fs.attention(Q, K, V) == pytest.approx(1, abs=1e-6)


def test_leading_dimensions_that_numpy_does_not_broadcast():
    """More than 32 of them, if they differ; as many as there can be, if not."""
    q = np.ones((1,) * 61 + (2, 2, 2), F32)
    assert fs.attention(q, q, q).shape == q.shape
    with pytest.raises(ValueError, match="q, k and v before the heads must broadcast together"):
        fs.attention(q, q[0, 0], q[0])
