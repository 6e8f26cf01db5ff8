"""Random attention against the oracle: every option in every form, dtypes, strides, borders."""

import numpy as np
from common import (
    F32,
    F64,
    FLOATS,
    HALVES,
    KEY_BLOCK,
    QUERY_BLOCKS,
    Attention,
    assert_canonical_nan,
    assert_plus_zero,
    assert_same_bits,
    compute_type,
    one_ulp,
    relative_to,
    visible_keys,
)
from hypothesis import given
from hypothesis import strategies as st
from test_hypothesis import part_of, quiet_cast, strided

import fastsoftmax as fs

SMALL = st.integers(0, 9)
QUERIES = [1, 2, *(n + d for n in QUERY_BLOCKS for d in (-1, 0, 1)), 2 * QUERY_BLOCKS[1] + 3]
KEYS = [KEY_BLOCK + d for d in (-1, 0, 1)] + [2 * KEY_BLOCK + d for d in (-1, 0, 1, 3)]
DEPTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 33]


@st.composite
def numbers(draw, shape, dtype):
    """Gaussian numbers of some scale, in some memory layout."""
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.0, 5.0]))
    a = scale * r.standard_normal(shape)
    if draw(st.integers(0, 4)) == 0:
        a = np.round(a)
    return draw(strided(a.astype(dtype)))


@st.composite
def problems(draw):
    """(q, k, v): leading dimensions that broadcast, grouped heads, any lengths."""
    dtype = draw(st.sampled_from(FLOATS))
    lead = draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries = draw(st.one_of(SMALL, st.just(1), st.sampled_from(QUERIES)))
    keys = draw(st.one_of(SMALL, st.sampled_from(KEYS)))
    depth, v_depth = draw(st.sampled_from(DEPTHS)), draw(st.sampled_from([0, *DEPTHS]))
    shapes = [
        (kv_heads * group, queries, depth),
        (kv_heads, keys, depth),
        (kv_heads, keys, v_depth),
    ]
    shapes = [part_of(draw, lead) + shape for shape in shapes]
    if kv_heads == group == 1:
        shapes = [s[-2:] if len(s) == 3 and draw(st.booleans()) else s for s in shapes]
    return [draw(numbers(shape, dtype)) for shape in shapes]


@st.composite
def calls(draw):
    """(q, k, v) and keyword arguments."""
    q, k, v = draw(problems())
    heads, queries, keys = q.shape[-3] if q.ndim > 2 else 1, q.shape[-2], k.shape[-2]
    lead = np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    single = q.ndim == k.ndim == v.ndim == 2
    scores = (queries, keys) if single else (*lead, heads, queries, keys)
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offsets = st.one_of(
        st.integers(-queries - 3, keys + 3),
        st.sampled_from([0, keys - queries, KEY_BLOCK - 1, KEY_BLOCK, -(2**62), 2**62]),
    )
    options = {}

    def maybe(name, value):
        if draw(st.booleans()):
            options[name] = value()

    def per_lead(low, high):
        """One integer, or an array that broadcasts to the leading dimensions."""
        shape = part_of(draw, lead)
        return draw(strided(r.integers(low, high + 1, shape)))

    def mask():
        share = draw(st.sampled_from([0.02, 0.5, 0.9]))
        return draw(strided(r.random(part_of(draw, scores)) < share))

    def bias():
        shape = part_of(draw, scores)
        a = draw(st.sampled_from([0.0, 1.0, 10.0])) * r.standard_normal(shape)
        a = np.where(r.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.7])), -np.inf, a)
        return draw(strided(quiet_cast(a, draw(st.sampled_from(FLOATS)))))

    def side():
        return draw(st.one_of(st.none(), st.integers(0, 9), st.integers(0, keys + 9)))

    def per_head(spread):
        kind = draw(st.sampled_from([F32, F64, q.dtype]))
        return draw(strided((spread * r.standard_normal(heads)).astype(kind)))

    maybe("mask", mask)
    maybe("bias", bias)
    maybe("is_causal", lambda: draw(st.booleans()))
    each = draw(st.booleans())
    maybe("q_offset", lambda: per_lead(-queries, keys) if each else draw(offsets))
    maybe("kv_lengths", lambda: per_lead(0, keys) if each else draw(st.integers(0, keys)))
    maybe("window", lambda: (side(), side()))
    maybe("scale", lambda: draw(st.sampled_from([0.0, 0.1, 1, -0.5, np.float32(0.7)])))
    maybe("softcap", lambda: draw(st.sampled_from([0.5, 3, 50.0])))
    maybe("sinks", lambda: per_head(3.0))
    # Far away, -slope * distance is all that there is.
    if abs(np.max(np.abs(options.get("q_offset", 0)), initial=0)) < 2**32:
        maybe("alibi_slopes", lambda: per_head(draw(st.sampled_from([0.05, 1.0]))))
    return (q, k, v), options


def attend(arrays, options, **more):
    return fs.attention(*arrays, **options, return_lse=True, return_weights=True, **more)


@given(call=calls())
def test_attention(isa, call, record_max):
    arrays, options = call
    truth = Attention(*arrays, **options)
    results = out, _, weights = attend(arrays, options)
    truth.check(record_max, "random", options, results)
    seen = visible_keys(*arrays, **options).reshape(weights.shape)
    assert_plus_zero(weights[~seen])
    assert_plus_zero(out[~seen.any(axis=-1)])
    assert not np.signbit(out[out == 0]).any()


@given(call=calls(), data=st.data())
def test_poison_that_is_not_seen(isa, call, data):
    """NaN or inf in some keys and values: who sees none of them keeps every bit."""
    (q, k, v), options = call
    want = attend((q, k, v), options)
    seen = visible_keys(q, k, v, **options).reshape(want[2].shape)
    r = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    unseen = ~seen.any(axis=tuple(range(seen.ndim - 1)))
    chosen = unseen | (r.random(k.shape[-2]) < data.draw(st.sampled_from([0.0, 0.02, 0.5])))
    k, v = k.copy(), v.copy()
    in_k, in_v = data.draw(st.sampled_from([(np.nan, np.nan), (np.inf, -np.inf), (np.nan, 1)]))
    k[..., chosen, :], v[..., chosen, :] = in_k, in_v
    if "bias" in options and options["bias"].shape == want[2].shape:
        bias = options["bias"].copy()
        bias[np.broadcast_to(unseen, bias.shape) & ~np.isneginf(bias)] = np.nan
        options = {**options, "bias": bias}
    got = attend((q, k, v), options)
    sees = (seen & chosen).any(axis=-1)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g[~sees], w[~sees])
    if np.isnan(in_k):
        assert_canonical_nan(got[0][sees])
        assert_canonical_nan(got[1][sees])
        assert_canonical_nan(got[2][sees][seen[sees]])


@given(call=calls(), data=st.data())
def test_out_and_layout_change_nothing(isa, call, data):
    """Contiguous copies, with and without `out`, also where out is an input: the same bits."""
    arrays, options = call
    plain = {
        n: np.array(a, order="C") if isinstance(a, np.ndarray) else a for n, a in options.items()
    }
    want = attend([np.array(a, order="C") for a in arrays], plain)
    got = attend(arrays, options)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    out = data.draw(strided(np.zeros(want[0].shape, want[0].dtype)))
    assert fs.attention(*arrays, **options, out=out) is out
    assert_same_bits(out, want[0])
    for name, a in zip("qkv", arrays, strict=True):
        if a.shape == want[0].shape:
            work = dict(zip("qkv", arrays, strict=True)) | {name: data.draw(strided(a))}
            fs.attention(*work.values(), **options, out=work[name])
            assert_same_bits(work[name], want[0], name)


@given(call=calls(), data=st.data())
def test_a_part_of_the_queries(isa, call, data):
    """Any two or more neighbours alone, in a chunk, give what they give among the others."""
    (q, k, v), options = call
    queries, single = q.shape[-2], q.ndim == k.ndim == v.ndim == 2
    if queries < 3:
        return
    start = data.draw(st.integers(0, queries - 2))
    part = slice(start, data.draw(st.integers(start + 2, queries)))
    want = attend((q, k, v), options)
    mine = dict(options)
    for name in ("mask", "bias"):
        if name in options:
            mine[name] = np.broadcast_to(options[name], want[2].shape)[..., part, :]
    # Clipped offsets do not add up, but far away is far away.
    mine["q_offset"] = np.asarray(options.get("q_offset", 0)) + start
    got = attend((q[..., part, :], k, v), mine)
    for g, w, axis in zip(got, want, (-2, -1, -2), strict=True):
        w = w[..., part, :] if axis == -2 else w[..., part]
        assert_same_bits(g, w, (single, part))


@given(call=calls(), data=st.data())
def test_merge_of_two_parts(isa, call, data, record_max):
    """The keys in two sets, drawn at random: both together are the whole."""
    arrays, options = call
    whole = Attention(*arrays, **options)
    r = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    first = r.random(whole.true[2].shape) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    parts = []
    for chosen in (first, ~first):
        mine = {**options, "mask": chosen & options.get("mask", True)}
        if parts:
            mine.pop("sinks", None)
        parts += fs.attention(*arrays, **mine, return_lse=True)
    merged = fs.merge_attention(*parts)
    bound = np.where(np.isfinite(whole.bounds[1]), whole.bounds[1], 0)
    slack = {"out": 2 * bound[..., None] * whole.size, "lse": 2 * bound}
    if arrays[0].dtype in HALVES:
        for out in parts[::2]:
            slack["out"] = slack["out"] + one_ulp(out.astype(F64), arrays[0].dtype)
    whole.check(record_max, "random, merged", options, (*merged, None), slack)


@given(call=calls())
def test_one_query_as_among_others(isa, call, record_max):
    """Decoding and prefill take different ways; each is within the bound."""
    (q, k, v), options = call
    if not q.shape[-2]:
        return
    want = fs.attention(q, k, v, **options)
    bounds = Attention(q, k, v, **options).bounds[0]
    for i in {0, q.shape[-2] // 2, q.shape[-2] - 1}:
        mine = dict(options)
        scores = (*want.shape[:-1], k.shape[-2])
        for name in ("mask", "bias"):
            if name in options:
                mine[name] = np.broadcast_to(options[name], scores)[..., i : i + 1, :]
        mine["q_offset"] = np.asarray(options.get("q_offset", 0)) + i
        got = fs.attention(q[..., i : i + 1, :], k, v, **mine)[..., 0, :]
        true = want[..., i, :].astype(F64)
        allowed = 2 * bounds[..., i, :] + 1e-300 + (F32 == compute_type(q.dtype)) * 1e-40
        if q.dtype in HALVES:
            allowed = allowed + 2 * one_ulp(true, q.dtype)
        errors = relative_to(allowed, got, true)
        record_max(f"decode against prefill, {q.dtype.name}", errors, 1.0, options, "of two bounds")
