"""As test_guard_pages.py, for arrays with gaps, backwards and broadcast: all arguments of a call
have the same step between elements and lie against an untouchable page.

Every length from 0 to 257 with `make full`; else those on each side of vectors and blocks.
"""

import functools

import numpy as np
import pytest
from common import F32, GuardedPages, assert_same_bits, every_dtype, normal, rng

import fastsoftmax as fs
from fastsoftmax import ufuncs

STEPS = (2, -1, -3, 0)
SOME = 0, 1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129, 257
REST = [n for n in range(258) if n not in SOME]

every_length = pytest.mark.parametrize(
    "lengths", [SOME, pytest.param(REST, marks=pytest.mark.full)], ids=["some", "rest"]
)
every_step = pytest.mark.parametrize("step", STEPS)
both_ends = pytest.mark.parametrize("at", ["start", "end"])


@functools.cache
def pages_of(name):
    return GuardedPages(1 << 17)


def room(name, shape, dtype, step, at):
    """What lies beside the guard for an array of this shape, and the gaps between its elements."""
    *outer, n = shape
    return pages_of(name).array((*outer, abs(step) * (n - 1) + 1 if n else 0), np.dtype(dtype), at)


def blank(name, shape, dtype, step, at):
    """An array beside the guard, of which one element in `step` belongs to the view returned."""
    step = step or 1  # an output cannot be broadcast
    whole = room(name, shape, dtype, step, at)
    whole.view(np.uint8)[...] = 0x7F
    return whole[..., ::step]


def guarded(name, a, step, at):
    """The values of `a` there; with a step of 0 the first of each row instead."""
    if not a.ndim:
        return pages_of(name).copy_of(a, at)
    if step or not a.shape[-1]:
        view = blank(name, a.shape, a.dtype, step, at)
        view[...] = a
        return view
    one = blank(name, (*a.shape[:-1], 1), a.dtype, 1, at)
    one[...] = a[..., :1]
    return np.broadcast_to(one, a.shape)


def check(function, arrays, step, at, out=None, named=(), **options):
    """Call with all `arrays`, by position, and those `named` guarded, and `out` of this shape and
    dtype; compare with a call of copies in ordinary memory."""
    there = {k: guarded(k, np.asarray(a), step, at) for k, a in enumerate(arrays)}
    by_name = {name: guarded(name, a, step, at) for name, a in dict(named).items()}
    here = {name: a.copy() for name, a in by_name.items()}
    want = function(*(a.copy() for a in there.values()), **here, **options)
    if out is not None:
        by_name["out"] = blank("out", *out, step, at)
    got = function(*there.values(), **by_name, **options)
    parts = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    for g, w in zip(*parts, strict=True):
        assert_same_bits(g, w, (function.__name__, step, options))
    if out is not None and abs(step) > 1 and out[0][-1]:
        whole = room("out", *out, step, at)
        between = np.ones(whole.shape[-1], bool)
        between[::step] = False
        gaps = np.ascontiguousarray(whole[..., between]).view(np.uint8)
        assert (gaps == 0x7F).all(), "wrote between the elements of out"


@both_ends
@every_step
@every_length
@every_dtype
def test_softmax_and_its_kin(isa, dtype, lengths, step, at):
    for n in lengths:
        shape = (2, n)
        x, y, bias = normal(shape, dtype), normal(shape, dtype, 1.0, "y"), normal(shape, F32)
        where, axis, out = x > -2, -1 if n % 3 else 0, (shape, dtype)
        labels = np.arange(2) % max(n, 1) if axis else np.arange(n) % 2
        rows = (2,) if axis else (n,)
        masks = {"bias": bias, "where": where}
        check(fs.softmax, [x], step, at, out, axis=axis)
        check(fs.log_softmax, [x], step, at, out, {"bias": bias}, axis=axis)
        check(fs.softmin, [x], step, at, out, masks, axis=axis)
        check(fs.logsumexp, [x], step, at, (rows, dtype), axis=axis)
        check(fs.logsumexp, [x], step, at, None, {"b": bias, "where": where}, axis=axis)
        check(fs.softmax_backward, [y, x], step, at, out, axis=axis)
        check(fs.log_softmax_backward, [y, x], step, at, out, axis=axis)
        check(ufuncs.softmax, [x], step, at, out, axis=axis)
        check(ufuncs.logsumexp, [x], step, at, (rows, dtype), axis=axis)
        if n and (axis or step):
            check(fs.cross_entropy, [x, labels], step, at, axis=axis, reduction="none")
            check(fs.cross_entropy_backward, [x[0, 0], x, labels], step, at, out, axis=axis)


@both_ends
@every_step
@every_length
@every_dtype
def test_attention_and_its_kin(isa, dtype, lengths, step, at):
    """As many keys, queries, or columns."""
    for n in lengths:
        sizes = (3, n, 5, 2), (n, 3, 2, 5), (2, 3, n + 1, 3), (1, n, 3, 4)
        queries, keys, depth, v_depth = sizes[n % 4]
        r = rng("strides", n)
        q, k, v, grad = (
            r.normal(0, 1, (2, *shape)).astype(dtype)
            for shape in ((queries, depth), (keys, depth), (keys, v_depth), (queries, v_depth))
        )
        masks = {"mask": r.random((queries, keys)) < 0.8, "bias": r.normal(0, 1, (queries, keys))}
        out = grad.shape, dtype
        check(fs.attention, [q, k, v], step, at, out)
        check(fs.attention, [q, k, v], step, at, out, masks, is_causal=True, return_weights=True)
        seen = (guarded(name, a, step, at) for name, a in enumerate((q, k, v)))
        y, lse = fs.attention(*seen, return_lse=True)
        check(fs.attention_backward, [grad, q, k, v, y, lse], step, at)
        check(fs.merge_attention, [y, lse, grad, lse], step, at)
        packed = [a.swapaxes(0, 1) for a in (q, k, v)]
        out = (queries, 2, v_depth), dtype
        starts = [0, queries // 2, queries], [0, keys // 3, keys]

        def varlen(q, k, v, out=None, starts=starts):
            return fs.attention_varlen(q, k, v, *starts, out=out)

        check(varlen, packed, step, at, out)
