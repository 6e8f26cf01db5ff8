"""attention_varlen has the bits of attention for each sequence, and refuses what is not packed."""

from functools import lru_cache

import numpy as np
import pytest
from common import (
    ATTENTION_OPTIONS,
    BF16,
    F32,
    F64,
    Attention,
    GuardedPages,
    Size,
    assert_same_bits,
    every_dtype,
    normal,
    rng,
    some_option,
)

import fastsoftmax as fs
from fastsoftmax import reference

# (queries, keys) of each sequence: none; one, with and without parts to merge; beside a vector, a
# block of keys and a unit of queries, long after short.
LENGTHS = [
    (0, 5), (3, 0), (1, 1), (5, 5), (1, 1100), (30, 64), (97, 65), (1, 513), (1, 0), (25, 130),
]  # fmt: skip
NONE = [(0, 0)]
HEADS, KV_HEADS, DEPTH, V_DEPTH = 6, 2, 9, 5
PER_SEQUENCE = ("q_offset", "kv_lengths")


def starts_of(lengths):
    return [np.concatenate([[0], np.cumsum(side)]) for side in zip(*lengths, strict=True)]


def packed(lengths, dtype, heads=HEADS, kv_heads=KV_HEADS, depth=DEPTH, v_depth=V_DEPTH):
    """Q, k, v, cu_seqlens_q and cu_seqlens_k."""
    cu_q, cu_k = starts_of(lengths)
    shapes = (cu_q[-1], heads, depth), (cu_k[-1], kv_heads, depth), (cu_k[-1], kv_heads, v_depth)
    arrays = [normal(shape, dtype, 1.5, n) for shape, n in zip(shapes, "qkv", strict=True)]
    return *arrays, cu_q, cu_k


def sequences(q, k, v, cu_q, cu_k, options):
    """The place of each sequence's queries; its arrays and options, as attention takes them."""
    lengths = np.diff(cu_q), np.diff(cu_k)
    scores = len(lengths[0]), q.shape[1], *(side.max(initial=0) for side in lengths)
    for i, (n_queries, n_keys) in enumerate(zip(*lengths, strict=True)):
        queries, keys = slice(*cu_q[i : i + 2]), slice(*cu_k[i : i + 2])
        part = dict(options)
        for name in ("mask", "bias"):
            if name in options:
                part[name] = np.broadcast_to(options[name], scores)[i, :, :n_queries, :n_keys]
        for name in PER_SEQUENCE:
            if np.ndim(options.get(name, 0)):
                part[name] = options[name][i]
        arrays = (q[queries], k[keys], v[keys])
        yield queries, [a.swapaxes(0, 1) for a in arrays], part


def assert_as_in_a_loop(arguments, options, what=""):
    out, lse = fs.attention_varlen(*arguments, **options, return_lse=True)
    assert_same_bits(fs.attention_varlen(*arguments, **options), out, what)
    for queries, arrays, part in sequences(*arguments, options):
        want = fs.attention(*arrays, **part, return_lse=True)
        assert_same_bits(out[queries], want[0].swapaxes(0, 1), what)
        assert_same_bits(lse[queries], want[1].swapaxes(0, 1), what)


def padded(lengths):
    """The batch that masks, biases and the options of each sequence are those of."""
    queries, keys = np.max(lengths, 0)
    return Size((len(lengths),), HEADS, KV_HEADS, int(queries), int(keys), DEPTH, V_DEPTH)


FORMS = [(name, form) for name, forms in ATTENTION_OPTIONS.items() for form in forms]


@lru_cache(maxsize=1)  # millions of random numbers, the same for every dtype and ISA
def options_of(name, form):
    options = {name: ATTENTION_OPTIONS[name][form](rng("varlen", name, form), padded(LENGTHS))}
    if name == "kv_lengths":
        options[name] = np.minimum(options[name], [keys for _, keys in LENGTHS])
    if name == "q_offset":
        options["is_causal"] = True
    return options


@every_dtype
@pytest.mark.parametrize("name, form", FORMS, ids=lambda s: s or "True")
def test_bits_of_a_loop(isa, dtype, name, form):
    assert_as_in_a_loop(packed(LENGTHS, dtype), options_of(name, form))


@every_dtype
def test_options_together_and_threads(isa, dtype):
    for trial in range(2):
        r = rng("together", trial)
        lengths = [LENGTHS[i] for i in r.integers(0, len(LENGTHS), 12)]
        options = {}
        for name in ATTENTION_OPTIONS:
            if r.random() < 0.4:
                options[name] = some_option(name, r, padded(lengths))
        if "kv_lengths" in options:
            options["kv_lengths"] = np.minimum(options["kv_lengths"], [k for _, k in lengths])
        for threads in (1, 2, 5):
            with fs.num_threads(threads):
                assert_as_in_a_loop(packed(lengths, dtype), options, (trial, threads, options))


@every_dtype
@pytest.mark.parametrize(
    "lengths",
    [[(1, 8), (1, 20), (1, 0), (1, 130)], [(3, 1), (9, 1), (0, 1)], [(1, 1)] * 3, [(0, 1), (1, 1)]],
    ids=str,
)
def test_single_rows(isa, dtype, lengths):
    """No sequence has a second query, or a second key: NumPy keeps no stride for these."""
    assert_as_in_a_loop(packed(lengths, dtype), {})


@pytest.mark.parametrize("threads", [1, 4])
def test_many_slices(isa, threads):
    """More tasks than a slice holds, of both kinds; the last chunk of heads is smaller."""
    lengths = [(1, 40 + 90 * (i % 9)) for i in range(150)] + [(2, 30)] * 100 + [(1, 3000)]
    with fs.num_threads(threads):
        assert_as_in_a_loop(packed(lengths, F32, 19, 1, 3, 2), {"is_causal": True, "q_offset": 40})


def test_uneven_lengths(isa):
    """What the threads take from one line: a long sequence amid many short ones."""
    lengths = [(16, 16)] * 30 + [(700, 700)] + [(16, 16)] * 30
    with fs.num_threads(3):
        assert_as_in_a_loop(packed(lengths, F32, 2, 2, 16, 16), {"is_causal": True})


@pytest.mark.parametrize("lengths", [[], NONE, NONE * 3, [(0, 4)], [(4, 0)]], ids=str)
def test_nothing_to_see(isa, lengths):
    q, k, v, *_ = packed(lengths or NONE, F32)
    starts = starts_of(lengths) if lengths else ([0], [0])
    out, lse = fs.attention_varlen(q, k, v, *starts, return_lse=True)
    assert out.shape == (len(q), HEADS, V_DEPTH) and lse.shape == (len(q), HEADS)
    assert not out.any() and (lse == -np.inf).all()


@every_dtype
def test_against_the_oracle(isa, dtype, record_max):
    arguments = packed(LENGTHS, dtype)
    options = {"is_causal": True, "q_offset": np.array([k - q for q, k in LENGTHS]), "softcap": 9.0}
    out, lse = fs.attention_varlen(*arguments, **options, return_lse=True)
    true = reference.attention_varlen(*arguments, **options, return_lse=True)
    for queries, arrays, part in sequences(*arguments, options):
        if not out[queries].size:
            continue
        case = Attention(*arrays, **part)
        alone = reference.attention(*arrays, **part, return_lse=True)
        for oracle, want in zip(true, alone, strict=True):
            assert_same_bits(oracle[queries].swapaxes(0, 1), want)
        results = out[queries].swapaxes(0, 1), lse[queries].swapaxes(0, 1), None
        case.check(record_max, "attention_varlen", results=results)


def test_other_sequences_leave_no_trace(isa):
    arguments = packed(LENGTHS, F32)
    want = fs.attention_varlen(*arguments)
    q, k, v, cu_q, cu_k = arguments
    for i in (3, 4, 6):
        others = np.ones(cu_k[-1], bool)
        others[cu_k[i] : cu_k[i + 1]] = False
        k, v = arguments[1].copy(), arguments[2].copy()
        k[others], v[others] = np.nan, np.inf
        queries = slice(cu_q[i], cu_q[i + 1])
        assert_same_bits(fs.attention_varlen(q, k, v, cu_q, cu_k)[queries], want[queries])


@pytest.mark.parametrize("at", ["start", "end"])
def test_guard_pages(isa, at):
    *arrays, cu_q, cu_k = packed(LENGTHS, F32)
    want = fs.attention_varlen(*arrays, cu_q, cu_k)
    guarded = [GuardedPages(a.nbytes).copy_of(a, at) for a in (*arrays, want)]
    guarded[3][...] = 7
    fs.attention_varlen(*guarded[:3], cu_q, cu_k, out=guarded[3])
    assert_same_bits(guarded[3], want)


def test_out_strides_and_overlap(isa):
    q, k, v, *starts = packed(LENGTHS, F32, 2, 2, 8, 8)
    want = fs.attention_varlen(q, k, v, *starts)
    out = np.full((len(q), 2, 16), 7, F32)[..., ::-2]
    assert fs.attention_varlen(q, k, v, *starts, out=out) is out
    assert_same_bits(out, want)
    views = [np.asfortranarray(a)[:, ::-1][:, ::-1] for a in (q, k, v)]
    assert_same_bits(fs.attention_varlen(*views, *starts), want)
    for shared in range(3):
        arrays = [a.copy() for a in (q, k, v)]
        target = np.zeros((max(len(q), len(k)), 2, 8), F32)
        target[: len(arrays[shared])] = arrays[shared]
        arrays[shared] = target[: len(arrays[shared])]
        assert_same_bits(fs.attention_varlen(*arrays, *starts, out=target[: len(q)]), want)
    for integers in (np.int32, np.uint64, list):
        other = [list(s) if integers is list else s.astype(integers) for s in starts]
        assert_same_bits(fs.attention_varlen(q, k, v, *other), want)


WRONG = [
    ({"cu_q": [0, 2.0, 4]}, TypeError, "cu_seqlens_q must be an array of integers"),
    ({"cu_k": [False, True]}, TypeError, "cu_seqlens_k must be an array of integers"),
    ({"cu_k": np.ma.array([0, 2, 6])}, TypeError, "cu_seqlens_k must be an array of integers"),
    ({"cu_q": [[0, 4]]}, ValueError, r"cu_seqlens_q must have shape \(sequences \+ 1,\)"),
    ({"cu_q": np.zeros(0, int)}, ValueError, "cu_seqlens_q must have shape"),
    ({"cu_q": 4}, ValueError, "cu_seqlens_q must have shape"),
    ({"cu_q": [1, 2, 4]}, ValueError, "cu_seqlens_q must begin with 0 and end with 4"),
    ({"cu_k": [0, 2, 5]}, ValueError, "cu_seqlens_k must begin with 0 and end with 6"),
    ({"cu_k": [0, 2, 7]}, ValueError, "cu_seqlens_k must begin with 0 and end with 6"),
    ({"cu_q": [0, 5, 4]}, ValueError, "cu_seqlens_q must not decrease, got 5 and then 4"),
    ({"cu_k": np.array([0, 2**64 - 1, 6], np.uint64)}, ValueError, "cu_seqlens_k must not decrea"),
    ({"cu_q": [0, -1, 4]}, ValueError, "cu_seqlens_q must not decrease"),
    ({"cu_q": [0, 1, 2, 4]}, ValueError, "must have the same length"),
    ({"q": np.zeros((4, 8), F32)}, ValueError, "q must have shape"),
    ({"v": np.zeros((5, 2, 8), F32)}, ValueError, "same number of keys"),
    ({"k": np.zeros((6, 3, 8), F32)}, ValueError, "number of heads"),
    ({"k": np.zeros((6, 2, 8), F64)}, TypeError, "same dtype"),
    ({"kv_lengths": [3, 1]}, ValueError, "kv_lengths .* got 3 for sequence 0, which has 2"),
    ({"kv_lengths": 3}, ValueError, "kv_lengths .* got 3 for sequence 0, which has 2"),
    ({"kv_lengths": [1, 1, 1]}, ValueError, "kv_lengths"),
    ({"q_offset": [1, 1, 1]}, ValueError, "q_offset"),
    ({"mask": np.ones((3, 3), bool)}, ValueError, "mask"),
    ({"bias": np.ones((2, 2), bool)}, TypeError, "bias"),
    ({"out": np.zeros((4, 2, 7), F32)}, ValueError, "out has shape"),
    ({"out": np.zeros((4, 2, 8), BF16)}, TypeError, "out must have the dtype of q"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG)
def test_errors(wrong, error, message):
    right = {
        "q": np.zeros((4, 2, 8), F32),
        "k": np.zeros((6, 2, 8), F32),
        "v": np.zeros((6, 2, 8), F32),
        "cu_q": [0, 1, 4],
        "cu_k": [0, 2, 6],
        "out": np.full((4, 2, 8), 7, F32),
    }
    call = right | wrong
    arrays = [call.pop(name) for name in ("q", "k", "v", "cu_q", "cu_k")]
    with pytest.raises(error, match=message):
        fs.attention_varlen(*arrays, **call)
    assert (right["out"] == 7).all()
