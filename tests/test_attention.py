"""attention and merge_attention against the oracle, within the stated bound.

`reference.attention_bound` is the bound, in float32 for the halves, which may be off by an ulp of
theirs more. What is printed at the end is in units of it. Bits are in test_attention_bits.py.
"""

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from common import (
    ATTENTION_OPTIONS,
    EPSILON,
    F16,
    F32,
    F64,
    HALVES,
    KEY_BLOCK,
    QUERY_BLOCKS,
    SINGLES,
    WIDE,
    Attention,
    Size,
    assert_canonical_nan,
    assert_plus_zero,
    assert_same_bits,
    compute_type,
    dtype_id,
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
from fastsoftmax import reference

SIZE = Size()
REAL = Path(__file__).parent / "data" / "minilm_layer5.npz"

every_single = pytest.mark.parametrize("dtype", SINGLES, ids=dtype_id)


# --- options --------------------------------------------------------------------------------------

COMBINATIONS = {
    "none": [()],
    "alone": [(name,) for name in ATTENTION_OPTIONS],
    "pairs": [*itertools.combinations(ATTENTION_OPTIONS, 2)],
    "some": [
        tuple(name for name in ATTENTION_OPTIONS if rng("some", i, name).random() < 0.5)
        for i in range(20)
    ],
    "all but one": [tuple(n for n in ATTENTION_OPTIONS if n != one) for one in ATTENTION_OPTIONS],
    "all": [tuple(ATTENTION_OPTIONS)] * 5,
}


@lru_cache(maxsize=1)
def calls_with_options(dtype, count):
    """Every form of a lone option; of several, forms drawn at random."""
    r = rng("options", dtype.name, count)
    qkv = SIZE.qkv(dtype, count)
    if count == "alone":
        options = [
            {name: form(r, SIZE)}
            for (name,) in COMBINATIONS[count]
            for form in ATTENTION_OPTIONS[name].values()
        ]
    else:
        options = [{n: some_option(n, r, SIZE) for n in names} for names in COMBINATIONS[count]]
    return [Attention(*qkv, **o) for o in options]


@every_dtype
@pytest.mark.parametrize("count", COMBINATIONS)
def test_options(isa, dtype, count, record_max):
    for call in calls_with_options(dtype, count):
        call.check(record_max, "options", call.options)


@every_dtype
def test_defaults_are_what_they_say(isa, dtype):
    q, k, v = SIZE.qkv(dtype)
    want = fs.attention(q, k, v)
    for options in (
        {"mask": None, "bias": None, "kv_lengths": None, "softcap": None, "sinks": None},
        {"is_causal": False, "q_offset": 0, "window": None, "alibi_slopes": None},
        {"scale": SIZE.depth**-0.5, "out": None, "return_lse": False, "return_weights": False},
    ):
        assert_same_bits(fs.attention(q, k, v, **options), want, options)


@every_dtype
def test_what_is_returned(isa, dtype):
    """out, or a tuple in the order out, lse, weights."""
    q, k, v = SIZE.qkv(dtype)
    out, lse, weights = fs.attention(q, k, v, return_lse=True, return_weights=True)
    assert type(out) is np.ndarray and out.flags.c_contiguous and lse.flags.c_contiguous
    result = fs.attention(q, k, v, return_lse=True)
    assert type(result) is tuple and len(result) == 2
    assert_same_bits(result[1], lse)
    result = fs.attention(q, k, v, return_weights=True)
    assert type(result) is tuple and len(result) == 2
    assert_same_bits(result[1], weights)
    into = np.empty_like(out)
    result = fs.attention(q, k, v, out=into, return_lse=True, return_weights=True)
    assert len(result) == 3 and result[0] is into
    assert fs.attention(q, k, v, out=into) is into
    assert_same_bits(into, out)


def test_inputs_are_not_modified(isa):
    r = rng("inputs")
    arrays = {n: some_option(n, r, SIZE) for n in ("mask", "bias", "sinks", "alibi_slopes")}
    arrays |= {"q_offset": r.integers(0, 9, 2), "kv_lengths": r.integers(1, 70, 2)}
    qkv = SIZE.qkv(F32)
    before = [a.copy() for a in (*qkv, *arrays.values())]
    for a in (*qkv, *arrays.values()):
        a.setflags(write=False)
    want = fs.attention(*qkv, **arrays, is_causal=True)
    assert_same_bits(fs.attention(*qkv, **arrays, is_causal=True), want)
    for a, b in zip((*qkv, *arrays.values()), before, strict=True):
        assert_same_bits(a, b)


# --- arguments of other kinds ---------------------------------------------------------------------


def test_array_likes(isa):
    q = [[1.0, 0.0], [0.0, 1.0]]
    out = fs.attention(q, q, np.array(q))
    assert out.dtype == F64 and out.shape == (2, 2)
    mask, bias = [[True, False], [True, True]], [0, -1]
    want = fs.attention(q, q, q, mask=np.array(mask), bias=np.array([0.0, -1.0]))
    assert_same_bits(fs.attention(q, q, q, mask=mask, bias=bias), want)
    want = fs.attention(q, q, q, sinks=np.array([0.5]), alibi_slopes=np.array([1.0]))
    assert_same_bits(fs.attention(q, q, q, sinks=[0.5], alibi_slopes=[1]), want)


@every_dtype
def test_byte_swapped_and_converted_inputs(isa, dtype):
    """Bias, sinks and slopes count in the compute type, whatever they come in."""
    r = rng("swapped")
    q, k, v = SIZE.qkv(dtype)
    bias = r.normal(0, 1, SIZE.scores[-2:]).astype(F32)
    sinks, slopes = r.normal(0, 1, (2, SIZE.heads)).astype(F16)
    want = fs.attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes)
    for wider in (F32, F64, F32.newbyteorder(">"), F64.newbyteorder(">")):
        wide = {"sinks": sinks.astype(wider), "alibi_slopes": slopes.astype(wider)}
        assert_same_bits(fs.attention(q, k, v, bias=bias.astype(wider), **wide), want, wider)
    want = fs.attention(q, k, v, q_offset=np.array([3, 4]), kv_lengths=50, is_causal=True)
    for kind in ("i1", "u1", ">i2", "<u4", "i8", "u8"):
        offset, lengths = np.array([3, 4], kind), np.array(50, kind)
        got = fs.attention(q, k, v, q_offset=offset, kv_lengths=lengths, is_causal=True)
        assert_same_bits(got, want, kind)
    if dtype in (F16, *SINGLES):
        q, k, v = (a.astype(dtype.newbyteorder(">")) for a in (q, k, v))
        got = fs.attention(q, k, v, q_offset=[3, 4], kv_lengths=50, is_causal=True)
        assert_same_bits(got, want)


def test_an_integer_bias_counts_in_the_compute_type(isa):
    q, k, v = SIZE.qkv(F32)
    for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        bias = rng(kind).integers(0, 100, SIZE.keys).astype(kind)
        want = fs.attention(q, k, v, bias=bias.astype(F32))
        assert_same_bits(fs.attention(q, k, v, bias=bias), want, kind)


# --- shapes ---------------------------------------------------------------------------------------

SHAPES = {
    "2-D": ((5, 8), (70, 8), (70, 3)),
    "2-D, one query": ((1, 8), (70, 8), (70, 3)),
    "3-D": ((3, 50, 8), (3, 9, 8), (3, 9, 4)),
    "3-D, grouped": ((6, 50, 8), (2, 9, 8), (2, 9, 4)),
    "3-D, one KV head": ((5, 7, 8), (1, 9, 8), (1, 9, 4)),
    "4-D": ((2, 3, 17, 8), (2, 3, 33, 8), (2, 3, 33, 4)),
    "4-D, grouped": ((2, 8, 17, 8), (2, 2, 33, 8), (2, 2, 33, 4)),
    "5-D": ((2, 1, 2, 17, 8), (2, 1, 2, 33, 8), (2, 1, 2, 33, 4)),
    "2-D k and v": ((2, 3, 17, 8), (33, 8), (33, 4)),
    "2-D q": ((17, 8), (2, 1, 33, 8), (2, 1, 33, 4)),
    "2-D v": ((3, 17, 8), (1, 33, 8), (33, 4)),
    "one q for a batch": ((3, 17, 8), (4, 3, 33, 8), (4, 3, 33, 4)),
    "one k and v for a batch": ((4, 6, 17, 8), (1, 2, 33, 8), (2, 33, 4)),
    "leading dimensions of each": ((2, 1, 1, 2, 9, 8), (3, 1, 1, 33, 8), (4, 1, 33, 4)),
    "more in v": ((2, 9, 8), (2, 33, 8), (3, 2, 33, 4)),
    "one query, grouped": ((2, 32, 1, 16), (2, 4, 129, 16), (2, 4, 129, 16)),
    "one query, a group of seven": ((7, 1, 16), (1, 200, 16), (1, 200, 5)),
    "one query, 35 heads of one": ((35, 1, 16), (1, 200, 16), (1, 200, 5)),
    "one query, 35 heads of one, many keys": ((2, 35, 1, 7), (2, 1, 1200, 7), (1, 1200, 5)),
    "three queries, 35 heads of one": ((35, 3, 16), (1, 200, 16), (1, 200, 5)),
    "two queries, grouped": ((32, 2, 16), (4, 129, 16), (4, 129, 16)),
    "one key": ((2, 50, 8), (2, 1, 8), (2, 1, 4)),
    "all ones": ((1, 1), (1, 1), (1, 1)),
}


@lru_cache(maxsize=3)
def call_of_shape(name, dtype, options):
    q, k, v = (normal(s, dtype, 1.5, n) for s, n in zip(SHAPES[name], "qkv", strict=True))
    options = dict(options)
    lead = np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    r = rng("shape", name)
    if "kv_lengths" in options:
        options["kv_lengths"] = r.integers(1, k.shape[-2] + 1, lead)
    if "bias" in options:
        heads = q.shape[-3:-2]  # none in 2-D: broadcast
        options["bias"] = r.normal(0, 1, (*heads, q.shape[-2], k.shape[-2]))
    return Attention(q, k, v, **options)


@every_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(isa, dtype, name, record_max):
    for options in ((), (("is_causal", True), ("q_offset", 3)), (("bias", 1), ("kv_lengths", 1))):
        call_of_shape(name, dtype, options).check(record_max, "shapes", options)


DEPTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 80, 128, 200, 512)


@lru_cache(maxsize=1)
def calls_of_depth(dtype, depth, v_depth):
    sizes = [Size((), 2, 1, n, 69, depth, v_depth) for n in (1, 2, 50)]
    return [Attention(*s.qkv(dtype), is_causal=s.queries > 2, q_offset=9) for s in sizes]


@every_dtype
@pytest.mark.parametrize("depth, v_depth", [*zip(DEPTHS, DEPTHS[5:] + DEPTHS[:5], strict=True)])
def test_depths(isa, dtype, depth, v_depth, record_max):
    for call in calls_of_depth(dtype, depth, v_depth):
        call.check(record_max, "depths", call.arrays[0].shape)


@every_dtype
@pytest.mark.parametrize("empty", ["lead", "heads", "queries", "keys", "v_depth"])
@pytest.mark.parametrize("queries", [1, 5])
def test_nothing_of_something(isa, dtype, queries, empty):
    """Empty results of the right shape; without keys zeros, and the sink for the lse."""
    size = Size(queries=queries)._replace(**{empty: (0, 3) if empty == "lead" else 0})
    q, k, v = size.qkv(dtype)
    sinks = np.linspace(-3, 2, size.heads).astype(compute_type(dtype))
    sinks[1:2] = -np.inf
    for options in ({}, {"is_causal": True, "window": (2, 3)}, {"sinks": sinks}):
        out, lse, weights = fs.attention(q, k, v, **options, return_lse=True, return_weights=True)
        assert out.shape == (*size.scores[:-1], size.v_depth) and out.dtype == dtype
        assert lse.shape == size.scores[:-1] and lse.dtype == compute_type(dtype)
        assert weights.shape == size.scores and weights.dtype == dtype
        if empty == "keys":
            assert_plus_zero(out)
            want = options.get("sinks", np.full(size.heads, -np.inf))
            assert (lse == want[:, None]).all()
        elif empty == "v_depth":
            assert np.isfinite(lse).all() and weights.any()


# --- borders of blocks ----------------------------------------------------------------------------

BORDER_KEYS = (1, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, 2 * KEY_BLOCK + 3)
BORDER_QUERIES = {
    F32: sorted({1, 195, *(n + d for n in QUERY_BLOCKS for d in (-1, 0, 1, n + 3))}),
    F64: sorted({1, *(n // 2 + d for n in QUERY_BLOCKS for d in (-1, 0, 1, n // 2 + 3))}),
}

# name: options for n queries, k keys.
BORDERS = {
    "plain": lambda r, n, k: {},
    "causal": lambda r, n, k: {"is_causal": True},
    "causal from the end": lambda r, n, k: {"is_causal": True, "q_offset": k - n},
    "narrow window": lambda r, n, k: {"window": (3, 2), "q_offset": (k - n) // 2},
    "wide window": lambda r, n, k: {"window": (KEY_BLOCK, None), "q_offset": k - n},
    "window to the right": lambda r, n, k: {"window": (KEY_BLOCK, KEY_BLOCK - 1)},
    "alibi": lambda r, n, k: {"alibi_slopes": np.array([0.25, -0.02]), "q_offset": k - n},
    "softcap": lambda r, n, k: {"softcap": 2.0},
    "mask": lambda r, n, k: {"mask": r.random((2, n, k)) < 0.5},
    "mask of keys": lambda r, n, k: {"mask": r.random(k) < 0.5},
    "bias": lambda r, n, k: {"bias": r.normal(0, 2, (1, n, k)).astype(F32)},
    "bias of keys": lambda r, n, k: {"bias": np.where(r.random(k) < 0.5, 1.5, -np.inf)},
    "lengths": lambda r, n, k: {"kv_lengths": min(k, KEY_BLOCK), "sinks": np.array([0.5, -1])},
    "all": lambda r, n, k: {
        "mask": r.random((n, k)) < 0.8, "bias": r.normal(0, 1, (2, 1, k)), "is_causal": True,
        "q_offset": k - n + 1, "kv_lengths": k - k // 9, "window": (k // 2, 5), "scale": 0.4,
        "softcap": 5.0, "sinks": np.array([0.5, -1]), "alibi_slopes": np.array([0.25, -0.02]),
    },
}  # fmt: skip


@lru_cache(maxsize=1)
def calls_at_borders(name, dtype):
    calls = []
    queries = BORDER_QUERIES[compute_type(dtype)]
    if dtype in HALVES:
        queries = queries[::2]
    for n, k in itertools.product(queries, BORDER_KEYS):
        options = BORDERS[name](rng("border", name, n, k), n, k)
        # Where there are four heads of k, blocks of queries share the reading of a block of keys.
        lead, kv_heads = ((2,), 2) if k % 2 else ((), 1)
        calls.append(Attention(*Size(lead, 2, kv_heads, n, k, 5, 3).qkv(dtype), **options))
    return calls


@every_dtype
@pytest.mark.parametrize("name", BORDERS)
def test_borders(isa, dtype, name, record_max):
    for call in calls_at_borders(name, dtype):
        call.check(record_max, "borders", call.true[2].shape)


@lru_cache(maxsize=1)
def calls_at_borders_of_one_query(name, dtype):
    calls = []
    for k in (127, 128, 129, 255, 257, 511, 512, 513, 1025, 1600, 9000):
        options = BORDERS[name](rng("border", name, k), 1, k)
        calls.append(Attention(*Size((), 2, 1, 1, k, 5, 3).qkv(dtype), **options))
    return calls


@every_dtype
@pytest.mark.parametrize("name", BORDERS)
def test_borders_of_one_query(isa, dtype, name, record_max):
    """Blocks of 128 keys, parts of 512 that threads share, and longer ones."""
    for call in calls_at_borders_of_one_query(name, dtype):
        call.check(record_max, "borders of one query", call.true[2].shape)


# --- what is seen, exactly ------------------------------------------------------------------------


@every_dtype
def test_visibility_and_nothing_else(isa, dtype):
    """With q = 0 every key that a query sees has the weight 1/n: visibility, not rounding."""
    for queries, keys in ((1, 130), (7, 5), (50, 65), (99, 131)):
        size = Size((2,), 2, 1, queries, keys, 3, 2)
        q, k, v = size.qkv(dtype)
        q[...] = 0
        r = rng("visible", queries, keys)
        names = ("mask", "is_causal", "q_offset", "kv_lengths", "window")
        for _ in range(12):
            options = {n: some_option(n, r, size) for n in names if r.random() < 0.5}
            seen = visible_keys(q, k, v, **options)
            count = seen.sum(axis=-1, keepdims=True)
            with np.errstate(divide="ignore"):
                want = np.where(seen, 1 / count, 0)
            out, lse, weights = fs.attention(
                q, k, v, **options, return_lse=True, return_weights=True
            )
            assert_same_bits(weights != 0, seen, options)
            assert np.abs(weights.astype(F64) - want).max() <= EPSILON[dtype], options
            with np.errstate(divide="ignore"):
                assert np.allclose(lse, np.log(count[..., 0]), atol=1e-5), options
            mean = want @ np.repeat(v, 2, axis=-3).astype(F64)
            assert np.allclose(
                out.astype(F64), mean, rtol=2 * EPSILON[dtype], atol=2e-6 + EPSILON[dtype]
            )


@every_dtype
def test_positions_far_away(isa, dtype):
    """Offsets at the ends of int64 behave as offsets, and do not wrap around."""
    size = Size((2,), 2, 1, 9, 70, 4, 3)
    q, k, v = size.qkv(dtype)
    all_keys, none = fs.attention(q, k, v), np.zeros((2, 2, 9, 3), dtype)
    for far in (2**40, 2**62, 2**63 - 1):
        for offset in (far, np.array([far, far])):
            assert_same_bits(fs.attention(q, k, v, is_causal=True, q_offset=offset), all_keys)
            got = fs.attention(q, k, v, window=(100, None), q_offset=offset)
            assert_same_bits(got, none, far)
            got = fs.attention(q, k, v, window=(None, 0), q_offset=offset)
            assert_same_bits(got, all_keys, far)
        for offset in (-far, -far - 1, np.array([-far, -far - 1])):
            assert_same_bits(fs.attention(q, k, v, is_causal=True, q_offset=offset), none)
            got = fs.attention(q, k, v, window=(0, None), q_offset=offset)
            assert_same_bits(got, all_keys, far)
        got = fs.attention(q, k, v, window=(far, far), q_offset=5)
        assert_same_bits(got, all_keys, ("window", far))
    # A window that reaches from there to all keys.
    widest = 2**63 - 1
    for offset, window in ((2**61, (widest, None)), (-(2**61), (None, widest))):
        assert_same_bits(fs.attention(q, k, v, window=window, q_offset=offset), all_keys, offset)
    mixed = fs.attention(q, k, v, is_causal=True, q_offset=np.array([2**62, -(2**62)]))
    assert_same_bits(mixed, np.stack([all_keys[0], none[1]]))


# --- accuracy -------------------------------------------------------------------------------------


def peaked(r, shape):
    """Few large components: a few keys take it all."""
    return r.normal(0, 1, shape) * np.where(r.random(shape) < 0.1, 8, 0.5)


DISTRIBUTIONS = {
    **{f"scale {s:g}": lambda r, shape, s=s: r.normal(0, s, shape) for s in (0.01, 1, 3, 30)},
    "offset 10": lambda r, shape: r.normal(10, 1, shape),
    "few values": lambda r, shape: r.choice(r.normal(0, 2, 4), shape),
    "constant": lambda r, shape: np.full(shape, 1.3),
    "two scales": lambda r, shape: r.normal(0, 1, shape) * np.where(r.random(shape) < 0.5, 0.01, 3),
    "peaked": peaked,
    "rising": lambda r, shape: r.normal(0, 0.3, shape) + np.linspace(-4, 4, shape[-2])[:, None],
    "falling": lambda r, shape: r.normal(0, 0.3, shape) - np.linspace(-4, 4, shape[-2])[:, None],
}


@lru_cache(maxsize=1)
def calls_of_distribution(name, dtype):
    calls = []
    for n, keys, depth in ((1, 1500, 64), (49, 400, 64), (5, 1000, 3), (1, 70, 1), (30, 129, 1)):
        r = rng("distribution", name, n, keys, depth)
        arrays = (DISTRIBUTIONS[name](r, s).astype(dtype) for s in ((n, depth), (keys, depth)))
        v = r.normal(0, 1, (keys, 16)).astype(dtype)
        calls.append(Attention(*arrays, v))
    return calls


@every_dtype
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_accuracy(isa, dtype, name, record_max):
    for call in calls_of_distribution(name, dtype):
        call.check(record_max, "accuracy", (name, call.arrays[0].shape))


@lru_cache(maxsize=1)
def a_long_call():
    return Attention(*Size((), 1, 1, 3, 20_000, 32, 8).qkv(F32))


def test_many_keys(isa, record_max):
    call = a_long_call()
    call.check(record_max, "many keys")
    q, k, v = call.arrays
    one = Attention(q[:, :1], k, v)
    one.check(record_max, "many keys")


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_halves_are_the_float32_result_rounded(isa, dtype):
    """To within an ulp, with all options; the float32 lse itself. AMX's weights have 16 bits."""
    for queries in (1, 53):
        size = SIZE._replace(queries=queries)
        qkv = size.qkv(dtype)
        wide = [a.astype(F32) for a in qkv]
        r = rng("halves", queries)
        for _ in range(8):
            options = {n: some_option(n, r, size) for n in ATTENTION_OPTIONS if r.random() < 0.4}
            want = fs.attention(*wide, **options, return_lse=True, return_weights=True)
            got = fs.attention(*qkv, **options, return_lse=True, return_weights=True)
            off = 2.0**-17 * Attention(*wide, **options).size if isa == "amx" else 0
            for g, w, more in ((got[0], want[0], off), (got[2], want[2], 0)):
                allowed = one_ulp(w.astype(F64), dtype) + more
                assert (relative_to(allowed, g, w.astype(dtype).astype(F64)) <= 1).all(), options
            bound = 1e-5 * np.maximum(1, np.abs(want[1].astype(F64)))
            assert (relative_to(bound, got[1], want[1].astype(F64)) <= 1).all(), options


@every_single
def test_a_real_layer(isa, dtype, record_max):
    """q, k, v and padding of a sentence encoder; the float64 result came with the data."""
    layer = np.load(REAL)
    q, k, v = (layer[n].astype(dtype) for n in "qkv")
    scale = np.abs(layer["out"]).max()
    mask = layer["key_mask"][:, None, None]
    lengths = layer["key_mask"].sum(axis=-1)
    seen = np.broadcast_to(layer["key_mask"][:, None, :, None], layer["out"].shape)
    for options in (
        {"mask": mask},
        {"kv_lengths": lengths},
        {"bias": np.where(mask, 0, -np.inf)},
        {"bias": np.where(mask, 0, -1e9)},
    ):
        got = fs.attention(q, k, v, **options)
        errors = np.abs(got.astype(F64) - layer["out"])[seen] / scale
        record_max(f"a real layer, {dtype.name}", errors * 1e6, 1.0, options, "* 1e-6 of its scale")
    for b, n in enumerate(lengths):
        got = fs.attention(q[b, :, :n], k[b, :, :n], v[b, :, :n])
        errors = np.abs(got.astype(F64) - layer["out"][b, :, :n]) / scale
        record_max(f"a real layer, {dtype.name}", errors * 1e6, 1.0, b, "* 1e-6 of its scale")
    Attention(q, k, v, mask=mask).check(record_max, "a real layer")


@pytest.mark.parametrize("queries, is_causal", [(1, False), (200, False), (200, True)])
def test_no_worse_than_torch(isa, queries, is_causal, record_max):
    """The typical error, in units of 2^-24 sum(w |v|), beside that of torch on the same data."""
    torch = pytest.importorskip("torch")
    q, k, v = Size((), 4, 4, queries, 500, 64, 64).qkv(F32, scale=1.0)
    options = {"is_causal": is_causal}
    true = reference.attention(q, k, v, **options)
    size = 2.0**-24 * reference.attention(q, k, np.abs(v), **options)
    errors = [
        np.abs(got - true).mean() / size.mean()
        for got in (
            fs.attention(q, k, v, **options),
            torch.nn.functional.scaled_dot_product_attention(
                *map(torch.from_numpy, (q, k, v)), **options
            ).numpy(),
        )
    ]
    name = f"typical error; the bound is torch's, {queries} queries, causal {is_causal}"
    record_max(name, errors[0], errors[1], unit="* 2^-24 sum(w |v|)")


# --- out ------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("queries", [1, 30])
def test_out_in_any_layout(isa, dtype, queries):
    size = SIZE._replace(queries=queries, keys=33)
    q, k, v = size.qkv(dtype)
    b, h, n, d = shape = (2, 4, queries, 5)
    want = fs.attention(q, k, v)
    buffer = np.empty(8 * want.size, dtype)
    for out in (
        np.empty(shape, dtype),
        np.empty((b, n, h, d), dtype).swapaxes(1, 2),
        np.empty(shape, dtype, order="F"),
        np.empty((b, h, n, 2 * d), dtype)[..., ::2],
        np.empty((b, h, n, 2 * d), dtype)[..., 1::2],
        np.empty(shape, dtype)[::-1, ::-1, ::-1, ::-1],
        np.empty((b, h, 2 * n, d), dtype)[:, :, ::2],
        np.empty((b, h, d, n), dtype).swapaxes(2, 3)[..., ::-1],
        unaligned(want),
        buffer[3 : 3 + want.size].reshape(shape),
        np.zeros(shape, [("pad", "u1"), ("x", dtype)])["x"],
    ):
        out[...] = 7
        assert fs.attention(q, k, v, out=out) is out
        assert_same_bits(out, want, out.strides)
    wide = np.full((b, h, n, 2 * d), 7, dtype)
    fs.attention(q, k, v, out=wide[..., ::2], return_lse=True)
    assert (wide[..., 1::2] == 7).all(), "wrote between the elements of out"
    fs.attention(q[0, 0], k[0, 0], v[0, 0], out=wide[0, 1, :, :d])
    assert_same_bits(wide[0, 1, :, :d], want[0, 0], "2-D")


@every_dtype
@pytest.mark.parametrize("queries", [1, 30])
def test_out_overlaps_an_input(isa, dtype, queries):
    """As if the inputs were copied first, whatever they are and however they overlap."""
    size = Size((2,), 2, 2, queries, queries, 6, 6)
    arrays = dict(zip("qkv", size.qkv(dtype), strict=True))
    r = rng("overlap")
    arrays["bias"] = r.normal(0, 1, size.scores).astype(dtype)
    arrays["mask"] = r.random(size.scores) < 0.8

    def attend(a, **out):
        return fs.attention(a["q"], a["k"], a["v"], bias=a["bias"], mask=a["mask"], **out)

    want = attend(arrays)
    for name in "qkv":
        same = {n: a.copy() for n, a in arrays.items()}
        assert attend(same, out=same[name]) is same[name]
        assert_same_bits(same[name], want, (name, "the same"))
        turned = {n: a.copy() for n, a in arrays.items()}
        out = turned[name][:, ::-1, ::-1, ::-1]
        attend(turned, out=out)
        assert_same_bits(out, want, (name, "reversed"))
    for name in arrays:
        for shift in (0, 1, 5, 36):  # elements by which out begins later
            moved = {n: a.copy() for n, a in arrays.items()}
            items = max(moved[name].nbytes // dtype.itemsize, want.size) + shift + 1
            buffer = np.zeros(items, dtype)
            bytes_ = buffer.view(np.uint8)[: moved[name].nbytes]
            moved[name] = bytes_.view(moved[name].dtype).reshape(moved[name].shape)
            moved[name][...] = arrays[name]
            out = buffer[shift : shift + want.size].reshape(want.shape)
            attend(moved, out=out)
            assert_same_bits(out, want, (name, shift))


def test_out_overlaps_small_arguments(isa):
    """Sinks, slopes, offsets and lengths that lie in out are read before it is written."""
    q, k, v = SIZE.qkv(F64)
    r = rng("small")
    small = {
        "sinks": r.normal(0, 1, 4),
        "alibi_slopes": r.normal(0, 0.1, 4),
        "q_offset": np.array([3, 20]),
        "kv_lengths": np.array([50, 9]),
    }
    want = fs.attention(q, k, v, is_causal=True, **small)
    for name, value in small.items():
        out = np.zeros_like(want)
        inside = out.ravel()[: len(value)].view(value.dtype)
        inside[...] = value
        fs.attention(q, k, v, is_causal=True, **{**small, name: inside}, out=out)
        assert_same_bits(out, want, name)


# --- a KV cache -----------------------------------------------------------------------------------

CACHE_OPTIONS = {
    "plain": {},
    "window": {"window": (20, None)},
    "alibi": {"alibi_slopes": np.array([0.5, 0.2, 0.1, 0.05])},
    "softcap and sinks": {"softcap": 4.0, "sinks": np.array([0.5, -1, 2, 0])},
}


@every_dtype
@pytest.mark.parametrize("name", CACHE_OPTIONS)
def test_decoding_with_a_cache(isa, dtype, name, record_max):
    """One query a step, two sequences of different age: as prefill, to twice the bound."""
    options = CACHE_OPTIONS[name]
    tokens, ahead, capacity = 75, np.array([0, 11]), 130
    size = Size((2,), 4, 2, tokens, tokens + 11, 16, 8)
    _, past_k, past_v = size.qkv(dtype)
    q = normal((2, 4, tokens, 16), dtype, 1.5, "cache")
    cache_k = np.full((2, 2, capacity, 16), np.nan, dtype)
    cache_v = np.full((2, 2, capacity, 8), np.nan, dtype)
    # Sequence 1 has 11 tokens in the cache before the first step.
    whole_k, whole_v = np.full_like(cache_k, np.nan), np.full_like(cache_v, np.nan)
    for b, a in enumerate(ahead):
        whole_k[b, :, : tokens + a] = past_k[b, :, : tokens + a]
        whole_v[b, :, : tokens + a] = past_v[b, :, : tokens + a]
        cache_k[b, :, :a], cache_v[b, :, :a] = whole_k[b, :, :a], whole_v[b, :, :a]
    call = Attention(
        q, whole_k, whole_v, is_causal=True, q_offset=ahead, kv_lengths=ahead + tokens, **options
    )
    call.check(record_max, "cache, prefill")
    prefill = fs.attention(*call.arrays, **call.options)
    for t in range(tokens):
        for b, a in enumerate(ahead):
            cache_k[b, :, a + t], cache_v[b, :, a + t] = past_k[b, :, a + t], past_v[b, :, a + t]
        step = fs.attention(
            q[:, :, t : t + 1],
            cache_k,
            cache_v,
            is_causal=True,
            q_offset=ahead + t,
            kv_lengths=ahead + t + 1,
            **options,
        )
        true, got = prefill[:, :, t].astype(F64), step[:, :, 0]
        allowed = 2 * call.bounds[0][:, :, t]
        if dtype in HALVES:
            allowed = allowed + 2 * one_ulp(true, dtype)
        errors = relative_to(allowed, got, true)
        record_max(f"decode against prefill, {dtype.name}", errors, 1.0, t, "of the two bounds")


# --- merge_attention ------------------------------------------------------------------------------


def part_of_keys(options, start, stop, keys):
    """The options for keys start..stop alone: what is said of positions moves along."""
    part = dict(options)
    for name in ("mask", "bias"):
        if name in options and np.shape(options[name])[-1:] == (keys,):
            part[name] = options[name][..., start:stop]
    part["q_offset"] = np.asarray(options.get("q_offset", 0)) - start
    if "kv_lengths" in options:
        part["kv_lengths"] = np.clip(np.asarray(options["kv_lengths"]) - start, 0, stop - start)
    if stop == keys:
        part.pop("sinks", None)  # they belong to one part only
    return part


def check_merged(record_max, call, merged, what):
    """out may err as much as the whole, and by what two lse and two halves' roundings add."""
    (out, lse), dtype = merged, call.dtype
    lse_bound = np.where(np.isfinite(call.bounds[1]), call.bounds[1], 0)
    slack = {"out": 2 * lse_bound[..., None] * call.size, "lse": 2 * lse_bound}
    if dtype in HALVES:
        slack["out"] = slack["out"] + EPSILON[dtype] * call.size
    call.check(record_max, "merged", what, (out, lse, None), slack)


@lru_cache(maxsize=2)
def calls_to_merge(dtype, queries):
    size = SIZE._replace(queries=queries, keys=135)
    r = rng("merge", queries)
    choices = [{}, {"is_causal": True, "q_offset": 135 - queries}]
    names = [n for n in ATTENTION_OPTIONS if n != "is_causal"]
    choices += [{n: some_option(n, r, size)} for n in names]
    choices += [
        {n: some_option(n, r, size) for n in ATTENTION_OPTIONS if r.random() < 0.4}
        for _ in range(6)
    ]
    return size, [Attention(*size.qkv(dtype), **options) for options in choices]


@every_dtype
@pytest.mark.parametrize("queries", [1, 26])
def test_merge_of_two_parts(isa, dtype, queries, record_max):
    """The keys cut anywhere: the two parts together are the whole."""
    size, calls = calls_to_merge(dtype, queries)
    for call in calls:
        q, k, v = call.arrays
        for cut in (0, 1, 50, 64, 134):
            parts = [
                fs.attention(
                    q,
                    k[..., start:stop, :],
                    v[..., start:stop, :],
                    **part_of_keys(call.options, start, stop, size.keys),
                    return_lse=True,
                )
                for start, stop in ((0, cut), (cut, size.keys))
            ]
            (out_a, lse_a), (out_b, lse_b) = parts
            merged = fs.merge_attention(out_a, lse_a, out_b, lse_b)
            assert type(merged) is tuple and len(merged) == 2
            check_merged(record_max, call, merged, (cut, call.options))
            swapped = fs.merge_attention(out_b, lse_b, out_a, lse_a)
            check_merged(record_max, call, swapped, (cut, call.options, "swapped"))
            # A part in which a query sees nothing leaves the other as it is.
            for nothing, (other, other_lse) in ((lse_a, parts[1]), (lse_b, parts[0])):
                unseen = nothing == -np.inf
                assert_same_bits(merged[0][unseen], other[unseen], (cut, call.options))
                assert_same_bits(merged[1][unseen], other_lse[unseen], (cut, call.options))


@every_dtype
def test_merge_of_every_other_key(isa, dtype, record_max):
    """Any two sets of keys will do; here they lie in one array."""
    size, calls = calls_to_merge(dtype, 26)
    q, k, v = calls[0].arrays
    odd = rng("odd").random(size.scores) < 0.3
    parts = [fs.attention(q, k, v, mask=m, return_lse=True) for m in (odd, ~odd)]
    merged = fs.merge_attention(*parts[0], *parts[1])
    check_merged(record_max, calls[0], merged, "odd")
    swapped = fs.merge_attention(*parts[1], *parts[0])
    check_merged(record_max, calls[0], swapped, "even")


@every_dtype
def test_merge_of_many_parts(isa, dtype, record_max):
    """One key at a time; the bound grows by a rounding with every step."""
    size, calls = calls_to_merge(dtype, 26)
    call = calls[0]
    # Halves lose half an ulp with every step: their parts are kept in float32.
    wide = call if dtype not in HALVES else Attention(*(a.astype(F32) for a in call.arrays))
    q, k, v = wide.arrays
    steps = 27
    out, lse = fs.attention(q, k[:, :, :5], v[:, :, :5], return_lse=True)
    for at in range(5, size.keys, 5):
        part = fs.attention(q, k[:, :, at : at + 5], v[:, :, at : at + 5], return_lse=True)
        out, lse = fs.merge_attention(out, lse, *part)
    slack = {"out": 2 * steps * wide.bounds[0], "lse": 2 * steps * wide.bounds[1]}
    wide.check(record_max, "merged, 27 parts", "", (out, lse, None), slack)


@every_dtype
def test_merge_against_its_oracle(isa, dtype, record_max):
    """Any shape, any lse: far apart, equal, infinite."""
    inner = compute_type(dtype)
    u, r = EPSILON[inner] / 2, rng("merge oracle")
    for shape in ((1, 4), (3, 1), (2, 3, 5), (0, 3), (1, 40, 70), (2, 1, 2, 3, 17)):
        for gap in (0.0, 1.0, 30.0, 300.0):
            out_a, out_b = (normal(shape, dtype, 1.0, gap, n) for n in "ab")
            lse_a, lse_b = ((gap * r.normal(0, 1, shape[:-1]) + 5).astype(inner) for _ in range(2))
            true, true_lse = reference.merge_attention(out_a, lse_a, out_b, lse_b, precise=WIDE)
            out, lse = fs.merge_attention(out_a, lse_a, out_b, lse_b)
            assert out.dtype == dtype and out.shape == shape
            assert lse.dtype == inner and lse.shape == shape[:-1]
            top = np.maximum(1, np.maximum(np.abs(lse_a), np.abs(lse_b)).astype(F64))
            errors = relative_to(4 * u * top, lse, true_lse)
            record_max(
                f"merge_attention, lse {dtype.name}", errors, 1.0, (shape, gap), "of the bound"
            )
            size, _ = reference.merge_attention(np.abs(out_a), lse_a, np.abs(out_b), lse_b)
            allowed = u * (16 + 4 * top[..., None]) * size + 2.0**-1000
            if dtype in HALVES:
                allowed = allowed + one_ulp(true.astype(F64), dtype)
            errors = relative_to(allowed, out, true)
            record_max(
                f"merge_attention, out {dtype.name}", errors, 1.0, (shape, gap), "of the bound"
            )


@every_dtype
def test_merge_of_specials(isa, dtype):
    inner, inf, nan = compute_type(dtype), np.inf, np.nan
    for width in (1, 3, 16, 70):
        columns = normal((5, width), dtype, 1.0, "merge special")
        lse = np.array([0.5, -inf, -3, 2, 0.25], inner)
        for rubbish in (nan, inf, -inf, 3.0):
            junk = np.full_like(columns, rubbish)
            none = np.full(5, -inf, inner)
            for a, b in (((columns, lse), (junk, none)), ((junk, none), (columns, lse))):
                out, got = fs.merge_attention(*a, *b)
                assert_same_bits(got, lse)
                assert_plus_zero(out[1])
                assert_same_bits(np.delete(out, 1, 0), np.delete(columns, 1, 0), rubbish)
        # A NaN of the other sign and with a payload, as arithmetic may leave it.
        spoiled = lse.copy()
        spoiled.view(f"i{inner.itemsize}")[3] = -1
        clean, _ = fs.merge_attention(columns, lse, columns[::-1], lse)
        for a, b in ((spoiled, lse), (lse, spoiled)):
            out, got = fs.merge_attention(columns, a, columns[::-1], b)
            assert_canonical_nan(out[3])
            assert_canonical_nan(got[3])
            assert_same_bits(np.delete(out, 3, 0), np.delete(clean, 3, 0))
        spoiled = columns.copy()
        spoiled.view(f"i{dtype.itemsize}")[3] = -1
        for a, b in ((spoiled, columns), (columns, spoiled)):
            out, got = fs.merge_attention(a, lse, b, lse)
            assert_canonical_nan(out[3])
            assert np.isfinite(np.delete(out, 3, 0).astype(F64)).all() and not np.isnan(got).any()


@every_dtype
def test_merge_layouts_and_threads(isa, dtype):
    shape = (3, 4, 50, 40)
    a, b = (normal(shape, dtype, 1.0, n) for n in "ab")
    lse_a, lse_b = (normal(shape[:-1], compute_type(dtype), 1.0, n) for n in "ab")
    with fs.num_threads(1):
        want = fs.merge_attention(a, lse_a, b, lse_b)

    def turned(x):
        return x.swapaxes(1, 2).copy().swapaxes(1, 2)

    def backwards(x):
        return x[::-1, :, ::-1].copy()[::-1, :, ::-1]

    def gaps(x):
        return np.repeat(x, 2, axis=-1)[..., ::2]

    for count in (1, 2, 3):
        with fs.num_threads(count):
            for layout in (lambda x: x, turned, backwards, gaps, np.asfortranarray, unaligned):
                got = fs.merge_attention(layout(a), layout(lse_a), b, lse_b)
                assert_same_bits(got[0], want[0], (count, layout))
                assert_same_bits(got[1], want[1], (count, layout))
                got = fs.merge_attention(a, lse_a, layout(b), layout(lse_b))
                assert_same_bits(got[0], want[0], (count, layout))
    one = fs.merge_attention(a[1, 2, 3:4], lse_a[1, 2, 3:4], b[1, 2, 3:4], lse_b[1, 2, 3:4])
    assert_same_bits(one[0], want[0][1, 2, 3:4], "one row")
