"""The bits of a query's result are a function of what it sees, and of whether it is the only one.

Not of the threads, the batch, the other heads, strides, addresses or the other queries; above all
not of the keys and values that it does not see: NaN or inf there leaves no trace.
"""

import ctypes
import itertools
import platform
import sys
import warnings
from functools import lru_cache

import numpy as np
import pytest
from common import (
    BF16,
    F16,
    F32,
    F64,
    SINGLES,
    SMALLEST_SUBNORMAL,
    Attention,
    Size,
    assert_canonical_nan,
    assert_plus_zero,
    assert_same_bits,
    compute_type,
    every_dtype,
    normal,
    rng,
    unaligned,
    visible_keys,
)

import fastsoftmax as fs

NAN, INF = np.nan, np.inf
RESULTS = ("out", "lse", "weights")

# Ways not to see a key, alone and together: functions of a generator and a Size.
HIDING = {
    "nothing hidden": lambda r, n: {},
    "mask": lambda r, n: {"mask": r.random(n.scores) < 0.7},
    "few": lambda r, n: {"mask": r.random(n.scores) < 3 / n.keys},
    "mask of keys": lambda r, n: {"mask": r.random((*n.lead, 1, 1, n.keys)) < 0.7},
    "mask of queries": lambda r, n: {"mask": r.random((n.queries, 1)) < 0.7},
    "bias": lambda r, n: {"bias": np.where(r.random(n.scores) < 0.3, -INF, 0.5).astype(F32)},
    "causal": lambda r, n: {"is_causal": True, "q_offset": (n.keys - n.queries) // 2},
    "window": lambda r, n: {"window": (9, 2), "q_offset": r.integers(-9, n.keys, n.lead)},
    "lengths": lambda r, n: {"kv_lengths": r.integers(0, n.keys + 1, n.lead)},
    "all": lambda r, n: {
        "mask": r.random((n.queries, n.keys)) < 0.8,
        "bias": np.where(r.random((n.heads, 1, n.keys)) < 0.2, -INF, r.normal(0, 1)),
        "is_causal": True,
        "q_offset": n.keys - n.queries,
        "kv_lengths": r.integers(n.keys // 2, n.keys + 1, n.lead),
        "window": (n.keys * 2 // 3, 3),
        "softcap": 3.0,
        "sinks": r.normal(0, 1, n.heads),
        "alibi_slopes": r.normal(0, 0.1, n.heads),
    },
}
hiding = pytest.mark.parametrize("name", HIDING)


@pytest.fixture(autouse=True)
def one_thread():
    """Unless a test asks for more: for small calls, and so that blocks of queries share a unit."""
    with fs.num_threads(1):
        yield


def attend(q, k, v, /, **options):
    """(out, lse, weights)."""
    return fs.attention(q, k, v, **options, return_lse=True, return_weights=True)


def assert_same_results(got, want, what=""):
    for name, g, w in zip(RESULTS, got, want, strict=True):
        assert_same_bits(g, w, (name, what))


# --- threads --------------------------------------------------------------------------------------

# Enough work for several threads: many heads, one head, few queries, one query.
THREADED = (
    Size((2,), 4, 2, 130, 70, 32, 40),
    Size((), 1, 1, 500, 200, 32, 32),
    Size((), 2, 1, 3, 3000, 32, 32),
    Size((), 8, 2, 1, 3000, 32, 32),
    Size((3,), 1, 1, 1, 9000, 16, 16),
)


@every_dtype
@pytest.mark.parametrize("size", THREADED, ids=lambda n: "x".join(map(str, n.scores)))
@pytest.mark.parametrize("name", ["nothing hidden", "all"])
def test_threads(isa, dtype, size, name):
    arrays, options = size.qkv(dtype), HIDING[name](rng("threads"), size)
    with fs.num_threads(1):
        want = attend(*arrays, **options)
        assert_same_bits(fs.attention(*arrays, **options), want[0])
    for count in (2, 3, 4):
        with fs.num_threads(count):
            assert_same_bits(fs.attention(*arrays, **options), want[0], count)
            assert_same_results(attend(*arrays, **options), want, count)


# --- batch and heads ------------------------------------------------------------------------------


def of_head(options, size, b, h):
    """The options as head h of batch b has them."""
    part = dict(options)
    for name in ("mask", "bias"):
        if name in options:
            part[name] = np.broadcast_to(options[name], size.scores)[b, h]
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            part[name] = options[name][h : h + 1]
    for name in ("q_offset", "kv_lengths"):
        if np.ndim(options.get(name, 0)):
            part[name] = options[name][b]
    return part


@every_dtype
@hiding
def test_batch_and_heads(isa, dtype, name):
    """Each head of each batch alone, in 2-D; the batch backwards; heads repeated, not grouped."""
    for queries, share in ((1, 19), (2, 30), (51, 3)):
        size = Size((2,), 2 * share, 2, queries, 700 if queries == 1 else 131, 7, 9)
        q, k, v = size.qkv(dtype)
        options = HIDING[name](rng("heads", queries), size)
        want = attend(q, k, v, **options)
        for b, kv_head in np.ndindex(2, 2):
            kv = b, kv_head
            for h in {share * kv_head + i for i in (0, 1, share // 2, share - 1)}:
                alone = attend(q[b, h], k[kv], v[kv], **of_head(options, size, b, h))
                assert_same_results(alone, [w[b, h] for w in want], (queries, b, h))
        repeated = [np.repeat(a, share, axis=1) for a in (k, v)]
        assert_same_results(attend(q, *repeated, **options), want, "repeated")
        back = dict(options)
        for n in ("mask", "bias"):
            if n in options:
                back[n] = np.broadcast_to(options[n], size.scores)[::-1]
        for n in ("q_offset", "kv_lengths"):
            if np.ndim(options.get(n, 0)):
                back[n] = options[n][::-1]
        got = attend(q[::-1], k[::-1], v[::-1], **back)
        assert_same_results(got, [w[::-1] for w in want], "backwards")


@every_dtype
def test_broadcast_leading_dimensions(isa, dtype):
    """Zero strides, or copies: the same."""
    for queries in (1, 50):
        q = normal((3, 1, 4, queries, 8), dtype, 1.5, "q")
        k, v = normal((2, 1, 70, 8), dtype, 1.5, "k"), normal((1, 1, 1, 70, 5), dtype, 1.5, "v")
        want = attend(q, k, v, is_causal=True, q_offset=20)
        full = [
            np.broadcast_to(a, (3, 2, *a.shape[-3:])).copy()
            for a in (q[:, :], k.reshape(1, 2, 1, 70, 8), v)
        ]
        assert_same_results(attend(*full, is_causal=True, q_offset=20), want)
        views = [np.broadcast_to(a[0, 0], a.shape) for a in full]
        copies = [a.copy() for a in views]
        assert_same_results(attend(*views), attend(*copies), "views")


# --- strides and addresses ------------------------------------------------------------------------


def layouts(a):
    """(name, the same array lying otherwise in memory)."""
    last = a.ndim - 1
    if a.ndim > 2:
        yield "heads and rows swapped", a.swapaxes(-3, -2).copy().swapaxes(-3, -2)
        yield "batch last", np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0)
    if a.ndim > 1:
        yield "columns first", a.swapaxes(-1, -2).copy().swapaxes(-1, -2)
        yield "every third row", np.repeat(a, 3, axis=-2)[..., ::3, :]
        yield "rows backwards", a[..., ::-1, :].copy()[..., ::-1, :]
    yield "Fortran order", np.asfortranarray(a)
    yield "columns backwards", a[..., ::-1].copy()[..., ::-1]
    yield "every second column", np.repeat(a, 2, axis=last)[..., ::2]
    yield "all backwards", np.flip(np.flip(a).copy())
    yield "odd address", unaligned(a)
    packed = np.zeros(a.shape, [("pad", "u1"), ("x", a.dtype)])
    packed["x"] = a
    yield "packed records", packed["x"]
    wide = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
    wide[..., 1:-2] = a
    yield "part of a wider array", wide[..., 1:-2]


@every_dtype
def test_layouts(isa, dtype):
    """q, k, v, mask, bias and the small ones: each alone, then all in the same layout."""
    for queries in (1, 2, 50):
        size = Size((2,), 4, 2, queries, 67, 17, 9)
        r = rng("layouts", queries)
        arrays = dict(zip("qkv", size.qkv(dtype), strict=True))
        arrays["mask"] = r.random(size.scores) < 0.8
        arrays["bias"] = r.normal(0, 1, size.scores).astype(dtype)
        arrays |= {"sinks": r.normal(0, 1, 4), "alibi_slopes": r.normal(0, 1, 4)}
        arrays |= {"q_offset": r.integers(9, 60, 2), "kv_lengths": r.integers(9, 60, 2)}

        def run(arrays):
            options = {n: a for n, a in arrays.items() if n not in "qkv"}
            return attend(*(arrays[n] for n in "qkv"), is_causal=True, **options)

        want = run(arrays)
        together = {}
        for name, a in arrays.items():
            for layout, view in layouts(a):
                assert_same_bits(view, a)  # the test itself
                assert_same_results(run(arrays | {name: view}), want, (queries, name, layout))
                together.setdefault(layout, {})[name] = view
        for layout, views in together.items():
            assert_same_results(run(arrays | views), want, (queries, layout))


@every_dtype
def test_broadcast_masks_and_biases(isa, dtype):
    """At the shape that they have, as a view of zero strides, or as a full copy."""
    for queries in (1, 3, 50):
        size = Size((2,), 4, 2, queries, 67, 8, 8)
        arrays = size.qkv(dtype)
        r = rng("broadcast", queries)
        for shape in (
            (67,), (1,), (queries, 1), (queries, 67), (4, 1, 1), (4, 1, 67), (4, queries, 1),
            (2, 1, 1, 67), (2, 1, queries, 67), (2, 4, 1, 1), (1, 4, queries, 67), (),
        ):  # fmt: skip
            mask = np.asarray(r.random(shape) < 0.8)
            bias = np.where(mask, r.normal(0, 1, shape), -INF).astype(F32)
            for name, a in (("mask", mask), ("bias", bias)):
                view = np.broadcast_to(a, size.scores)
                want = attend(*arrays, **{name: view.copy()})
                assert_same_results(attend(*arrays, **{name: a}), want, (name, shape))
                assert_same_results(attend(*arrays, **{name: view}), want, (name, shape))


# --- the other queries ----------------------------------------------------------------------------


def of_queries(options, size, part):
    """The options as the queries of the slice `part` have them."""
    mine = dict(options)
    for name in ("mask", "bias"):
        if name in options:
            mine[name] = np.broadcast_to(options[name], size.scores)[..., part, :]
    mine["q_offset"] = np.asarray(options.get("q_offset", 0)) + part.start
    return mine


@every_dtype
@hiding
def test_a_part_of_the_queries(isa, dtype, name):
    """Two or more of them, from anywhere: also a prefill in chunks."""
    for queries, keys in ((7, 40), (101, 200)):
        size = Size((2,), 2, 2, queries, keys, 7, 9)
        q, k, v = size.qkv(dtype)
        options = HIDING[name](rng("part", queries), size)
        want = attend(q, k, v, **options)
        cuts = {0, 1, 3, 5, 23, 24, 25, 47, 48, 60, 99, queries}
        for start in sorted(c for c in cuts if c < queries - 1):
            for stop in {start + 2, min(start + 24, queries), queries}:
                part = slice(start, stop)
                got = attend(q[:, :, part], k, v, **of_queries(options, size, part))
                assert_same_results(got, [w[:, :, part] for w in want], part)


@every_dtype
def test_queries_in_any_order(isa, dtype):
    for queries, keys in ((5, 70), (100, 131)):
        size = Size((2,), 2, 1, queries, keys, 7, 9)
        q, k, v = size.qkv(dtype)
        seen = rng("order", queries).random(size.scores) < 0.5
        want = attend(q, k, v, mask=seen)
        for seed in range(3):
            order = rng("order", seed).permutation(queries)[: max(2, queries - 40 * seed)]
            got = attend(q[:, :, order], k, v, mask=seen[:, :, order])
            assert_same_results(got, [w[:, :, order] for w in want], seed)


@every_dtype
@hiding
@pytest.mark.parametrize("special", [NAN, INF, 0.0])
def test_queries_do_not_see_each_other(isa, dtype, name, special):
    size = Size((2,), 4, 2, 60, 70, 7, 9)
    q, k, v = size.qkv(dtype)
    options = HIDING[name](rng("each other"), size)
    want = attend(q, k, v, **options)
    for at in ([0], [1, 30], [59], range(0, 60, 2)):
        spoiled = q.copy()
        spoiled[:, :, at] = special
        others = np.delete(np.arange(60), at)
        got = attend(spoiled, k, v, **options)
        assert_same_results([g[:, :, others] for g in got], [w[:, :, others] for w in want], at)
    # Another batch and other heads do not matter either.
    spoiled = q.copy()
    spoiled[0, 1] = special
    got = attend(spoiled, k, v, **options)
    assert_same_results([g[1] for g in got], [w[1] for w in want], "batch")
    assert_same_results([g[0, 2:] for g in got], [w[0, 2:] for w in want], "heads")


# --- what is not seen -----------------------------------------------------------------------------

POISONS = (
    ("kv", NAN, NAN), ("kv", INF, -INF), ("kv", -INF, NAN), ("k", NAN, 0), ("v", 0, NAN),
    ("k", INF, 0), ("v", 0, INF), ("kv", 3e38, 3e38),
)  # fmt: skip


def poisoned(k, v, keys, poison):
    """Copies of k and v in which `keys` hold the poison."""
    where, in_k, in_v = poison
    k, v = k.copy(), v.copy()
    with np.errstate(over="ignore"):
        if "k" in where:
            k[..., keys, :] = np.asarray(in_k).astype(k.dtype)
        if "v" in where:
            v[..., keys, :] = np.asarray(in_v).astype(v.dtype)
    return k, v


def check_poisoned(got, want, seen, keys, poison, what):
    """Who sees no poison keeps every bit; who sees a NaN gets NaN."""
    sees = seen[..., keys].any(axis=-1)
    assert_same_results([g[~sees] for g in got], [w[~sees] for w in want], what)
    where, in_k, in_v = poison
    if np.isnan(in_k):
        out, lse, weights = (g[sees] for g in got)
        assert_canonical_nan(out, what)
        assert_canonical_nan(lse, what)
        assert_canonical_nan(weights[seen[sees]], what)
        assert_plus_zero(weights[~seen[sees]], what)
    elif where == "v":
        assert_same_bits(got[1], want[1], what)
        assert_same_bits(got[2], want[2], what)
        if np.isnan(in_v):
            assert_canonical_nan(got[0][sees], what)


@every_dtype
@hiding
def test_poison_that_is_not_seen(isa, dtype, name):
    """In blocks that no query sees, and in blocks of which another query sees that very key."""
    number = 0
    for queries, keys in ((1, 5), (1, 200), (2, 65), (5, 64), (50, 131), (101, 70)):
        size = Size((2,), 2, 2, queries, keys, 5, 3)
        q, k, v = size.qkv(dtype)
        r = rng("poison", name, queries, keys)
        options = HIDING[name](r, size)
        seen, want = visible_keys(q, k, v, **options), attend(q, k, v, **options)
        unseen = ~seen.any(axis=(0, 1, 2))
        sets = [[j] for j in (0, 1, 62, 63, 64, 65, 127, 128, keys - 1) if j < keys]
        sets += [np.flatnonzero(r.random(keys) < 0.3), np.flatnonzero(unseen), np.arange(keys)]
        if unseen.any():
            sets += [np.flatnonzero(unseen)] * 3
        for chosen in sets:
            poison = POISONS[number % len(POISONS)]
            number += 1
            got = attend(q, *poisoned(k, v, chosen, poison), **options)
            what = queries, keys, chosen, poison
            check_poisoned(got, want, seen, chosen, poison, what)


@every_dtype
def test_poison_beyond_the_end(isa, dtype):
    """A cache is larger than what it holds: keys past kv_lengths, of every length."""
    for queries in (1, 4):
        size = Size((2,), 2, 1, queries, 140, 5, 3)
        q, k, v = size.qkv(dtype)
        for length in (0, 1, 2, 7, 8, 9, 16, 31, 63, 64, 65, 100, 127, 128, 129, 139, 140):
            want = attend(q, k, v, kv_lengths=length)
            for poison in POISONS[:3]:
                spoiled = poisoned(k, v, slice(length, None), poison)
                got = attend(q, *spoiled, kv_lengths=np.array([length, length]))
                assert_same_results(got, want, (queries, length, poison))


@every_dtype
def test_a_hidden_bias_does_not_matter(isa, dtype):
    """NaN, inf or rubbish in the bias of a key that the mask, causality or a length hides."""
    for queries in (1, 50):
        size = Size((2,), 2, 1, queries, 131, 5, 3)
        q, k, v = size.qkv(dtype)
        r = rng("hidden bias")
        bias = r.normal(0, 1, size.scores).astype(F32)
        for hide in (
            {"mask": r.random(size.scores) < 0.6},
            {"is_causal": True, "q_offset": 60},
            {"kv_lengths": np.array([70, 3])},
            {"window": (7, 9), "q_offset": 60},
        ):
            seen = visible_keys(q, k, v, **hide)
            want = attend(q, k, v, bias=bias, **hide)
            for rubbish in (NAN, INF, -INF, 3e38):
                spoiled = np.where(seen, bias, F32.type(rubbish))
                assert_same_results(attend(q, k, v, bias=spoiled, **hide), want, (hide, rubbish))


@every_dtype
def test_minus_infinity_hides_as_the_mask_does(isa, dtype):
    for queries in (1, 50):
        size = Size((2,), 2, 1, queries, 131, 5, 3)
        q, k, v = size.qkv(dtype)
        for share in (0.0, 0.02, 0.5, 0.98):
            seen = rng("hides", share).random(size.scores) < share
            zeros = np.zeros(size.scores, F32)
            want = attend(q, k, v, bias=zeros, mask=seen)
            for hidden in (F16, F32, F64):
                bias = np.where(seen, 0, -INF).astype(hidden)
                assert_same_results(attend(q, k, v, bias=bias), want, (share, hidden))
            if compute_type(dtype) == F32:  # beyond float32: -inf once it is converted
                bias = np.where(seen, 0, -1e300)
                assert_same_results(attend(q, k, v, bias=bias), want, (share, -1e300))


# --- what is asked for ----------------------------------------------------------------------------


@every_dtype
@hiding
def test_what_is_returned_does_not_change_out(isa, dtype, name):
    for queries, keys in ((1, 70), (1, 500), (3, 131), (50, 131)):
        size = Size((2,), 4, 2, queries, keys, 7, 9)
        arrays, options = size.qkv(dtype), HIDING[name](rng("returned"), size)
        out, lse, weights = attend(*arrays, **options)
        assert_same_bits(fs.attention(*arrays, **options), out)
        for one, want in (("return_lse", lse), ("return_weights", weights)):
            got = fs.attention(*arrays, **options, **{one: True})
            assert_same_bits(got[0], out, one)
            assert_same_bits(got[1], want, one)


# --- special values that are seen -----------------------------------------------------------------


SPECIAL_SIZES = (
    Size((), 2, 1, 1, 3, 4, 5),
    Size((), 2, 1, 1, 200, 4, 5),
    Size((), 2, 1, 2, 64, 4, 5),
    Size((), 2, 1, 50, 70, 4, 5),
    Size((), 4, 2, 7, 200, 4, 17),
)


SPECIALS = (
    *itertools.product(("k", "bias"), (NAN, INF)),
    *(("k", -INF), ("v", NAN), ("k of one column", NAN), ("v of one column", NAN)),
)


@lru_cache(maxsize=1)
def calls_with_specials(size, dtype):
    """[(where and what, call)]."""
    calls = []
    r = rng("specials", size)
    sinks = r.normal(0, 1, size.heads)
    some = np.sort(r.permutation(size.keys)[: 1 + size.keys // 3])
    sets = ([0], [size.keys - 1], some, range(min(size.keys, 66)), range(size.keys))
    for chosen, (where, value) in itertools.product(sets, SPECIALS):
        q, k, v = size.qkv(dtype)
        q = np.abs(q) + dtype.type(0.1)  # so that a key of -inf has the score -inf
        bias = r.normal(0, 1, size.scores[-2:]).astype(F32)
        target = {"k": k, "v": v, "bias": bias.T}[where.split()[0]]
        target[..., chosen, slice(2, 3) if "column" in where else slice(None)] = value
        for options in (
            {},
            {"sinks": sinks},
            {"mask": r.random(size.scores[-2:]) < 0.5},
            {"is_causal": True, "q_offset": size.keys - size.queries // 2 - 2},
        ):
            if where == "bias":
                options["bias"] = bias
            calls.append(((where, value, chosen, options), Attention(q, k, v, **options)))
    return calls


@every_dtype
@pytest.mark.parametrize("size", SPECIAL_SIZES, ids=lambda n: f"{n.queries}x{n.keys}")
def test_special_values_as_in_the_oracle(isa, dtype, size, record_max):
    """Where there is NaN, where 0; the finite rest within the bound."""
    for what, call in calls_with_specials(size, dtype):
        results = out, lse, weights = attend(*call.arrays, **call.options)
        if what[1] == INF:  # a score of +inf: the lse is +inf or NaN
            results = out, None, weights
        call.check(record_max, "special values", what, results)
        for a in (out, lse, weights):
            assert_canonical_nan(a[np.isnan(a)], what)
        assert_plus_zero(weights[~visible_keys(*call.arrays, **call.options)], what)
        assert not np.signbit(out[out == 0]).any(), what


@every_dtype
def test_infinite_values(isa, dtype):
    """+-inf in a v that is seen: itself, or NaN where it meets the other or has no weight."""
    for queries in (1, 50):
        size = Size((), 2, 1, queries, 70, 4, 3)
        q, k, v = (a / 4 for a in size.qkv(dtype))
        clean = fs.attention(q, k, v)
        for at in (0, 63, 64, 69):
            v[:, at, 0], v[:, at, 1] = INF, -INF
            out = fs.attention(q, k, v)
            assert (out[..., 0] == INF).all() and (out[..., 1] == -INF).all()
            assert_same_bits(out[..., 2], clean[..., 2])
            v[:, (at + 9) % 70, 0] = -INF
            assert_canonical_nan(fs.attention(q, k, v)[..., 0])
            v = size.qkv(dtype)[2] / 4


@every_dtype
def test_zeros_are_positive(isa, dtype):
    """Also of values of -0, and where the average of tiny negative ones is rounded to 0 (in the
    type of the calculation: a negative float32 that no half is near enough to becomes their -0).
    """
    for queries in (1, 3):
        q, k, v = (np.zeros((n, 9), dtype) for n in (queries, 70, 70))
        if dtype in SINGLES:
            v[1] = -SMALLEST_SUBNORMAL[dtype]
            assert_plus_zero(fs.attention(q, k, v), queries)
        v[...] = -0.0
        assert_plus_zero(fs.attention(q, k, v), queries)


@every_dtype
def test_a_query_that_sees_nothing(isa, dtype):
    """Zeros, whatever lies around; the lse is -inf, or the sink itself."""
    inner = compute_type(dtype)
    for queries in (1, 2, 50):
        for keys in (1, 64, 70, 200):
            size = Size((2,), 4, 2, queries, keys, 4, 5)
            q, k, v = size.qkv(dtype)
            q[:, :, -1], k[:, :, 0], v[:, :, 0] = NAN, INF, NAN
            sinks = np.array([0.3, -INF, 100, -7], inner)
            rows = rng("nothing", queries, keys).random((*size.scores[:-1], 1)) < 0.5
            rows[:, :, -1] = False
            for hide, blind in (
                ({"mask": np.zeros(size.scores, bool)}, slice(None)),
                ({"mask": rows}, ~rows[..., 0]),
                ({"bias": np.full(keys, -INF)}, slice(None)),
                ({"kv_lengths": 0}, slice(None)),
                ({"is_causal": True, "q_offset": -queries}, slice(None)),
                ({"window": (0, 0), "q_offset": keys}, slice(None)),
                ({"window": (None, 3), "q_offset": -queries - 3}, slice(None)),
            ):
                for given, want in (
                    ({}, np.full(4, -INF, inner)),
                    ({"sinks": sinks}, sinks),
                ):
                    out, lse, weights = attend(q, k, v, **hide, **given)
                    assert_plus_zero(out[blind], (hide, given))
                    assert_plus_zero(weights[blind], (hide, given))
                    want = np.broadcast_to(want[:, None], lse.shape)
                    assert_same_bits(lse[blind], want[blind], (hide, given))


@every_dtype
def test_sinks(isa, dtype):
    """-inf is none; NaN and +inf spoil the rows of their head only."""
    for queries in (1, 50):
        size = Size((2,), 4, 2, queries, 70, 4, 5)
        q, k, v = size.qkv(dtype)
        plain = attend(q, k, v)
        assert_same_results(attend(q, k, v, sinks=np.full(4, -INF)), plain)
        sinks = np.array([0.5, NAN, INF, -INF])
        out, lse, weights = attend(q, k, v, sinks=sinks)
        assert_canonical_nan(out[:, 1:3])
        assert_canonical_nan(weights[:, 1:3])
        assert_canonical_nan(lse[:, 1])
        assert_same_results([a[:, 3] for a in (out, lse, weights)], [a[:, 3] for a in plain])
        want = attend(q, k, v, sinks=np.array([0.5, 1, 2, 3]))
        assert_same_results([a[:, 0] for a in (out, lse, weights)], [a[:, 0] for a in want])
        # A sink far above all scores leaves nothing, one far below changes nothing.
        out, lse, weights = attend(q, k, v, sinks=np.full(4, 1000.0))
        assert_plus_zero(np.abs(out))
        assert_plus_zero(weights)
        assert (lse == 1000).all()
        assert_same_results(attend(q, k, v, sinks=np.full(4, -1000.0)), plain)


@every_dtype
def test_the_smallest_number_as_a_bias_is_no_mask(isa, dtype):
    """What peers write for -inf is finite: a row of nothing else is an average, not NaN."""
    lowest = {2: -65504.0, 4: np.finfo(F32).min, 8: np.finfo(F64).min}
    for queries in (1, 50):
        size = Size((), 2, 1, queries, 131, 4, 3)
        q, k, v = (a / 4 for a in size.qkv(dtype))
        for low in {-1e4, -1e9, -1e30, lowest[2], lowest[compute_type(dtype).itemsize]}:
            bias = np.full((queries, 131), low, compute_type(dtype))
            out, lse, weights = attend(q, k, v, bias=bias)
            assert np.isfinite(out).all() and np.isfinite(lse).all(), low
            if (low < -1e8 and compute_type(dtype) == F32) or low < -1e29:  # q.k is lost
                assert np.allclose(weights.astype(F64), 1 / 131, rtol=0.01), low
                assert np.allclose(lse, low), low
            bias[:, ::3] = 0
            out, lse, weights = attend(q, k, v, bias=bias)
            want = attend(q, k, v, bias=np.where(bias == 0, bias, -INF))
            assert_plus_zero(weights[..., bias[0] != 0], low)
            assert np.allclose(out.astype(F64), want[0].astype(F64), rtol=0.01, atol=1e-6), low
            assert np.allclose(lse, want[1], rtol=1e-5, atol=1e-6), low


# --- the floating-point environment ---------------------------------------------------------------

# FE_INVALID, FE_DIVBYZERO, FE_OVERFLOW, FE_UNDERFLOW; not FE_INEXACT, which Python itself raises.
FLAGS = 0x01 | 0x04 | 0x08 | 0x10
ROUNDINGS = {"nearest": 0, "down": 0x400, "up": 0x800, "to zero": 0xC00}
FTZ_AND_DAZ = 0x8040

needs_x86_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="knows MXCSR in glibc's fenv"
)


class Environment:
    """Rounding and flushing of this thread, as C's fesetenv sets them."""

    def __init__(self, rounding, flush):
        self.libm = ctypes.CDLL("libm.so.6")
        self.saved, self.mine = (np.zeros(8, np.uint32) for _ in range(2))
        self.rounding, self.flush = rounding, flush

    def __enter__(self):
        self.libm.fegetenv(self.saved.ctypes.data_as(ctypes.c_void_p))
        self.libm.fesetround(self.rounding)
        self.libm.fegetenv(self.mine.ctypes.data_as(ctypes.c_void_p))
        self.mine[7] |= FTZ_AND_DAZ if self.flush else 0
        self.libm.fesetenv(self.mine.ctypes.data_as(ctypes.c_void_p))
        return self

    def __exit__(self, *exception):
        self.now = np.zeros(8, np.uint32)
        self.libm.fegetenv(self.now.ctypes.data_as(ctypes.c_void_p))
        self.libm.fesetenv(self.saved.ctypes.data_as(ctypes.c_void_p))


@needs_x86_glibc
@every_dtype
@pytest.mark.parametrize("queries", [1, 60])
def test_modes_of_the_caller_do_not_matter(isa, dtype, queries):
    """Neither rounding nor flush-to-zero, on any thread; and they are left as found."""
    size = Size((2,), 2, 1, queries, 140, 24, 9)
    q, k, v = size.qkv(dtype)
    v[..., :4] = (v[..., :4].astype(F64) * 16 * SMALLEST_SUBNORMAL[dtype]).astype(dtype)
    options = HIDING["all"](rng("modes"), size)
    halves = fs.attention(q, k, v, scale=0.1, return_lse=True)
    calls = (
        lambda: attend(q, k, v),
        lambda: attend(q, k, v, **options),
        lambda: fs.merge_attention(*fs.attention(q, k, v, return_lse=True), *halves),
    )
    want = [call() for call in calls]
    for rounding in ROUNDINGS.values():
        for flush in (False, True):
            for count in (1, 2):
                with fs.num_threads(count), Environment(rounding, flush) as environment:
                    got = [call() for call in calls]
                mode = environment.mine[7] & 0xFFC0
                assert environment.now[7] & 0xFFC0 == mode, "changed the caller's modes"
                for g, w in zip(got, want, strict=True):
                    for a, b in zip(g, w, strict=True):
                        assert_same_bits(a, b, (rounding, flush, count))


@needs_x86_glibc
@every_dtype
@pytest.mark.parametrize("queries", [1, 50])
def test_no_floating_point_warnings_or_flags(isa, dtype, queries):
    """NaN, inf, huge and tiny numbers everywhere: NumPy raises nothing, the flags stay."""
    size = Size((2,), 2, 1, queries, 131, 6, 6)
    q, k, v = size.qkv(dtype)
    for a in (q, k, v):
        a[..., ::7, 1], a[..., 1::7, 2], a[..., 2::7, 3] = NAN, INF, -INF
        a[..., 3::7, :], a[..., 4::7, :] = 6e4, 2.0**-24
    out, options = np.empty_like(q), HIDING["all"](rng("warnings"), size)
    lse = normal(q.shape[:-1], compute_type(dtype))
    libm = ctypes.CDLL("libm.so.6")
    calls = (
        lambda: fs.attention(q, k, v, out=out),
        lambda: attend(q, k, v, **options, out=out),
        lambda: fs.merge_attention(q, lse, q[::-1], lse[::-1]),
    )
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            for number, call in enumerate(calls):
                for raised in (0, FLAGS):
                    libm.feclearexcept(FLAGS)
                    libm.feraiseexcept(raised)
                    call()
                    assert libm.fetestexcept(FLAGS) == raised, (number, raised)
        finally:
            libm.feclearexcept(FLAGS)


def test_slopes_far_away_and_padding_in_front(isa):
    """A distance is rounded in the same way whether padding is left out or not."""
    q, k = normal((1, 3, 8), F32), normal((1, 130, 8), F32)
    mask = np.arange(130) >= 5
    written = np.broadcast_to(mask, (1, 3, 130)).copy()
    for offset, slope in ((2**24 + 1, 2.0**-20), (2**30 + 7, 1e-3)):
        options = {"alibi_slopes": [slope], "q_offset": offset}
        got = fs.attention(q, k, k, mask=mask, **options)
        assert_same_bits(got, fs.attention(q, k, k, mask=written, **options))


def test_padding_in_front_for_all_queries_or_for_each(isa):
    """One row of a mask, or as many as queries: blocks are cut otherwise, with the same bits."""
    r = rng("padding in front")
    for padding in (1, 3, 31, 65) * 10:
        q, k, v = (r.standard_normal((4, n, 64)).astype(BF16) for n in (48, 150, 150))
        mask = np.arange(150)[None] >= padding
        assert_same_bits(
            fs.attention(q, k, v, mask=mask), fs.attention(q, k, v, mask=mask.repeat(48, axis=0))
        )
