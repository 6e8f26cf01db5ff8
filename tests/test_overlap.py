"""`out` anywhere in the memory of the arguments: as if they had been copied before.

After numpy/_core/tests/test_mem_overlap.py: views of one buffer, drawn at random, that are shifted,
reversed, transposed, with gaps, at odd addresses, of other types. The cases of names are in
test_out.py. What is right is what the same call makes of copies.
"""

import numpy as np
import pytest
from common import BF16, F32, F64, FLOATS, assert_same_bits, normal, rng

import fastsoftmax as fs
from fastsoftmax import ufuncs

BYTES = 1 << 15


def view(g, buffer, shape, dtype):
    """An array of that shape somewhere in the buffer."""
    order = g.permutation(len(shape))
    steps = g.choice([1, 1, 1, -1, -1, 2, -3], len(shape))
    extent = [shape[k] * abs(steps[k]) for k in order]
    size = int(np.prod(extent, dtype=int)) * np.dtype(dtype).itemsize
    start = g.integers(0, len(buffer) - size + 1)
    start -= start % g.choice([1, 2, 8])
    flat = buffer[start : start + size].view(dtype)
    base = flat.reshape(extent).transpose(np.argsort(order))
    return base[(*(slice(None, None, step) for step in steps), ...)]


def outcome(call, arguments, named, **options):
    try:
        return call(*arguments, **named, **options)
    except ValueError as error:  # a temperature that is not above 0
        return str(error)


def check(g, buffer, call, arguments, out, named=(), **options):
    """The arguments are views already, or (shape, dtype) to be drawn like `out`."""

    def drawn(a):
        return view(g, buffer, *a) if isinstance(a, tuple) else a

    before = buffer.copy()
    arguments = [drawn(a) for a in arguments]
    named = {name: drawn(a) for name, a in dict(named).items()}
    # Bytes that are no bool are as good as any: NumPy's copies keep them.
    copies = [a.copy() for a in arguments], {name: a.copy() for name, a in named.items()}
    y = view(g, buffer, *out)
    outside = before.copy()
    want = outcome(call, *copies, **options, out=np.empty(*out))
    got = outcome(call, arguments, named, **options, out=y)
    what = call.__name__, [a.strides for a in arguments], y.strides, options
    if isinstance(want, str):
        assert got == want
        assert (buffer == before).all(), (what, "an error, and out was modified")
        return 0
    assert got is y, what
    assert_same_bits(y, want, what)
    y.view(f"u{y.itemsize}")[...] = 0  # what else has changed?
    z = outside[y.ctypes.data - _first(y) - buffer.ctypes.data :][: _reach(y)]
    np.lib.stride_tricks.as_strided(
        z[_first(y) :][: y.itemsize].view(f"u{y.itemsize}"), y.shape, y.strides
    )[...] = 0
    assert (buffer == outside).all(), (what, "wrote beside out")
    return 1


def _first(a):
    """Bytes from the lowest address of an array to its first element."""
    return sum(-s * (n - 1) for s, n in zip(a.strides, a.shape, strict=True) if s < 0)


def _reach(a):
    return sum(abs(s) * (n - 1) for s, n in zip(a.strides, a.shape, strict=True)) + a.itemsize


def filled(g):
    """Numbers of moderate size, whatever they are read as."""
    values = g.normal(0, 3, BYTES // 2).astype(BF16)
    return values.view(np.uint8).copy()


@pytest.mark.parametrize("draws", [100, pytest.param(5000, marks=pytest.mark.full)])
def test_softmax_and_its_kin(isa, draws):
    done = 0
    for number in range(draws):
        g = rng("overlap", number)
        buffer, dtype = filled(g), FLOATS[g.integers(4)]
        dims = g.integers(1, 4)
        shape = tuple(g.integers(1, {1: 300, 2: 12, 3: 6}[dims], dims).tolist())
        axis, result = int(g.integers(len(shape))), FLOATS[g.integers(4)]
        x, out = (shape, dtype), (shape, dtype if number % 3 else result)
        one = tuple(1 if k == axis else n for k, n in enumerate(shape))
        reduced = shape[:axis] + shape[axis + 1 :]
        masks = {"bias": (shape[1:], F32), "where": (shape, np.bool_)}
        done += check(g, buffer, fs.softmax, [x], out, axis=axis)
        done += check(g, buffer, fs.log_softmax, [x], out, masks, axis=axis)
        check(g, buffer, fs.softmin, [x], out, {"temperature": (one, F32)}, axis=axis)
        done += check(g, buffer, fs.logsumexp, [x], (reduced, result), axis=axis)
        weights = {"b": (shape, dtype), "where": (shape[1:], np.bool_)}
        done += check(g, buffer, fs.logsumexp, [x], (reduced, result), weights, axis=axis)
        done += check(g, buffer, fs.softmax_backward, [x, x], out, axis=axis)
        done += check(g, buffer, fs.log_softmax_backward, [x, x], out, axis=axis)
        done += check(g, buffer, ufuncs.softmax, [x], x, axis=axis)
        done += check(g, buffer, ufuncs.logsumexp, [x], (reduced, dtype), axis=axis)
        labels, grad = np.arange(int(np.prod(reduced))).reshape(reduced) % shape[axis], np.ones(1)
        arguments = [grad[0], x, labels]
        done += check(g, buffer, fs.cross_entropy_backward, arguments, out, axis=axis)
    assert done == 9 * draws


@pytest.mark.parametrize("draws", [100, pytest.param(5000, marks=pytest.mark.full)])
def test_attention(isa, draws):
    for number in range(draws):
        g = rng("overlap of attention", number)
        buffer, dtype = filled(g), FLOATS[g.integers(4)]
        groups, share, queries, keys, depth, v_depth = g.integers(0, [2, 2, 6, 6, 4, 4]) + 1
        queries = 1 if number % 4 == 0 else queries
        heads = groups * share
        arrays = [((heads, queries, depth), dtype), ((groups, keys, depth), dtype),
                  ((groups, keys, v_depth), dtype)]  # fmt: skip
        out = (heads, queries, v_depth), dtype
        named = {"mask": ((queries, keys), np.bool_), "bias": ((heads, 1, keys), F32),
                 "sinks": ((heads,), F32), "alibi_slopes": ((heads,), F32)}  # fmt: skip
        some = {name: a for name, a in named.items() if g.random() < 0.5}
        assert check(g, buffer, fs.attention, arrays, out)
        assert check(g, buffer, fs.attention, arrays, out, some, is_causal=bool(number % 2))
        packed = [((n, h, c), dtype) for (h, n, c), dtype in arrays]
        starts = np.array([0, queries // 2, queries]), np.array([0, keys // 2, keys])
        out = (queries, heads, v_depth), dtype
        some.pop("mask", None), some.pop("bias", None)
        assert check(g, buffer, fs.attention_varlen, [*packed, *starts], out, some)


@pytest.mark.parametrize(
    "name", ["q", "k", "v", "bias", "mask", "sinks", "alibi_slopes", "q_offset", "kv_lengths"]
)
def test_out_is_the_memory_of_one_argument(isa, name):
    """Each by itself, so that none is copied because of another."""
    for queries in (1, 6):
        q, k, v = (normal((2, n, 8), F64, 1.0, s) for n, s in ((queries, "q"), (8, "k"), (8, "v")))
        buffer = np.zeros(2 * 8 * 8)
        arguments = {"q": q, "k": k, "v": v}
        scores = np.ones((2, queries, 8))
        arguments |= {
            "bias": {"bias": normal(scores.shape, F64)},
            "mask": {"mask": scores > 0},
            "sinks": {"sinks": np.ones(2)},
            "alibi_slopes": {"alibi_slopes": np.ones(2)},
            "q_offset": {"q_offset": np.array(3)},
            "kv_lengths": {"kv_lengths": np.array(3)},
        }.get(name, {})
        a = np.asarray(arguments[name])
        shared = buffer.view(a.dtype)[: a.size].reshape(a.shape)
        shared[...] = a
        out = buffer[: q.size].reshape(q.shape)
        by_name = {n: x for n, x in arguments.items() if len(n) > 1}
        want = fs.attention(q, k, v, **by_name)
        arguments[name] = shared
        by_name = {n: x for n, x in arguments.items() if len(n) > 1}
        got = fs.attention(*(arguments[n] for n in "qkv"), **by_name, out=out)
        assert_same_bits(got, want, queries)
