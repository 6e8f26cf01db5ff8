"""Sizes beyond any memory: broadcast views can have as many elements as an index counts, and their
products more. A result is right, or there is an exception; never a size that wrapped around."""

import signal
import sys

import numpy as np
import pytest
from common import assert_same_bits

import fastsoftmax as fs
from fastsoftmax import ufuncs
from fastsoftmax.compat import torch as compat

MOST = sys.maxsize
SIZES = (2**31 + 1, 2**32 + 3, 2**40, 2**58, 2**59, 2**60, 2**61 - 1)

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")


def ones(dtype, *shape):
    """An array of that many elements, in the memory of one."""
    return np.broadcast_to(np.ones((), dtype), shape)


class Interrupted(Exception):
    pass


@pytest.fixture
def soon():
    """An exception after a twentieth of a second, in what would run for years."""

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@needs_timer
@pytest.mark.parametrize("shape", [(MOST,), (MOST - 1,), (MOST - 2**13,), (3, MOST // 3),
                                   (2,) * 62, (17, 17, MOST // 289)])  # fmt: skip
@pytest.mark.parametrize("call", [fs.logsumexp, lambda x: fs.logsumexp(x, where=ones(bool, 1))])
def test_as_many_elements_as_an_index_counts(isa, soon, shape, call):
    """They are being summed, when it ends."""
    with pytest.raises(Interrupted):
        call(ones(np.int8, *shape))


@needs_timer
@pytest.mark.parametrize("shape", [(MOST // 16, 2), (2, MOST // 16)])
def test_as_many_rows_as_an_index_counts(isa, soon, shape):
    with pytest.raises(MemoryError):
        fs.logsumexp(ones(np.int8, *shape), shape.index(2))
    with pytest.raises(Interrupted):
        fs.logsumexp(ones(np.int8, *shape))


@pytest.mark.parametrize("n", SIZES)
def test_columns_without_scratch(isa, n):
    """Heads as wide as that want scratch as wide; its size in bytes does not fit a word."""
    for wide in (n, n + 1, n - n // 16):
        if wide * 4 > MOST or wide < 2**38:
            continue  # what memory there is may do for these
        row, no_key = ones("f4", 1, wide), ones("f4", 0, wide)
        v, lse = np.ones((1, 1), "f4"), np.zeros(1, "f4")
        for threads in (1, 1024):
            with fs.num_threads(threads):
                with pytest.raises(MemoryError):
                    fs.attention(row, row, v)
                with pytest.raises((MemoryError, ValueError)):
                    fs.attention(ones("f4", 2, wide), row, v)
                with pytest.raises(MemoryError):
                    fs.attention(row, no_key, v[:0])
                with pytest.raises(MemoryError):
                    fs.attention(v, v, row)
                with pytest.raises(MemoryError):
                    fs.attention_backward(v, row, row, v, v, lse)
                with pytest.raises(MemoryError):
                    fs.attention_backward(row, v, v, row, row, lse)
                with pytest.raises(MemoryError):
                    fs.attention_varlen(row[:, None], row[:, None], v[:, None], [0, 1], [0, 1])


@pytest.mark.parametrize("n", SIZES)
def test_queries_and_keys_without_columns(isa, n):
    """Nothing is computed of results that have no elements."""
    q, v = ones("f4", n, 1), ones("f4", n, 0)
    assert fs.attention(q, q[:1], v[:1]).shape == (n, 0)
    assert fs.attention(q[:1], q, v).shape == (1, 0)
    assert fs.attention(q, q, v).shape == (n, 0)
    for axis in range(3):  # queries, heads, leading dimension
        many, one = (np.expand_dims(a, (1, 2, 3)).swapaxes(0, 3 - axis) for a in (q, q[:1]))
        assert fs.attention(many, one, one[..., :0]).size == 0
    packed = ones("f4", n, 1, 1)
    assert fs.attention_varlen(packed, packed[:1], packed[:1, :, :0], [0, n], [0, 1]).size == 0
    assert compat.scaled_dot_product_attention(q, q, v).shape == (n, 0)
    with pytest.raises((MemoryError, ValueError)):
        fs.attention(q, q, v, return_weights=True)
    if n > 2**36:
        with pytest.raises(MemoryError):
            fs.attention(q, q[:1], q[:1])
        with pytest.raises(MemoryError):
            fs.attention(q, q[:1], v[:1], return_lse=True)
        with pytest.raises(MemoryError):
            fs.attention_backward(v, q, q[:1], v[:1], v, q[:, 0])


@pytest.mark.parametrize("n", SIZES)
def test_leading_dimensions_that_multiply(isa, n):
    a, b = ones("f4", n, 1, 1, 1, 1), ones("f4", 1, n, 1, 1, 1)
    for empty in (1, 0):
        with pytest.raises(ValueError):
            fs.attention(a, b, b[..., :empty])
    assert fs.attention(a[:0], b, b).shape == (0, n, 1, 1, 1)
    with pytest.raises(ValueError):
        compat.scaled_dot_product_attention(a, b, b)


@pytest.mark.parametrize("n", SIZES[:2])
def test_more_keys_than_32_bits_count(isa, n):
    k, three = ones("f4", n, 1), np.ones((3, 1), "f4")
    for queries in (1, 2):
        q = np.ones((queries, 1), "f4")
        want = fs.attention(q, three, three, return_lse=True)
        for got in (
            fs.attention(q, k, k, kv_lengths=3, return_lse=True),
            fs.attention(q, k, k, kv_lengths=3, mask=ones(bool, n), return_lse=True),
            fs.attention(q, k, k, kv_lengths=3, bias=np.zeros(1), return_lse=True),
        ):
            assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
        q_offset = n - 1
        out, lse = fs.attention(q, k, k, is_causal=True, q_offset=q_offset, window=(2, 0),
                                return_lse=True)  # fmt: skip
        assert (out == 1).all() and np.allclose(lse, np.log([3, 2][:queries]) + 1, rtol=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_empty_rows_and_no_rows(isa, n):
    for dtype in ("f2", "f4", "i1") if n < 2**60 else ("f2", "f4"):  # integers become float64
        for function in (fs.softmax, fs.log_softmax, fs.softmin, ufuncs.softmax):
            assert function(ones(dtype, n, 0)).shape == (n, 0)
            assert function(ones(dtype, 0, n)).shape == (0, n)
        assert fs.logsumexp(ones(dtype, 0, n), -1).shape == (0,)
        assert ufuncs.logsumexp(ones(dtype, 0, n)).shape == (0,)
        if n > 2**36:
            with pytest.raises((MemoryError, ValueError)):
                fs.logsumexp(ones(dtype, n, 0), -1)
            with pytest.raises((MemoryError, ValueError)):
                fs.softmax(ones(dtype, n))
    no_label = np.zeros(0, int)
    assert np.isnan(fs.cross_entropy(ones("f4", 0, n), no_label))
    assert fs.cross_entropy_backward(1, ones("f4", 0, n), no_label).shape == (0, n)
    assert fs.merge_attention(*[ones("f4", 0, n), ones("f4", 0)] * 2)[0].shape == (0, n)


@needs_timer
def test_ufuncs_of_many_empty_rows_can_be_interrupted(isa, soon):
    out = np.broadcast_to(np.empty((), "f4"), 2**28)
    out.flags.writeable = True
    with pytest.raises(Interrupted):
        ufuncs.logsumexp(ones("f4", 2**28, 0), out=out)


@pytest.mark.full
def test_more_than_two_to_the_31_elements(isa):
    """A view of one number: no memory, all the index arithmetic."""
    n = 2**31 + 5
    one = ones("f4", n)
    want = 1 + np.log(np.float64(n))
    for got in (
        fs.logsumexp(one),
        fs.logsumexp(one.reshape(1, n), -1)[0],
        ufuncs.logsumexp(one),
        fs.cross_entropy(one, 2**31 + 1, reduction="none") + 1,
    ):
        assert abs(float(got) - want) <= np.spacing(np.float32(want))


@pytest.mark.full
def test_a_sparse_file_of_more_than_two_to_the_31_elements(isa, tmp_path):
    """4 GB of address space, of which a few pages are written: each element where it belongs."""
    n = 2**31 + 2**20
    x = np.memmap(tmp_path / "sparse", np.float16, "w+", shape=n)
    at = [0, 2**30, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    x[at] = 20 + np.arange(6)
    terms = np.exp(20.0 + np.arange(6))
    want = np.log(terms.sum() + n - 6)
    assert abs(float(fs.logsumexp(x, dtype=np.float32)) - want) <= np.spacing(np.float32(want))
    assert abs(float(fs.cross_entropy(x, n - 1)) - (want - 25)) <= np.spacing(np.float16(1))
    table = x.reshape(-1, 1024)
    got, touched = fs.logsumexp(table, -1), np.unique(np.array(at) // 1024)
    assert_same_bits(got[touched], fs.logsumexp(table[touched], -1))
    assert (np.delete(got, touched) == fs.logsumexp(np.zeros(1024, np.float16))).all()
    columns = x.reshape(2, -1)  # the axis first
    got, touched = fs.logsumexp(columns, 0), np.unique(np.array(at) % (n // 2))
    assert_same_bits(got[touched], fs.logsumexp(columns[:, touched], 0))
    assert np.count_nonzero(got != fs.logsumexp(np.zeros(2, np.float16))) == touched.size
