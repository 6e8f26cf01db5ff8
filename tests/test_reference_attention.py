"""The oracle of attention against a loop over single numbers in mpmath, and against arithmetic."""

import math
from itertools import product

import mpmath
import numpy as np
import pytest
from common import BF16, F16, F32, F64, FLOATS, WIDE, compute_type, every_dtype, rng

from fastsoftmax.reference import attention, attention_bound, merge_attention, softmax

NAN, INF = np.nan, np.inf
every_precision = pytest.mark.parametrize("precise", [np.float64, pytest.param(WIDE, id="wide")])


def close(got, want, tolerance=1e-14):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def everything(*arrays, **options):
    """Out, lse and weights, with floating-point traps armed."""
    with np.errstate(all="raise"):
        return attention(*arrays, return_lse=True, return_weights=True, **options)


# --- the definition, one number at a time ---------------------------------------------------------


def one_query(q, k, v, p, causal, window, length, mask, bias, scale, softcap, slope, sink):
    """Out, lse and weights of a query at position p; all numbers are mpf."""
    left, right = window or (None, None)
    terms = []
    for j, key in enumerate(k):
        if (
            (causal and j > p)
            or (left is not None and j < p - left)
            or (right is not None and j > p + right)
            or j >= length
            or not mask[j]
            or bias[j] == -INF
        ):
            terms.append(mpmath.mpf(0))
            continue
        score = scale * sum(a * b for a, b in zip(q, key, strict=True))
        if softcap:
            score = softcap * mpmath.tanh(score / softcap)
        terms.append(mpmath.exp(score + bias[j] - slope * abs(p - j)))
    total = sum(terms) + mpmath.exp(sink)
    weights = [t / total if t else t for t in terms]
    out = [sum(w * row[c] for w, row in zip(weights, v, strict=True)) for c in range(len(v[0]))]
    return out, mpmath.log(total) if total else mpmath.mpf(-INF), weights


def all_queries(
    q, k, v, mask=True, bias=0, is_causal=False, q_offset=0, kv_lengths=None, window=None,
    scale=None, softcap=None, sinks=None, alibi_slopes=None,
):  # fmt: skip
    """`one_query` for q [B, H, Q, D] and k, v [B, G, K, ...]."""
    inner = compute_type(q.dtype)

    def numbers(x, *shape):
        x = np.asarray(x).astype(inner).astype(float)
        return np.vectorize(mpmath.mpf, [object])(np.broadcast_to(x, shape or x.shape))

    (batch, heads, queries, depth), (kv_heads, keys) = q.shape, k.shape[1:3]
    q, k, v, bias = numbers(q), numbers(k), numbers(v), numbers(bias, batch, heads, queries, keys)
    mask = np.broadcast_to(mask, bias.shape)
    offset = np.broadcast_to(q_offset, batch).tolist()
    lengths = np.broadcast_to(keys if kv_lengths is None else kv_lengths, batch).tolist()
    scale = mpmath.mpf(1 / math.sqrt(depth) if scale is None else scale)
    slopes = numbers(0 if alibi_slopes is None else alibi_slopes, heads)
    sinks = numbers(-INF if sinks is None else sinks, heads)
    rows = []
    for b, h, i in np.ndindex(batch, heads, queries):
        g = h // (heads // kv_heads)
        rows.append(
            one_query(
                q[b, h, i], k[b, g], v[b, g], offset[b] + i, is_causal, window, lengths[b],
                mask[b, h, i], bias[b, h, i], scale, softcap, slopes[h], sinks[h],
            )
        )  # fmt: skip
    shape = batch, heads, queries
    return [to_wide(r).reshape(*shape, *np.shape(r[0])) for r in zip(*rows, strict=True)]


def to_wide(numbers):
    """An array of the widest type from lists of mpf."""
    numbers = np.array(numbers, object)
    high = numbers.astype(float)
    rest = np.where(np.isinf(high), 0, numbers - high.astype(object)).astype(float)
    return high.astype(WIDE) + rest


def assert_follows_the_definition(q, k, v, precise, **options):
    with mpmath.workdps(40):
        want = all_queries(q, k, v, **options)
    for a, b in zip(everything(q, k, v, precise=precise, **options), want, strict=True):
        assert a.dtype == precise and a.shape == b.shape
        tolerance = 100 * np.finfo(precise).eps
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=f"{options}")


def random_problem(r, **has):
    """q, k, v and options of a small problem; which of the optional ones, `has` says."""
    dtype = FLOATS[r.integers(4)]
    heads, kv_heads = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)][r.integers(5)]
    queries, keys, depth, columns = r.integers(1, [4, 5, 4, 3])

    def normal(*shape):
        return 1.5 * r.standard_normal(shape)

    q = normal(2, heads, queries, depth).astype(dtype)
    k = normal(2, kv_heads, keys, depth).astype(dtype)
    v = normal(2, kv_heads, keys, columns).astype(dtype)
    bias = normal(heads, queries, keys)
    optional = {
        "mask": r.random((2, 1, queries, keys)) < 0.7,
        "bias": np.where(r.random(bias.shape) < 0.2, -INF, bias),
        "kv_lengths": r.integers(0, keys + 1, 2),
        "softcap": 1.5,
        "sinks": normal(heads),
        "alibi_slopes": normal(heads),
    }
    options = {name: value for name, value in optional.items() if has[name]}
    return q, k, v, options | {"scale": (None, normal())[r.integers(2)]}


def test_the_definition():
    """The product of all options on problems of random dtypes and shapes."""
    r = rng("attention")
    names = "mask", "bias", "kv_lengths", "softcap", "sinks", "alibi_slopes"
    places = list(
        product((False, True), (None, (1, 0), (None, 1), (0, None)), (0, -1, np.array([1, 3])))
    )
    for has in product((False, True), repeat=len(names)):
        for causal, window, offset in places:
            q, k, v, options = random_problem(r, **dict(zip(names, has, strict=True)))
            options |= {"is_causal": causal, "window": window, "q_offset": offset}
            assert_follows_the_definition(q, k, v, (np.float64, WIDE)[r.integers(2)], **options)


@every_precision
@every_dtype
def test_long_rows(dtype, precise):
    """Against softmax and a product of matrices, where NumPy sums in another order."""
    r = rng("long")
    q, k = (3 * r.standard_normal((n, 8)).astype(dtype) for n in (5, 700))
    v = np.eye(700)[:, :3].astype(dtype)
    out, lse, weights = everything(q, k, v, precise=precise)
    scores = q.astype(precise) @ k.astype(precise).T / precise(math.sqrt(8))
    close(weights, softmax(scores.astype(np.float64)), 1e-13)
    close(np.exp(scores - lse[:, None]), weights, 1e-13)
    np.testing.assert_array_equal(out, weights[:, :3])


# --- cases by hand --------------------------------------------------------------------------------

VALUES = np.array([[1.0], [2.0], [4.0], [8.0]])


@pytest.mark.parametrize(
    ("options", "means"),
    [
        ({}, [15 / 4] * 4),
        ({"is_causal": True}, [1, 3 / 2, 7 / 3, 15 / 4]),
        ({"is_causal": True, "q_offset": 1}, [3 / 2, 7 / 3, 15 / 4, 15 / 4]),
        ({"is_causal": True, "q_offset": -2}, [0, 0, 1, 3 / 2]),
        ({"is_causal": True, "q_offset": 2**63 - 1}, [15 / 4] * 4),
        ({"is_causal": True, "q_offset": -(2**63)}, [0] * 4),
        ({"window": (1, None)}, [15 / 4, 15 / 4, 14 / 3, 6]),
        ({"window": (None, 0)}, [1, 3 / 2, 7 / 3, 15 / 4]),
        ({"window": (0, 0)}, [1, 2, 4, 8]),
        ({"window": (1, 1)}, [3 / 2, 7 / 3, 14 / 3, 6]),
        ({"window": (0, 1), "is_causal": True}, [1, 2, 4, 8]),
        ({"window": (0, 0), "q_offset": 2}, [4, 8, 0, 0]),
        ({"window": (10**30, 0)}, [1, 3 / 2, 7 / 3, 15 / 4]),
        ({"window": (None, None)}, [15 / 4] * 4),
        ({"kv_lengths": 2}, [3 / 2] * 4),
        ({"kv_lengths": 0}, [0] * 4),
        ({"kv_lengths": np.uint8(3), "window": (0, None)}, [7 / 3, 3, 4, 0]),
        ({"mask": [True, False, False, True]}, [9 / 2] * 4),
        ({"mask": np.eye(4, dtype=bool)[::-1]}, [8, 4, 2, 1]),
        ({"mask": [[True], [False], [True], [False]], "kv_lengths": 1}, [1, 0, 1, 0]),
        ({"bias": [0, -INF, -INF, 0]}, [9 / 2] * 4),
        ({"bias": [np.log(3), -INF, -INF, 0], "is_causal": True}, [1, 1, 1, 11 / 4]),
        ({"alibi_slopes": [np.log(2)], "kv_lengths": 2}, [4 / 3, 5 / 3, 5 / 3, 5 / 3]),
        ({"alibi_slopes": [np.log(2)], "kv_lengths": 2, "q_offset": -1}, [4 / 3] * 2 + [5 / 3] * 2),
        ({"alibi_slopes": [-np.log(2)], "kv_lengths": 2}, [5 / 3, 4 / 3, 4 / 3, 4 / 3]),
        ({"sinks": [np.log(4)]}, [15 / 8] * 4),
        ({"sinks": [0], "is_causal": True, "q_offset": -1}, [0, 1 / 2, 1, 7 / 4]),
        ({"sinks": [-INF]}, [15 / 4] * 4),
    ],
    ids=str,
)  # fmt: skip
def test_means(options, means):
    """Queries of 0: what a query sees, weighs the same, but for bias, alibi and sink."""
    out, lse, weights = everything(np.zeros((4, 3)), np.ones((4, 3)), VALUES, **options)
    close(out[:, 0], means)
    close(weights @ VALUES, out)
    sees = weights.any(axis=-1)
    assert np.all(np.isfinite(lse) == (sees | ("sinks" in options)))


def test_scores():
    """scale, then softcap, then bias."""
    q, k = np.array([[2.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 4.0]])  # q.k = 2 and 4
    for scale, softcap, bias in product((None, 0, 0.5, -3, 2), (None, 0.1, 3, 1e6), (0, [1.0, -2])):
        factor = 1 / math.sqrt(2) if scale is None else scale
        scores = [2 * factor, 4 * factor]
        if softcap:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        e = np.exp(np.array(scores) + bias)
        options = {"scale": scale, "softcap": softcap, "bias": bias}
        out, lse, weights = everything(q, k, np.array([[1.0], [-2.0]]), **options)
        close(weights[0], e / e.sum())
        close(lse, [np.log(e.sum())])
        close(out, [[(e[0] - 2 * e[1]) / e.sum()]])


def test_capped_infinity():
    """An infinite product that softcap makes finite is like any other."""
    out, lse, _ = everything(
        [[1.0]], np.array([[INF], [-INF]]), VALUES[:2], softcap=0.5 * np.log(3)
    )
    close(out, [[5 / 4]])
    close(lse, [np.log(np.sqrt(3) + np.sqrt(1 / 3))])


def test_grouped_heads():
    """Head h belongs to KV head h // (H // G): values tell which one it read."""
    q, k = np.zeros((6, 1, 2)), np.zeros((3, 5, 2))
    v = np.arange(3.0).reshape(3, 1, 1) * np.ones((5, 1))
    np.testing.assert_array_equal(attention(q, k, v)[:, 0, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(attention(q, k[:1], v[1:2])[:, 0, 0], [1] * 6)
    sinks = np.log([5, 15, 5, 15, 5, 15])
    close(attention(q, k, v, sinks=sinks)[:, 0, 0], [0, 0, 1 / 2, 1 / 4, 1, 1 / 2])
    mask = np.arange(6).reshape(6, 1, 1) % 2 == 0
    np.testing.assert_array_equal(attention(q, k, v, mask=mask)[:, 0, 0], [0, 0, 1, 0, 2, 0])


def test_compute_type():
    """Bias, sinks and slopes are rounded to it; -1e300 is -inf in float32: not visible."""
    q, k, v = np.zeros((2, 1)), np.zeros((2, 1)), VALUES[:2]
    for dtype in FLOATS:
        arrays = [x.astype(dtype) for x in (q, k, v)]
        low = np.finfo(compute_type(dtype)).max.astype(float) * -1.0
        out = attention(*arrays, bias=[0, -1e300])
        assert out[0, 0] == 1
        _, lse, _ = everything(*arrays, bias=[-1e300, -1e300])
        assert lse[0] == (-1e300 if dtype == F64 else -INF)
        assert np.all(everything(*arrays, bias=[low, low])[1] == low)
        third = float(compute_type(dtype).type(1 / 3))
        for other in FLOATS:
            rounded = compute_type(dtype).type(np.array(1 / 3).astype(other))
            weights = everything(*arrays, bias=np.array([1 / 3, 0]).astype(other))[2]
            close(weights[0], softmax([float(rounded), 0.0]), 1e-15)
        assert everything(*arrays, sinks=[1 / 3], kv_lengths=0)[1].tolist() == [third] * 2
        close(everything(*arrays, alibi_slopes=[1 / 3])[2][0], softmax([0, -third]), 1e-15)
        assert everything(*arrays, bias=np.array([0, 1]))[1][0] == np.logaddexp(0, 1)


# --- special values -------------------------------------------------------------------------------

SPECIAL = [
    # scores, values, options; out, lse, weights
    ([], [], {}, 0, -INF, []),
    ([], [], {"sinks": [2]}, 0, 2, []),
    ([], [], {"sinks": [INF]}, 0, INF, []),
    ([0, 0], [1, 3], {"mask": False}, 0, -INF, [0, 0]),
    ([NAN, INF], [NAN, INF], {"mask": False}, 0, -INF, [0, 0]),
    ([NAN, INF], [NAN, INF], {"bias": -INF}, 0, -INF, [0, 0]),
    ([NAN, INF], [NAN, INF], {"bias": -INF, "sinks": [3]}, 0, 3, [0, 0]),
    ([NAN, INF], [NAN, INF], {"kv_lengths": 0, "sinks": [NAN]}, 0, NAN, [0, 0]),
    ([0, NAN], [1, NAN], {"mask": [True, False]}, 1, 0, [1, 0]),
    ([0, INF], [1, -INF], {"kv_lengths": 1}, 1, 0, [1, 0]),
    ([0, INF], [1, INF], {"bias": [0, -INF]}, 1, 0, [1, 0]),
    ([0, INF], [1, INF], {"is_causal": True}, 1, 0, [1, 0]),
    ([NAN, 0], [NAN, 1], {"window": (0, None), "q_offset": 1}, 1, 0, [0, 1]),
    ([0, 1], [1, 3], {"bias": [0, NAN], "mask": [True, False]}, 1, 0, [1, 0]),
    ([-INF, 0], [1, 3], {}, 3, 0, [0, 1]),
    ([-INF, -INF], [1, 3], {}, NAN, -INF, [NAN, NAN]),
    ([-INF, -INF], [1, 3], {"mask": [True, False]}, NAN, -INF, [NAN, 0]),
    ([-INF, 5], [1, 3], {"mask": [True, False]}, NAN, -INF, [NAN, 0]),
    ([-INF, 5], [1, 3], {"mask": [True, False], "sinks": [1]}, 0, 1, [0, 0]),
    ([-INF, 5], [1, 3], {"mask": [True, False], "sinks": [-INF]}, NAN, -INF, [NAN, 0]),
    ([NAN, 0], [1, 3], {}, NAN, NAN, [NAN, NAN]),
    ([NAN, INF], [1, 3], {}, NAN, NAN, [NAN, NAN]),
    ([INF, 0], [1, 3], {}, NAN, INF, [NAN, NAN]),
    ([INF, 0], [1, 3], {"sinks": [0]}, NAN, INF, [NAN, NAN]),
    ([INF, 0, 0], [1, 3, 5], {"kv_lengths": 2}, NAN, INF, [NAN, NAN, 0]),
    ([0, 0], [1, 3], {"bias": [0, INF]}, NAN, INF, [NAN, NAN]),
    ([0, 0], [1, 3], {"bias": [0, NAN]}, NAN, NAN, [NAN, NAN]),
    ([0, 0], [1, 3], {"sinks": [NAN]}, NAN, NAN, [NAN, NAN]),
    ([0, 0], [1, 3], {"sinks": [INF], "mask": [True, False]}, NAN, INF, [NAN, 0]),
    ([0, 0], [1, NAN], {"sinks": [-INF]}, NAN, np.log(2), [0.5, 0.5]),
    ([0, 0], [1, -INF], {}, -INF, np.log(2), [0.5, 0.5]),
    ([0, 0], [INF, -INF], {}, NAN, np.log(2), [0.5, 0.5]),
    ([0, -INF], [1, NAN], {}, NAN, 0, [1, 0]),
    ([1000, 1000], [1, 3], {}, 2, 1000 + np.log(2), [0.5, 0.5]),
    ([-1000, -1000], [1, 3], {"sinks": [-1000]}, 4 / 3, np.log(3) - 1000, [1 / 3, 1 / 3]),
    ([0, 0], [1, 3], {"sinks": [1000]}, 0, 1000, [0, 0]),
]


@every_precision
@every_dtype
@pytest.mark.parametrize(("scores", "values", "options", "out", "lse", "weights"), SPECIAL)
def test_special_queries(scores, values, options, out, lse, weights, dtype, precise):
    """A query and keys of one number, and a column of ones beside the values."""
    q, k = np.ones((1, 1), dtype), np.array(scores, dtype)[:, None]
    v = np.stack([values, np.ones(len(values))], 1).astype(dtype)
    got = everything(q, k, v, precise=precise, scale=1, **options)
    close(got[0], [[out, sum(weights)]])
    close(got[1], [lse])
    close(got[2], [weights])
    assert not np.signbit(got[0][got[0] == 0]).any()


def test_zeros_are_positive():
    q, k = np.zeros((2, 2, 3)), np.zeros((2, 4, 3))
    for v in (-0.0, -1.0):
        for mask in (True, False, [True, False, True, False]):
            out = attention(q, k, np.full((2, 4, 2), v), mask=mask)
            assert not np.signbit(out[out == 0]).any()


@every_precision
def test_poison(precise):
    """What a query does not see has no part in it: not one bit."""
    r = rng("poison")
    for turn in range(40):
        q, k, v = (r.standard_normal((2, 3, n, 4)) for n in (5, 7, 7))
        visible = r.random((2, 3, 5, 7)) < 0.4
        hidden = ~visible.any(axis=2)
        options = {"mask": visible, "precise": precise}
        if turn % 2:  # the same, by length
            length = int(r.integers(8))
            options |= {"kv_lengths": length}
            hidden |= np.arange(7) >= length
        bias = r.standard_normal(visible.shape)
        want = everything(q, k, v, bias=bias, **options)
        for poison in (NAN, INF, -INF):
            k[hidden], v[hidden] = poison, poison
            for got, w in zip(
                everything(q, k, v, bias=np.where(visible, bias, poison), **options),
                want,
                strict=True,
            ):
                np.testing.assert_array_equal(got, w)
        # A value that some see is poison for those, in its column, and for no others.
        v[0, 1, 3, 2] = NAN
        out = attention(q, k, v, bias=bias, **options)
        sees = np.zeros(out.shape, bool)
        sees[0, 1, :, 2] = visible[0, 1, :, 3] & ~hidden[0, 1, 3]
        np.testing.assert_array_equal(out, np.where(sees, NAN, want[0]))
        k[0, 1, 3, 0] = NAN
        got = everything(q, k, v, bias=bias, **options)
        sees = sees.any(-1, keepdims=True)
        np.testing.assert_array_equal(got[0], np.where(sees, NAN, want[0]))
        np.testing.assert_array_equal(got[1], np.where(sees[..., 0], NAN, want[1]))
        np.testing.assert_array_equal(got[2], np.where(sees & (want[2] > 0), NAN, want[2]))


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "k", "v", "out"),
    [
        ((3, 4), (5, 4), (5, 2), (3, 2)),
        ((1, 3, 4), (5, 4), (5, 2), (1, 3, 2)),
        ((3, 4), (1, 5, 4), (5, 2), (1, 3, 2)),
        ((3, 4), (5, 4), (1, 5, 2), (1, 3, 2)),
        ((6, 3, 4), (5, 4), (5, 2), (6, 3, 2)),
        ((6, 3, 4), (2, 5, 4), (2, 5, 2), (6, 3, 2)),
        ((7, 6, 3, 4), (2, 5, 4), (2, 5, 2), (7, 6, 3, 2)),
        ((6, 3, 4), (7, 2, 5, 4), (2, 5, 2), (7, 6, 3, 2)),
        ((6, 3, 4), (2, 5, 4), (7, 2, 5, 2), (7, 6, 3, 2)),
        ((8, 1, 6, 3, 4), (7, 2, 5, 4), (1, 1, 2, 5, 2), (8, 7, 6, 3, 2)),
        ((0, 4), (5, 4), (5, 2), (0, 2)),
        ((3, 4), (0, 4), (0, 2), (3, 2)),
        ((3, 4), (5, 4), (5, 0), (3, 0)),
        ((0, 0, 4), (0, 4), (0, 0), (0, 0, 0)),
        ((0, 3, 4), (2, 5, 4), (2, 5, 2), (0, 3, 2)),
        ((0, 6, 3, 4), (2, 5, 4), (1, 2, 5, 2), (0, 6, 3, 2)),
    ],
    ids=str,
)
@every_precision
def test_shapes(q, k, v, out, precise):
    q, k, v = (np.ones(s, np.float16) for s in (q, k, v))
    keys, heads = k.shape[-2], out[-3] if len(out) > 2 else 1
    every = {"mask": np.ones(keys, bool), "bias": np.zeros((out[-2], 1)), "is_causal": True}
    every |= {"sinks": np.zeros(heads), "alibi_slopes": np.zeros(heads), "kv_lengths": keys}
    for options in ({}, every):
        results = everything(q, k, v, precise=precise, **options)
        assert [r.shape for r in results] == [out, out[:-1], (*out[:-1], keys)]
        assert all(r.dtype == precise for r in results)
        bounds = attention_bound(
            q, k, v, precise=precise, return_lse=True, return_weights=True, **options
        )
        assert [b.shape for b in bounds] == [r.shape for r in results]
    if keys == 0:
        assert not results[0].any() and not results[1].any()
    for wrong in ({"mask": np.ones((2, *out[:-1], keys), bool)}, {"bias": np.zeros(keys + 2)}):
        with pytest.raises(ValueError, match=r"\(.*\) does not broadcast to .*\(.*\)"):
            attention(q, k, v, **wrong)


def test_what_is_returned():
    arrays = np.zeros((2, 1)), np.zeros((3, 1)), np.ones((3, 1))
    out, lse, weights = everything(*arrays)
    assert attention(*arrays).tolist() == out.tolist() == [[1], [1]]
    for names, want in (
        (["return_lse"], (out, lse)),
        (["return_weights"], (out, weights)),
        (["return_lse", "return_weights"], (out, lse, weights)),
    ):
        got = attention(*arrays, **dict.fromkeys(names, True))
        assert isinstance(got, tuple)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


def test_broadcasting():
    """Everything that may broadcast does: the same as one batch after the other."""
    r = rng("broadcast")
    q, k = r.standard_normal((3, 1, 4, 5, 2)), r.standard_normal((2, 2, 6, 2))
    v = r.standard_normal((2, 6, 3))
    batched = {
        "mask": [r.random(s) < 0.7 for s in ((3, 1, 1, 1, 6), (2, 4, 5, 1), (5, 6), (6,))],
        "bias": [r.standard_normal(s) for s in ((2, 1, 5, 6), (3, 1, 4, 1, 6), (4, 1, 1), (1,))],
        "q_offset": [np.array([[1], [-2], [3]]), np.array([0, 2]), np.array(1), 5],
        "kv_lengths": [np.array([3, 6]), np.array([[4], [0], [6]]), np.int8(5), 6],
    }
    full = {
        "mask": (3, 2, 4, 5, 6),
        "bias": (3, 2, 4, 5, 6),
        "q_offset": (3, 2),
        "kv_lengths": (3, 2),
    }
    for values in zip(*batched.values(), strict=True):
        options = dict(zip(batched, values, strict=True))
        got = everything(q, k, v, is_causal=True, **options)
        expanded = {n: np.broadcast_to(x, full[n]) for n, x in options.items()}
        for i, j in np.ndindex(3, 2):
            own = {n: x[i, j] for n, x in expanded.items()}
            want = everything(q[i, 0], k[j], v, is_causal=True, **own)
            for a, b in zip(got, want, strict=True):
                close(a[i, j], b)


# --- merge_attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [None, [-1.0, 0.5, 2.0]], ids=["", "sinks"])
def test_merged_halves(sinks):
    """Keys cut in two anywhere; some queries see nothing of a half, or of both."""
    r = rng("merge")
    q, k, v = (r.standard_normal((2, 3, n, 4)) for n in (5, 6, 6))
    mask = r.random((2, 3, 5, 6)) < 0.3
    whole = attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    for cut in range(7):
        halves = [
            attention(
                q,
                k[..., keys, :],
                v[..., keys, :],
                mask=mask[..., keys],
                sinks=sink,
                return_lse=True,
            )
            for keys, sink in ((slice(cut), sinks), (slice(cut, None), None))
        ]
        for (out_a, lse_a), (out_b, lse_b) in (halves, halves[::-1]):
            with np.errstate(all="raise"):
                merged = merge_attention(out_a, lse_a, out_b, lse_b)
            for a, b in zip(merged, whole, strict=True):
                close(a, b)


@every_precision
@every_dtype
def test_merge_by_definition(dtype, precise):
    r = rng("merge", dtype.name)
    out = (3 * r.standard_normal((2, 50, 3))).astype(dtype)
    lse = (10 * r.standard_normal((2, 50))).astype(compute_type(dtype))
    got, got_lse = merge_attention(out[0], lse[0], out[1], lse[1], precise=precise)
    assert got.dtype == got_lse.dtype == precise
    with mpmath.workdps(40):
        a, b = ([mpmath.exp(mpmath.mpf(float(x))) for x in half] for half in lse)
        want_lse = to_wide([mpmath.log(x + y) for x, y in zip(a, b, strict=True)])
        share = to_wide([x / (x + y) for x, y in zip(a, b, strict=True)])[:, None]
        rest = to_wide([y / (x + y) for x, y in zip(a, b, strict=True)])[:, None]
    tolerance = 20 * np.finfo(precise).eps
    close(got_lse, want_lse, tolerance)
    wide = out.astype(float).astype(WIDE)
    np.testing.assert_allclose(got, share * wide[0] + rest * wide[1], tolerance, 4 * tolerance)


@every_precision
@every_dtype
@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        # (out, lse) of either half and of the whole
        ((1, 2), (5, 2), (3, 2 + np.log(2))),
        ((1, 0), (5, -INF), (1, 0)),
        ((1, 3), (NAN, -INF), (1, 3)),
        ((1, -INF), (INF, -INF), (0, -INF)),
        ((NAN, -INF), (NAN, -INF), (0, -INF)),
        ((NAN, 0), (5, 0), (NAN, np.log(2))),
        ((NAN, 0), (5, -INF), (NAN, 0)),
        ((INF, 0), (5, 0), (INF, np.log(2))),
        ((1, NAN), (5, 0), (NAN, NAN)),
        ((1, NAN), (5, -INF), (NAN, NAN)),
        ((1, NAN), (5, INF), (NAN, NAN)),
        ((1, INF), (5, 0), (NAN, INF)),
        ((0, 1000), (5, -1000), (0, 1000)),  # a sink and nothing else
        ((-0.0, 0), (-0.0, 0), (0, np.log(2))),
    ],
    ids=str,
)
def test_special_merges(a, b, want, dtype, precise):
    other = 0.25, 0.5
    for x, y in ((a, b), (b, a)):
        out, lse = np.array([x, y, other, other]).T
        out, lse = out.astype(dtype)[:, None, None], lse.astype(compute_type(dtype))[:, None]
        # The row alone, and beside another.
        rows = [np.concatenate(pair) for pair in ((out[:1], out[2:3]), (out[1:2], out[2:3]))]
        lses = [np.concatenate(pair) for pair in ((lse[:1], lse[2:3]), (lse[1:2], lse[2:3]))]
        with np.errstate(all="raise"):
            one = merge_attention(out[0], lse[0], out[1], lse[1], precise=precise)
            two = merge_attention(rows[0], lses[0], rows[1], lses[1], precise=precise)
        for got in (one[0][0], two[0][0, 0]):
            close(got, [want[0]])
            assert not np.signbit(got[got == 0]).any()
        for got in (one[1][0], two[1][0, 0]):
            close(got, want[1])
        close([two[0][1, 0, 0], two[1][1, 0]], [0.25, 0.5 + np.log(2)])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
@pytest.mark.parametrize("columns", [0, 1, 4])
def test_merged_shapes(shape, columns):
    out, lse = merge_attention(
        np.ones((*shape, columns)), np.zeros(shape), np.ones((*shape, columns)), np.zeros(shape)
    )
    assert out.shape == (*shape, columns) and np.shape(lse) == shape
    close(out, 1)
    close(lse, np.log(2))


# --- attention_bound ------------------------------------------------------------------------------


def test_the_bound():
    """The formula, a query at a time."""
    r = rng("bound")
    q, k, v = (2 * r.standard_normal((2, n, 3)) for n in (4, 130, 130))
    mask, bias = r.random((4, 130)) < 0.8, r.standard_normal(130)
    slopes, sinks, softcap = [0.01, -0.02], [0.5, -40.0], 2.5
    options = {
        "mask": mask, "bias": bias, "alibi_slopes": slopes, "sinks": sinks, "softcap": softcap,
        "scale": -0.7, "return_lse": True, "return_weights": True,
    }  # fmt: skip
    for dtype, unit in ((F32, 2.0**-24), (F64, 2.0**-53), (F16, 2.0**-24), (BF16, 2.0**-24)):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        got = attention_bound(*arrays, **options)
        _, lse, weights = attention(*arrays, **options)
        x, y, z = (a.astype(float) for a in arrays)
        for h, i in np.ndindex(2, 4):
            dots = 0.7 * abs(x[h, i] * y[h]).sum(1)
            capped = softcap * np.tanh(0.7 * (x[h, i] * y[h]).sum(1) / softcap)
            others = abs(capped) + abs(bias) + abs(slopes[h]) * abs(i - np.arange(130))
            largest = max(others[mask[i]].max(), abs(sinks[h]))
            brackets = 2 * 3 * dots[mask[i]].max() + (2 * (64 + 4 * 3) + 16) + 2 * largest
            wanted = (
                brackets * (weights[h, i] @ abs(z[h])),
                brackets + 4 * max(1, abs(lse[h, i])),
                brackets * weights[h, i],
            )
            for g, want in zip(got, wanted, strict=True):
                close(g[h, i] / unit, want, 1e-6)


def test_what_the_bound_leaves_out():
    """Keys without weight, and what is not visible: padding by -1e9, by a mask, by a length."""
    r = rng("padding")
    q, k, v = (r.standard_normal((n, 3)).astype(F32) for n in (4, 6, 6))
    want = attention_bound(q, k[:5], v[:5])
    k[5], v[5] = NAN, NAN
    hides = [False] * 5 + [True]
    close(attention_bound(q, k, v, mask=np.invert(hides)), want)
    close(attention_bound(q, k, v, kv_lengths=5), want)
    close(attention_bound(q, k, v, bias=np.where(hides, -INF, 0)), want)
    k[5], v[5] = 0, 0
    close(attention_bound(q, k, v, bias=np.where(hides, -1e9, 0), sinks=[-1e9]), want)
    assert not attention_bound(q, k, v, mask=False).any()
    # All that is visible has a bias of -1e9: float32 has no room for the rest of the score.
    assert attention_bound(q, k, v, bias=-1e9).min() > 10


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_arithmetic_keeps_within_the_bound(dtype):
    """NumPy's own attention does, and what is off by more than rounding does not."""
    r = rng("within", dtype.name)
    precise = np.float64 if dtype == F32 else WIDE
    for spread in (0.1, 1, 5):
        q, k, v = (spread * r.standard_normal((n, 32)).astype(dtype) for n in (20, 300, 300))
        bias = r.standard_normal((20, 300)).astype(dtype)
        scores = q @ k.T * dtype.type(1 / math.sqrt(32)) + bias
        e = np.exp(scores - scores.max(1, keepdims=True))
        got = e @ v / e.sum(1, keepdims=True)
        true = attention(q, k, v, bias=bias, precise=precise)
        bound = attention_bound(q, k, v, bias=bias)
        if WIDE is not np.float64 or dtype == F32:
            assert np.all(abs(got - true) <= bound)
        assert np.any(abs(got * (1 + 2e4 * np.finfo(dtype).eps) - true) > bound)


# --- arguments ------------------------------------------------------------------------------------

ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("error", "match", "arrays", "options"),
    [
        (TypeError, "same floating-point type", (ONES, ONES.astype("f4"), ONES), {}),
        (TypeError, "same floating-point type", [ONES.astype(int)] * 3, {}),
        (TypeError, "q must", [ONES.astype(complex)] * 3, {}),
        (TypeError, "MaskedArray", [np.ma.masked_array(ONES)] * 3, {}),
        (TypeError, "mask must not be float64: pass bias=", [ONES] * 3, {"mask": ONES[:, :2]}),
        (TypeError, "bias must not be bool: pass mask=", [ONES] * 3, {"bias": [True, False]}),
        (TypeError, "q_offset must not be", [ONES] * 3, {"q_offset": 1.0}),
        (TypeError, "kv_lengths must not be", [ONES] * 3, {"kv_lengths": True}),
        (TypeError, "sinks must not be", [ONES] * 3, {"sinks": [True]}),
        (TypeError, "softmax", [ONES] * 3, {"softmax": 1}),
        (ValueError, "2 dimensions", (ONES, ONES[0], ONES), {}),
        (ValueError, "do not match", (ONES, ONES[:, :2], ONES), {}),
        (ValueError, "do not match", (ONES, ONES, ONES[:1]), {}),
        (ValueError, "do not match", [ONES[:, :0]] * 3, {}),
        (ValueError, "do not match", (np.ones((3, 2, 3)), *[np.ones((2, 2, 3))] * 2), {}),
        (ValueError, "do not match", (ONES, np.ones((0, 2, 3)), np.ones((0, 2, 3))), {}),
        (ValueError, "mismatch|broadcast", [np.ones((n, 1, 2, 3)) for n in (2, 3, 3)], {}),
        (ValueError, r"mask .*\(3,\).*\(2, 2\)", [ONES] * 3, {"mask": [True] * 3}),
        (ValueError, r"bias .*\(1, 2, 2\).*\(2, 2\)", [ONES] * 3, {"bias": np.ones((1, 2, 2))}),
        (ValueError, r"q_offset .*\(2,\).*\(\)", [ONES] * 3, {"q_offset": [1, 2]}),
        (ValueError, r"alibi_slopes .*\(2,\).*\(1,\)", [ONES] * 3, {"alibi_slopes": [1, 2]}),
    ],
)
def test_wrong_arguments(error, match, arrays, options):
    for function in (attention, attention_bound):
        with pytest.raises(error, match=match):
            function(*arrays, **options)


def test_wrong_halves():
    lse = np.ones(2)
    for arrays in (
        (ONES, lse, ONES[:1], lse[:1]),
        (ONES, lse, ONES[:, :2], lse),
        (ONES, lse[:1], ONES, lse[:1]),
        (ONES, lse, ONES, ONES),
    ):
        with pytest.raises(ValueError, match="do not match"):
            merge_attention(*arrays)


def test_other_arrays():
    """Lists; byte-swapped numbers; integers as bias and sinks."""
    q, k, v = [[1.0, 2.0]], [[0.5, 1.0], [2.0, -1.0]], [[1.0], [5.0]]
    want = attention(np.array(q), np.array(k), np.array(v), bias=[1.0, 2.0], sinks=[3.0])
    close(attention(q, k, v, bias=[1, 2], sinks=np.array([3], np.uint8)), want, 0)
    for kind in (">f8", "<f8", ">f4", "<f4", "<f2", ">f2"):
        arrays = (np.array(x).astype(kind) for x in (q, k, v))
        close(attention(*arrays, bias=np.array([1, 2], ">f4"), sinks=[3]), want, 0)
    assert attention(*(np.array(x, BF16) for x in (q, k, v)), bias=[1, 2], sinks=[3]) == want
