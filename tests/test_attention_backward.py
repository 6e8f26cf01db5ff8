"""attention_backward against the oracle, within its bound, and against steps of attention.

`reference_gradients.attention_backward_bound` is the bound; halves may be off by an ulp of theirs
more. What is printed at the end is in units of it.
"""

import functools
import itertools

import numpy as np
import pytest
from common import (
    ATTENTION_OPTIONS,
    BF16,
    F16,
    F32,
    F64,
    SMALLEST_SUBNORMAL,
    WIDE,
    GuardedPages,
    Size,
    assert_canonical_nan,
    assert_plus_zero,
    assert_same_bits,
    compute_type,
    every_dtype,
    normal,
    one_ulp,
    relative_to,
    rng,
    some_option,
    unaligned,
    visible_keys,
)

import fastsoftmax as fs
from fastsoftmax import reference_gradients as reference

SIZE = Size()
NAMES = ("dq", "dk", "dv", "dbias", "dsinks")


class Backward:
    """A call of attention_backward, what is true of its results, how far off they may be."""

    def __init__(self, q, k, v, **options):
        self.options = options
        self.dtype = q.dtype
        out, lse = fs.attention(q, k, v, **options, return_lse=True)
        self.arrays = normal(out.shape, q.dtype, 1.0, "grad"), q, k, v, out, lse
        self.asked = {f"return_d{n}": True for n in ("bias", "sinks") if n in options}

    @functools.cached_property
    def true(self):
        precise = WIDE if self.dtype == F64 else np.float64
        return reference.attention_backward(
            *self.arrays, **self.options, **self.asked, precise=precise
        )

    @functools.cached_property
    def bounds(self):
        return reference.attention_backward_bound(*self.arrays, **self.options, **self.asked)

    def run(self):
        return fs.attention_backward(*self.arrays, **self.options, **self.asked)

    def check(self, record_max, name, what=""):
        results = self.run()
        assert type(results) is tuple
        inner = compute_type(self.dtype)
        names = [n for n in NAMES if n[1:] in "qkv" or f"return_{n}" in self.asked]
        for result, got, true, bound in zip(names, results, self.true, self.bounds, strict=True):
            dtype = got.dtype
            assert got.shape == true.shape, (what, result, got.shape)
            if result[1:] in "qkv":
                assert dtype == self.dtype, (what, result, dtype)
            allowed = bound + SMALLEST_SUBNORMAL[inner] * 1e4
            if dtype != inner:
                allowed = allowed + one_ulp(true, dtype)
            errors = relative_to(allowed, got, true)
            record_max(f"{name}, {result} {self.dtype.name}", errors, 1.0, what, "of the bound")


# --- values ---------------------------------------------------------------------------------------

COMBINATIONS = {
    "alone": [(name,) for name in ATTENTION_OPTIONS],
    "pairs": [*itertools.combinations(ATTENTION_OPTIONS, 2)],
    "all but one": [tuple(n for n in ATTENTION_OPTIONS if n != one) for one in ATTENTION_OPTIONS],
}


@functools.lru_cache(maxsize=1)
def calls_with_options(dtype, count):
    r = rng("backward", dtype.name, count)
    qkv = SIZE.qkv(dtype, count)
    if count == "alone":
        options = [
            {name: form(r, SIZE)} for name, forms in ATTENTION_OPTIONS.items()
            for form in forms.values()
        ]  # fmt: skip
    else:
        options = [{n: some_option(n, r, SIZE) for n in names} for names in COMBINATIONS[count]]
    return [Backward(*qkv, **o) for o in options]


@every_dtype
@pytest.mark.parametrize("count", COMBINATIONS)
def test_options(isa, dtype, count, record_max):
    for call in calls_with_options(dtype, count):
        call.check(record_max, "backward options", call.options)


SIZES = [
    *(Size((), 1, 1, n, n, 4, 4) for n in (1, 2, 3, 11, 12, 23, 24, 25, 47, 48, 49, 63, 64, 65)),
    *(Size((), 1, 1, n, 70, 4, 9) for n in (95, 97, 193, 400)),
    *(Size((2,), 2, 2, 5, n, 3, 7) for n in (127, 128, 129, 513)),
    *(Size((), 1, 1, 26, 70, n, 1 + 40 % n) for n in (1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 65)),
    Size((), 3, 1, 200, 530, 8, 4),  # two parts
]


@functools.lru_cache(maxsize=1)
def calls_with_sizes(dtype):
    return [
        (size, Backward(*size.qkv(dtype, "sizes"), is_causal=causal, q_offset=causal * 3))
        for size in SIZES
        for causal in (False, True)
    ]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=lambda d: d.name)
def test_sizes(isa, dtype, record_max):
    for size, call in calls_with_sizes(dtype):
        call.check(record_max, "backward sizes", size)


@functools.lru_cache(maxsize=1)
def a_long_piece():
    return Backward(*Size((), 2, 1, 7000, 130, 64, 64).qkv(F32))


def test_a_piece_that_takes_long_is_cut(isa, record_max):
    """Few keys and many queries: more parts than the keys alone would have."""
    with fs.num_threads(2):
        a_long_piece().check(record_max, "a long piece")


def test_against_steps_of_attention(isa):
    """Central differences in float64: off by about step^2 and 1e-16 / step."""
    size, step = Size((2,), 4, 2, 7, 9, 5, 3), 1e-5
    r = rng("steps")
    q, k, v = size.qkv(F64, scale=0.7)
    changes = {
        "q": q,
        "k": k,
        "v": v,
        "bias": r.normal(0, 1, (4, 1, 9)),
        "sinks": r.normal(0, 1, 4),
    }
    fixed = {"softcap": 3.0, "alibi_slopes": [0.1, 0.2, 0.3, 0.4], "window": (6, None),
             "q_offset": 2, "mask": r.random(size.scores) < 0.8}  # fmt: skip

    def attend(q, k, v, **options):
        return fs.attention(q, k, v, **options, **fixed, return_lse=True)

    out, lse = attend(**changes)
    grad = r.normal(size=out.shape)
    options = {n: changes[n] for n in ("bias", "sinks")}
    got = fs.attention_backward(
        grad, q, k, v, out, lse, **options, **fixed, return_dbias=True, return_dsinks=True
    )
    for name, gradient in zip(changes, got, strict=True):
        for _ in range(5):
            way = r.normal(size=gradient.shape)
            up, down = (
                attend(**{**changes, name: changes[name] + s * way})[0] for s in (step, -step)
            )
            want = np.sum(grad * (up - down)) / (2 * step)
            assert abs(np.sum(gradient * way) - want) < 1e-7 * max(1, abs(want)), name


# --- arrays ---------------------------------------------------------------------------------------


@every_dtype
def test_one_head(isa, dtype, record_max):
    q, k, v = Size((), 1, 1, 30, 40, 8, 6).qkv(dtype)
    r = rng("one head")
    Backward(q[0], k[0], v[0], bias=r.normal(size=(30, 1)).astype(F32)).check(record_max, "2-D")


def test_what_is_broadcast_is_added_up(isa, record_max):
    """Along leading dimensions, heads, queries and keys."""
    r = rng("broadcast")
    q, k, v = Size((2, 3), 4, 2, 30, 70, 8, 6).qkv(F32)
    for sinks in ({}, {"sinks": r.normal(size=4).astype(F32)}):
        for bias in ((70,), (30, 1), (4, 1, 1), (1,), (), (3, 1, 30, 70), (2, 1, 1, 1, 70)):
            options = {"bias": r.normal(size=bias).astype(F32), **sinks}
            Backward(q, k, v, **options).check(record_max, "broadcast bias", bias)
            Backward(q, k[0, 0], v[:, :1], **options).check(record_max, "broadcast k, v", bias)
            Backward(q[:, 0, None], k[0], v, **options).check(record_max, "broadcast q", bias)


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=lambda d: d.name)
def test_strides(isa, dtype):
    """Any strides and alignment: the same bits."""
    call = Backward(*SIZE.qkv(dtype), is_causal=True)
    want = call.run()
    *arrays, lse = call.arrays
    for change in (
        unaligned,
        lambda a: np.ascontiguousarray(a.swapaxes(-1, -3)).swapaxes(-1, -3),
        lambda a: a[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
        lambda a: np.repeat(a, 3, -1)[..., 1::3],
    ):
        got = fs.attention_backward(*map(change, arrays), change(lse), is_causal=True)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


def test_threads_change_no_bit(isa):
    r = rng("threads")
    for size in (Size((), 2, 1, 530, 600, 8, 8), Size((2,), 4, 2, 40, 1100, 8, 4)):
        q, k, v = size.qkv(F32)
        bias = r.normal(size=(size.queries, size.keys)).astype(F32)
        for call in (Backward(q, k, v, bias=bias), Backward(q, k, v, is_causal=True)):
            with fs.num_threads(1):
                want = call.run()
            for n in (2, 3, 8):
                with fs.num_threads(n):
                    for a, b in zip(call.run(), want, strict=True):
                        assert_same_bits(a, b, (size, n))


def test_weights_of_huge_scores(isa):
    """One key, whose weight is 1: lse is off by more than any weight, and the weight at most 1."""
    for x, y in ((98596585472, 1.98083532), (887834816, 1.77326465), (37496668160, 1.45104742)):
        q, k, one = np.full((1, 1), x, F32), np.full((1, 1), y, F32), np.ones((1, 1), F32)
        out, lse = fs.attention(q, k, one, scale=0.7, return_lse=True)
        dv = fs.attention_backward(one, q, k, one, out, lse, scale=0.7)[2]
        assert 0 <= dv[0, 0] <= 1


def test_gradient_of_a_sink_that_is_all_a_query_sees(isa):
    """It is 0: so is the result, whatever the sink, and whatever the result's gradient."""
    grad, q, k = normal((2, 5, 8), F32), normal((2, 5, 8), F32), normal((2, 6, 8), F32)
    options = {"mask": np.arange(5)[:, None] != 2, "sinks": np.array([0.3, -1], F32)}
    out, lse = fs.attention(q, k, k, **options, return_lse=True)
    want = fs.attention_backward(grad, q, k, k, out, lse, **options, return_dsinks=True)
    grad[:, 2] = np.inf, np.nan, -np.inf, 0, 1, 2, 3, 4
    got = fs.attention_backward(grad, q, k, k, out, lse, **options, return_dsinks=True)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(
    "shape", [(192, 1), (1, 192, 1), (8, 1, 1), (8, 1, 2048), (192, 2048), (1,)]
)
def test_pieces_that_meet_in_the_gradient_of_a_bias(shape):
    """Heads that share k and v, rows and keys are done at once: where a bias is broadcast they
    would add to the same number. On the fastest ISA: how work is cut is no kernel's business."""
    q, k = normal((8, 192, 8), F32), normal((1, 2048, 8), F32)
    bias = normal(shape, F32)
    out, lse = fs.attention(q, k, k, bias=bias, return_lse=True)

    def gradient(threads):
        with fs.num_threads(threads):
            return fs.attention_backward(q, q, k, k, out, lse, bias=bias, return_dbias=True)[3]

    want = gradient(1)
    for _ in range(4):
        assert_same_bits(gradient(8), want)


def test_batch_and_heads_change_no_bit(isa):
    q, k, v = Size((3,), 4, 2, 300, 600, 8, 8).qkv(F32)
    call = Backward(q, k, v, is_causal=True)
    whole = call.run()
    for one in ((slice(1, 2), slice(0, 2), slice(0, 1)), (slice(2, 3), slice(2, 4), slice(1, 2))):
        queries, keys = (one[0], one[1]), (one[0], one[2])
        grad, q, k, v, out, lse = call.arrays
        got = fs.attention_backward(
            grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries], is_causal=True
        )
        for a, b, at in zip(got, whole, (queries, keys, keys), strict=True):
            assert_same_bits(a, b[at])


def test_inputs_are_not_modified(isa):
    call = Backward(*SIZE.qkv(F32), mask=np.ones(SIZE.scores, bool))
    before = [a.copy() for a in call.arrays]
    for a in call.arrays:
        a.setflags(write=False)
    call.run()
    for a, b in zip(call.arrays, before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("at", ["start", "end"])
@every_dtype
def test_guard_pages(isa, dtype, at):
    """Every input lies against a page that nobody may touch."""
    pages = [GuardedPages(1 << 18) for _ in range(8)]
    for size in (Size((), 1, 1, 5, 7, 3, 5), Size((2,), 2, 1, 27, 67, 9, 17)):
        call = Backward(*size.qkv(dtype), bias=normal(size.scores, F32), mask=np.True_)
        arrays = [p.copy_of(a, at) for p, a in zip(pages, call.arrays, strict=False)]
        bias = pages[6].copy_of(call.options["bias"], at)
        mask = pages[7].copy_of(np.ones(size.scores, bool), at)
        got = fs.attention_backward(*arrays, bias=bias, mask=mask, return_dbias=True)
        for a, b in zip(got, call.run(), strict=True):
            assert_same_bits(a, b)


# --- special values -------------------------------------------------------------------------------


def some_pairs():
    """Bool, in the shape of scores: also rows and columns of which nothing is seen."""
    r = rng("hiding")
    seen = r.random(SIZE.scores) < 0.5
    return seen & (r.random(70) < 0.7) & (r.random((53, 1)) < 0.7)


HIDING = {
    "causal": {"is_causal": True},
    "lengths": {"kv_lengths": [40, 0]},
    "window": {"window": (3, 2)},
    "mask": {"mask": some_pairs()},
    "padding": {"mask": (np.arange(70) < 50)[None, :]},
    "padding in front": {"mask": (np.arange(70) >= 66)[None, :]},
    "blind": {"mask": rng("blind").random((53, 1)) < 0.5},
    "bias": {"bias": np.where(some_pairs(), 1, -np.inf).astype(F32)},
}


@every_dtype
@pytest.mark.parametrize("how", HIDING)
def test_what_is_not_seen_changes_nothing(isa, dtype, how):
    """NaN and infinities in keys, values, queries, grad_out and out, where nobody looks."""
    options, (q, k, v) = HIDING[how], SIZE.qkv(dtype)
    call = Backward(q, k, v, **options)
    want = call.run()
    grad, q, k, v, out, lse = (a.copy() for a in call.arrays)
    seen = visible_keys(q, k, v, **options)
    blind = ~seen.any(-1)
    dark = ~seen.any(-2).reshape(2, 2, 2, -1).any(2)  # keys, of both heads that share them
    for a in (grad, q, out):
        a[blind] = np.nan
    grad[blind, 0] = np.inf
    k[dark], v[dark] = np.inf, np.nan
    assert how == "window" or blind.any() or dark.any()
    got = fs.attention_backward(grad, q, k, v, out, lse, **options, **call.asked)
    for a, b, name in zip(got, want, NAMES, strict=False):
        assert_same_bits(a, b, name)
    assert_plus_zero(got[0][blind])
    assert_plus_zero(got[1][dark])
    assert_plus_zero(got[2][dark])


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("how", ["causal", "window", "mask"])
def test_what_is_seen_spreads_as_far_as_it_is_seen(isa, dtype, how):
    """One NaN in one array: NaN in the oracle's places and the bits of before in all others."""
    options = HIDING[how]
    call = Backward(*SIZE.qkv(dtype), **options)
    want = call.run()
    before = dict(zip(NAMES, call.true, strict=False))
    for i, value in itertools.product(range(6), (np.nan, np.inf)):
        arrays = [a.copy() for a in call.arrays]
        arrays[i][1, 1, 17] = value
        got = fs.attention_backward(*arrays, **options)
        true = reference.attention_backward(*arrays, **options, precise=before["dq"].dtype.type)
        for a, b, t, name in zip(got, want, true, NAMES, strict=False):
            odd = ~np.isfinite(t)
            np.testing.assert_array_equal(~np.isfinite(a.astype(F64)), odd, (i, value, name))
            assert_canonical_nan(a[np.isnan(a.astype(F64))])
            untouched = t == before[name]
            assert_same_bits(a[untouched], b[untouched], (i, value, name))
            nothing = {(3, "dv"), (4, "dv"), (5, "dq"), (5, "dk"), (5, "dv")}
            assert odd.any() or (i, name) in nothing, (i, name)


def test_empty(isa):
    for size in (
        Size((0,), 2, 1, 3, 4, 5, 6),
        Size((2,), 2, 1, 0, 4, 5, 6),
        Size((2,), 2, 1, 3, 0, 5, 6),
        Size((2,), 2, 1, 3, 4, 5, 0),
    ):
        call = Backward(*size.qkv(F32))
        for got, like in zip(call.run(), call.arrays[1:4], strict=True):
            assert got.shape == like.shape
            assert_plus_zero(got) if size.v_depth else None


@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64), ids=str)
def test_softcap_and_nan_out_of_sight(isa, dtype):
    """The derivative of a cap is NaN where the score is, which a weight of 0 does not cancel."""

    def gradients(q, k):
        options = {"softcap": 2.0, "is_causal": True}
        y, lse = fs.attention(q, k, v, return_lse=True, **options)
        return fs.attention_backward(v, q, k, v, y, lse, **options)

    q, k, v = np.random.default_rng(5).standard_normal((3, 3, 8)).astype(dtype)
    dq, dk, dv = gradients(q, k)
    poisoned = k.copy()
    poisoned[2] = np.nan  # seen by the last query
    assert_same_bits(gradients(q, poisoned)[0][:2], dq[:2])
    poisoned = q.copy()
    poisoned[0] = np.nan  # sees the first key
    for got, clean in zip(gradients(poisoned, k)[1:], (dk, dv), strict=True):
        assert_same_bits(got[1:], clean[1:])


# --- errors ---------------------------------------------------------------------------------------

Q, K, V = (np.ones(s, F32) for s in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
OUT, LSE = np.ones((2, 4, 5, 6), F32), np.ones((2, 4, 5), F32)


@pytest.mark.parametrize(
    "error, words, arrays, options",
    [
        (TypeError, ("grad_out", "float32", "float64"), {0: OUT.astype(F64)}, {}),
        (ValueError, ("grad_out", "(2, 4, 5, 6)", "(5, 6)"), {0: OUT[0, 0]}, {}),
        (TypeError, ("out", "float32", "float16"), {4: OUT.astype(F16)}, {}),
        (ValueError, ("out", "(2, 4, 5, 6)"), {4: OUT[..., :5]}, {}),
        (TypeError, ("lse", "float32", "float64"), {5: LSE.astype(F64)}, {}),
        (ValueError, ("lse", "(2, 4, 5)", "(2, 4, 4)"), {5: LSE[..., :4]}, {}),
        (TypeError, ("lse", "MaskedArray"), {5: np.ma.masked_array(LSE)}, {}),
        (TypeError, ("grad_out",), {0: None}, {}),
        (TypeError, ("same dtype",), {2: K.astype(F64)}, {}),
        (TypeError, ("mask", "bias"), {}, {"mask": np.ones((5, 7))}),
        (ValueError, ("softcap",), {}, {"softcap": 0}),
        (ValueError, ("return_dbias", "bias"), {}, {"return_dbias": True}),
        (ValueError, ("return_dsinks", "sinks"), {}, {"return_dsinks": True}),
    ],
)
def test_errors(error, words, arrays, options):
    given = [arrays.get(i, a) for i, a in enumerate((OUT, Q, K, V, OUT, LSE))]
    with pytest.raises(error) as caught:
        fs.attention_backward(*given, **options)
    for word in words:
        assert word in str(caught.value), caught.value
