"""Kinds of calls for the fuzzer (fuzz.py): attention, its gradients and what goes with it."""

import numpy as np
from common import (
    EPSILON,
    F32,
    F64,
    FLOATS,
    HALVES,
    SMALLEST_SUBNORMAL,
    WIDE,
    Attention,
    assert_same_bits,
    compute_type,
    one_ulp,
    relative_to,
)
from fuzz_draw import Case, native
from test_attention_varlen import sequences

import fastsoftmax as fs
import fastsoftmax.compat.torch
from fastsoftmax import reference, reference_gradients


def at_most(name, errors, bound, what="", unit="ulp"):
    worst = float(np.max(errors, initial=0.0))
    assert worst <= bound, f"{name}: error {worst:.4g} {unit}, bound {bound:.4g}"


def attention_arrays(d):
    """q, k, v; leading dimensions; shape of the scores."""
    dtype = d.one_of(*FLOATS)
    lead = tuple(d.integer(1, 2) for _ in range(d.integer(0, 2)))
    kv_heads, group = d.integer(1, 2), d.integer(1, 3)
    queries, keys = d.one_of(1, 1, d.integer(0, 9), 17), d.one_of(d.integer(0, 9), 20, 65)
    depth, v_depth = d.integer(1, 9), d.one_of(d.integer(0, 9), 17)
    ends = (kv_heads * group, queries, depth), (kv_heads, keys, depth), (kv_heads, keys, v_depth)
    shapes = [d.part_of(lead) + end for end in ends]
    if single := kv_heads == group == 1 and d.chance(0.5):
        shapes = [end[1:] for end in ends]
    scale = d.one_of(0.3, 1.0, 2.0)
    q, k, v = (d.numbers(shape, dtype, scale) for shape in shapes)
    lead = () if single else np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    scores = (queries, keys) if single else (*lead, kv_heads * group, queries, keys)
    return q, k, v, lead, scores


def attention_options(d, dtype, heads, lead, scores, keys):
    """Some of the options that all have; keys: of each sequence, or all."""
    options = {}

    def maybe(name, value, p=0.25):
        if d.chance(p):
            options[name] = value()

    def bias():
        a = d.one_of(0.0, 1.0, 10.0) * d.g.standard_normal(d.part_of(scores))
        a = np.where(d.g.random(a.shape) < d.one_of(0, 0.5), -np.inf, a)
        return d.laid_out(a, d.one_of(*FLOATS))

    def offset():
        at_the_end = scores[-1] - scores[-2]
        return d.one_of(at_the_end, -2, 2**62, -(2**62), d.g.integers(-5, 70, lead))

    def lengths():
        all_have = int(np.min(keys)) if np.size(keys) else 0
        return d.one_of(d.integer(0, all_have), d.g.integers(0, keys + 1, lead))

    maybe("mask", lambda: d.laid_out(d.g.random(d.part_of(scores)) < d.one_of(0.1, 0.9), bool))
    maybe("bias", bias)
    maybe("is_causal", lambda: True)
    maybe("q_offset", offset)
    maybe("kv_lengths", lengths)
    maybe("window", lambda: tuple(d.one_of(None, 0, d.integer(0, 70), 2**70) for _ in "lr"))
    maybe("scale", lambda: d.one_of(0.0, 0.1, 1, -0.5, np.float32(0.7)))
    maybe("softcap", lambda: d.one_of(0.5, 3, 50.0))
    maybe("sinks", lambda: d.numbers(heads, d.one_of(F32, F64, dtype), 3.0))
    if abs(np.max(np.abs(options.get("q_offset", 0)), initial=0)) < 2**32:
        maybe("alibi_slopes", lambda: d.numbers(heads, d.one_of(F32, F64), 0.1))
    if "kv_lengths" in options and np.ndim(options["kv_lengths"]) == 0:
        options["kv_lengths"] = int(options["kv_lengths"])
    return options


def natives(*arrays):
    """As the oracle takes them."""
    return [a.astype(native(a)) for a in map(np.asarray, arrays)]


def attention(d):
    q, k, v, lead, scores = attention_arrays(d)
    heads = scores[-3] if len(scores) > 2 else 1
    options = attention_options(d, q.dtype, heads, lead, scores, scores[-1])
    wanted = {"return_lse": d.chance(0.5), "return_weights": d.chance(0.5)}
    out, (q, k, v) = d.out((*scores[:-1], v.shape[-1]), native(q), q, k, v)

    def oracle(q, k, v, out=None, return_lse=False, return_weights=False, **options):
        return Attention(*natives(q, k, v), **options)

    def check(got, expected):
        got = list(got) if isinstance(got, tuple) else [got]
        assert len(got) == 1 + sum(wanted.values())
        results = [got.pop(0)]
        results += [got.pop(0) if asked else None for asked in wanted.values()]
        expected.check(at_most, "attention", results=results)

    options |= {key: value for key, value in wanted.items() if value}
    if out is not None:
        options["out"] = out
    return Case(fs.attention, {"q": q, "k": k, "v": v}, options, oracle, check)


def attention_varlen(d):
    dtype, n = d.one_of(*FLOATS), d.integer(0, 3)
    kv_heads, group, depth, v_depth = (d.integer(1, 2), d.integer(1, 3), d.integer(1, 9),
                                       d.one_of(d.integer(0, 9), 17))  # fmt: skip
    queries = np.array([d.one_of(0, 1, d.integer(1, 9), 17) for _ in range(n)], int)
    keys = np.array([d.one_of(0, d.integer(1, 9), 20, 65) for _ in range(n)], int)
    starts = [np.concatenate([[0], np.cumsum(a)]) for a in (queries, keys)]
    heads = kv_heads * group
    shapes = ((queries.sum(), heads, depth), (keys.sum(), kv_heads, depth),
              (keys.sum(), kv_heads, v_depth))  # fmt: skip
    scale = d.one_of(0.3, 1.0, 2.0)
    q, k, v = (d.numbers(shape, dtype, scale) for shape in shapes)
    scores = (n, heads, queries.max(initial=0), keys.max(initial=0))
    options = attention_options(d, dtype, heads, (n,), scores, keys)
    lse_too = d.chance(0.5)
    out, (q, k, v) = d.out((*q.shape[:2], v_depth), dtype, q, k, v)

    def oracle(q, k, v, cu_q, cu_k, out=None, return_lse=False, **options):
        options = {name: value for name, value in options.items() if value is not None}
        parts = sequences(*natives(q, k, v), cu_q, cu_k, options)
        return [(place, Attention(*arrays, **part)) for place, arrays, part in parts]

    def check(got, expected):
        out, lse = got if lse_too else (got, None)
        assert out.dtype == dtype and out.shape == (*q.shape[:2], v_depth)
        for place, sequence in expected:
            results = [None if a is None else a[place].swapaxes(0, 1) for a in (out, lse)]
            sequence.check(at_most, "attention_varlen", results=[*results, None])

    if lse_too:
        options["return_lse"] = True
    if out is not None:
        options["out"] = out
    arguments = {"q": q, "k": k, "v": v}
    for name, a in zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True):
        arguments[name] = d.one_of(a.tolist(), d.placed(a.astype(d.one_of(*"hilHIL"))))
    return Case(fs.attention_varlen, arguments, options, oracle, check)


def attention_backward(d):
    q, k, v, lead, scores = attention_arrays(d)
    dtype, heads = native(q), scores[-3] if len(scores) > 2 else 1
    options = attention_options(d, q.dtype, heads, lead, scores, scores[-1])
    out, lse = fs.attention(q, k, v, **options, return_lse=True)
    arrays = {"grad_out": d.numbers(out.shape, dtype), "q": q, "k": k, "v": v,
              "out": d.placed(out), "lse": d.placed(lse)}  # fmt: skip
    for name in ("bias", "sinks"):
        if name in options and d.chance(0.7):
            options[f"return_d{name}"] = True
    inner = compute_type(dtype)
    precise = WIDE if dtype == F64 else np.float64

    def oracle(*arrays, **options):
        arrays = natives(*arrays)
        true = reference_gradients.attention_backward(*arrays, **options, precise=precise)
        return true, reference_gradients.attention_backward_bound(*arrays, **options)

    def check(got, expected):
        likes = [q, k, v, *(options[n] for n in ("bias", "sinks") if f"return_d{n}" in options)]
        for a, like, true, bound in zip(got, likes, *expected, strict=True):
            assert a.dtype == native(like) and a.shape == like.shape == true.shape
            bound = bound + SMALLEST_SUBNORMAL[inner] * 1e4
            bound = bound + (one_ulp(true, a.dtype) if a.dtype != inner else 0)
            at_most("attention_backward", relative_to(bound, a, true), 1.0)

    return Case(fs.attention_backward, arrays, options, oracle, check)


def merge_attention(d):
    dtype, shape = d.one_of(*FLOATS), d.shape(3)
    columns, inner = d.one_of(0, 1, 3, 16, 33), compute_type(dtype)
    arrays = {}
    for half in "ab":
        lse = np.where(d.g.random(shape) < 0.2, -np.inf, 4 * d.g.standard_normal(shape))
        lse = np.where(d.g.random(shape) < d.one_of(0, 0.1), np.nan, lse)
        arrays[f"out_{half}"] = d.numbers((*shape, columns), dtype)
        arrays[f"lse_{half}"] = d.laid_out(lse, inner)

    def oracle(out_a, lse_a, out_b, lse_b):
        a, la, b, lb = natives(out_a, lse_a, out_b, lse_b)
        with np.errstate(all="ignore"):
            apart = np.nan_to_num(np.abs(la.astype(F64) - lb), nan=0.0, posinf=0.0)[..., None]
        size = np.abs(a.astype(F64)) + np.abs(b.astype(F64))
        return reference.merge_attention(a, la, b, lb, precise=WIDE), apart, size

    def check(got, expected):
        (true, true_lse), apart, size = expected
        out, lse = got
        assert out.dtype == dtype and lse.dtype == inner and np.shape(lse) == np.shape(true_lse)
        bound = EPSILON[inner] / 2 * (16 + 2 * apart) * size + 2 * SMALLEST_SUBNORMAL[inner]
        bound = bound + (one_ulp(true, dtype) if dtype in HALVES else 0)
        at_most("merge", relative_to(bound, out, true), 1.0)
        bound = EPSILON[inner] / 2 * (8 + 4 * np.maximum(1, np.abs(true_lse)))
        at_most("merge lse", relative_to(bound, np.asarray(lse), np.asarray(true_lse)), 1.0)

    return Case(fs.merge_attention, arrays, {}, oracle, check)


def compat_attention(d):
    q, k, v, _, scores = attention_arrays(d)
    options = {"enable_gqa": True}
    kind = d.one_of("none", "causal", "mask", "bias")
    if kind == "causal":
        options["is_causal"] = True
    if kind == "mask":
        options["attn_mask"] = d.laid_out(d.g.random(d.part_of(scores)) < 0.5, bool)
    if kind == "bias":
        options["attn_mask"] = d.numbers(d.part_of(scores), d.one_of(*FLOATS))
    if d.chance(0.3):
        options["scale"] = d.one_of(0.1, 2)

    def oracle(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
        mine = {}
        if attn_mask is not None:
            mine["mask" if np.asarray(attn_mask).dtype == bool else "bias"] = attn_mask
        return fs.attention(query, key, value, **mine, is_causal=is_causal, scale=scale)

    function = fastsoftmax.compat.torch.scaled_dot_product_attention
    arrays = {"query": q, "key": k, "value": v}
    return Case(function, arrays, options, oracle, assert_same_bits)


_OPTIONS = ("mask", "bias", "is_causal", "q_offset", "kv_lengths", "window", "scale", "softcap",
            "sinks", "alibi_slopes")  # fmt: skip
KINDS = {
    attention: (5, (*_OPTIONS, "out", "return_lse", "return_weights")),
    attention_varlen: (1.5, (*_OPTIONS, "out", "return_lse")),
    attention_backward: (1.5, (*_OPTIONS, "return_dbias", "return_dsinks")),
    merge_attention: (1, ()),
    compat_attention: (1, ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")),
}
