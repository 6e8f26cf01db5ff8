"""Constant memory, and not a byte beside the arrays.

The peak is measured in a process of its own (in one that has run tests it would hide in what they
needed); guard pages lie around all that a caller can pass.
"""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from common import (
    BF16,
    F16,
    F32,
    F64,
    HALVES,
    ISAS,
    GuardedPages,
    Size,
    assert_same_bits,
    compute_type,
    every_dtype,
    rng,
)

import fastsoftmax as fs

MB = 1 << 20
ALLOWED = 8.0  # MB above what the inputs and the output take

but_scalar = pytest.mark.parametrize(  # which takes its time
    "name", [pytest.param(n, marks=pytest.mark.full if n == "scalar" else ()) for n in ISAS]
)
needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc"
)

# --- the peak -------------------------------------------------------------------------------------

MEASURE = """
    import sys
    import numpy as np
    import ml_dtypes
    import fastsoftmax as fs
    from fastsoftmax import _core

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def numbers(*shape, dtype="f4"):
        # In place: a temporary array would raise the peak before the call.
        a = np.empty(shape, dtype)
        flat = a.reshape(-1, a.shape[-1])
        r = np.random.default_rng(len(flat))
        for start in range(0, len(flat), 256):
            flat[start : start + 256] = r.standard_normal(flat[start : start + 256].shape)
        return a

    def ones(*shape, dtype=bool):
        a = np.empty(shape, dtype)
        a[...] = 1
        return a

    def peak(function, *args, **kwargs):
        # MB above what lay there before; 1 MB as a sign that the measurement works.
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
        function(*args, **kwargs)
        return (status("VmHWM") - before) / 1024

    def attend(q, k, v, **kwargs):
        out = np.empty(q.shape[:-1] + v.shape[-1:], q.dtype)
        out[...] = 0
        shared = numbers(100, 8)
        fs.attention(shared, shared, shared)  # the threads are there
        return peak(fs.attention, q, k, v, out=out, **kwargs)

    def derive(q, k, v, **kwargs):
        # Without the results: the arrays that are returned, and for halves the same in float32.
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("return")}
        out, lse = fs.attention(q, k, v, **kwargs, return_lse=True)
        grad = numbers(*out.shape, dtype=out.dtype)
        arrays = []
        above = peak(lambda: arrays.extend(
            fs.attention_backward(grad, q, k, v, out, lse, **kwargs, **asked)))
        once = 1 if q.dtype.itemsize > 2 else 3
        return above - once * sum(a.nbytes for a in arrays) / 2**20

    def page_in(megabytes):
        np.empty(megabytes << 20, np.uint8).fill(1)
"""


def measured(isa, code):
    """What `code` prints: numbers, by name."""
    before = f"_core._use_isa({isa!r}).__enter__()\n"
    code = textwrap.dedent(MEASURE) + before + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    return {name: float(value) for name, value in lines}


@needs_proc
def test_the_measurement_measures(record_property):
    """If this fails the tests below prove nothing."""
    peaks = measured(ISAS[0], "print('a', peak(page_in, 30))\nprint('b', peak(page_in, 3))")
    assert 29 < peaks["a"] < 33 and 2 < peaks["b"] < 5


@needs_proc
def test_scores_are_never_materialised(isa, record_max):
    """4096 x 4096: 64 MB of scores, with all that is read at its broadcast shape."""
    peaks = measured(
        isa,
        """
        n = 4096 if _core.isa() != "scalar" else 1536  # 9 MB of scores
        q, k, v = (numbers(n, 32) for _ in range(3))
        for count in (1, 3):
            with fs.num_threads(count):
                print("threads", count, attend(q, k, v))
        print("lse, causal", attend(q, k, v, return_lse=True, is_causal=True))
        print("row mask", attend(q, k, v, mask=ones(n), is_causal=True))
        print("mask", attend(q, k, v, mask=ones(n, n), window=(300, 0)))
        print("bias", attend(q, k, v, bias=numbers(n, n), window=(300, 0)))
        print("bias of another type", attend(q, k, v, bias=ones(n, n, dtype="f2"), window=(9, 9)))
        print("alibi", attend(q, k, v, alibi_slopes=np.ones(1), softcap=3.0, is_causal=True))
        """,
    )
    for name, peak in peaks.items():
        record_max(f"peak above the arrays, 4096 x 4096, {name}", peak, ALLOWED, isa, "MB")


@needs_proc
def test_keys_are_read_where_they_lie(isa, record_max):
    """One query: no copy of k or v, grouped, broadcast, swapped or halves."""
    peaks = measured(
        isa,
        """
        k = numbers(1 << 16, 2, 64).swapaxes(0, 1)  # 32 MB
        q = numbers(16, 1, 64)
        print("grouped", attend(q, k, k))
        print("weights", attend(numbers(2, 1, 64), k, k, return_weights=True))
        print("batch", attend(numbers(8, 2, 1, 64), k, k))
        print("few queries", attend(numbers(4, 3, 64), k, k))
        for dtype in ("f2", "f8", ml_dtypes.bfloat16):
            k = numbers(1, 1 << 17, 64, dtype=dtype)
            print(np.dtype(dtype), attend(numbers(4, 1, 64, dtype=dtype), k, k))
        """,
    )
    for name, peak in peaks.items():
        record_max(f"peak above the arrays, decode, {name}", peak, ALLOWED, isa, "MB")


@needs_proc
def test_queries_are_read_where_they_lie(isa, record_max):
    """Many queries, few keys: what is packed is a block."""
    peaks = measured(
        isa,
        """
        q = numbers(1 << 16, 2, 64).swapaxes(0, 1)  # 32 MB
        k = numbers(1, 5, 64)
        print("swapped", attend(q, k, k))
        q = numbers(1 << 16, 64, dtype="f2")
        print("float16", attend(q, k[0].astype("f2"), k[0].astype("f2")))
        """,
    )
    for name, peak in peaks.items():
        record_max(f"peak above the arrays, many queries, {name}", peak, ALLOWED, isa, "MB")


@needs_proc
@but_scalar
def test_gradients_materialise_no_scores(name, record_max):
    """4096 x 4096 and twice that: weights, or gradients of scores, would take 64 and 256 MB."""
    peaks = measured(
        name,
        """
        n = 4096
        q, k, v = (numbers(n, 16) for _ in range(3))
        for count in (1, 3):
            with fs.num_threads(count):
                print("threads", count, derive(q, k, v))
        print("causal", derive(q, k, v, is_causal=True, softcap=3.0))
        print("sinks, alibi", derive(q, k, v, alibi_slopes=np.ones(1), sinks=np.ones(1),
                                     return_dsinks=True))
        print("grouped", derive(numbers(4, n // 2, 16), numbers(1, n // 2, 16), v[None, : n // 2]))
        print("row mask", derive(q, k, v, mask=ones(n), window=(300, 0)))
        print("bias of keys", derive(q, k, v, bias=numbers(n), return_dbias=True, window=(300, 0)))
        print("float16", derive(*(a.astype("f2") for a in (q, k, v)), is_causal=True))
        q, k, v = (numbers(2 * n, 16) for _ in range(3))
        print("twice as long", derive(q, k, v, is_causal=True))
        """,
    )
    for what, peak in peaks.items():
        record_max(f"peak above the arrays, gradients, {what}", peak, ALLOWED, name, "MB")


@needs_proc
def test_packed_sequences_are_not_padded(isa, record_max):
    """One of 8192 and 500 of 16: padded, each of q, k and v would take 1 GB."""
    peaks = measured(
        isa,
        """
        lengths = [2048 if _core.isa() == "scalar" else 8192, *[16] * 500]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        q, k, v = (numbers(starts[-1], 2, 32) for _ in range(3))
        out = numbers(starts[-1], 2, 32)
        shared = numbers(100, 8)
        fs.attention(shared, shared, shared)
        print("packed", peak(fs.attention_varlen, q, k, v, starts, starts, out=out, is_causal=True))
        """,
    )
    record_max("peak above the arrays, packed", peaks["packed"], ALLOWED, isa, "MB")


@needs_proc
@but_scalar
def test_sixteen_thousand_by_sixteen_thousand(name, record_max):
    """A gigabyte of scores."""
    peaks = measured(name, "print('peak', attend(*(numbers(1 << 14, 64) for _ in range(3))))")
    record_max("peak above the arrays, 16384 x 16384", peaks["peak"], ALLOWED, name, "MB")


# --- guard pages ----------------------------------------------------------------------------------

both_ends = pytest.mark.parametrize("at", ["start", "end"])


@pytest.fixture(scope="module")
def pages():
    """One guarded buffer per argument."""
    names = ("q", "k", "v", "out", "mask", "bias", "sinks", "alibi_slopes", "q_offset",
             "kv_lengths", "out_a", "lse_a", "out_b", "lse_b")  # fmt: skip
    return {name: GuardedPages(1 << 18) for name in names}


def with_guards(pages, arrays, at, order="C"):
    return {n: pages[n].copy_of(np.asarray(a), at, order) for n, a in arrays.items()}


def call(arrays, **options):
    options = {n: a for n, a in arrays.items() if n not in "qkv"} | options
    return fs.attention(*(arrays[n] for n in "qkv"), **options)


def everything(size, dtype):
    """All arguments that are arrays, mask and bias in full."""
    r = rng("guards", size)
    arrays = dict(zip("qkv", size.qkv(dtype), strict=True))
    arrays["mask"] = r.random(size.scores) < 0.8
    arrays["bias"] = r.normal(0, 1, size.scores).astype(F32)
    arrays["sinks"], arrays["alibi_slopes"] = r.normal(0, 1, (2, size.heads))
    arrays["q_offset"] = r.integers(0, size.keys + 1, size.lead)
    arrays["kv_lengths"] = r.integers(0, size.keys + 1, size.lead)
    return arrays


def check(pages, size, dtype, at, order="C"):
    arrays = everything(size, dtype)
    guarded = with_guards(pages, arrays, at, order)
    out = pages["out"].array((*size.scores[:-1], size.v_depth), dtype, at, order)
    lone = {n: arrays[n] for n in "qkv"}
    assert_same_bits(call({n: guarded[n] for n in "qkv"}, out=out), call(lone), (size, "plain"))
    for options in ({}, {"is_causal": True, "softcap": 3.0}, {"window": (5, 7)}):
        want = call(arrays, **options, return_lse=True, return_weights=True)
        got = call(guarded, **options, out=out, return_lse=True, return_weights=True)
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w, (size, options))
    # Lower ranks: a mask of keys, a bias per query.
    few = {n: guarded[n] for n in "qkv"}
    few["mask"] = pages["mask"].copy_of(arrays["mask"][0, 0, 0], at)
    few["bias"] = pages["bias"].copy_of(arrays["bias"][0, 0, :, :1].astype(dtype), at)
    want = call(lone, mask=arrays["mask"][0, 0, 0], bias=arrays["bias"][0, 0, :, :1].astype(dtype))
    assert_same_bits(call(few, out=out), want, (size, "lower ranks"))


@both_ends
@every_dtype
def test_ragged_shapes(isa, pages, dtype, at):
    """Every tail of a vector in D, Dv, Q and K."""
    for number, depth in enumerate((1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, 100)):
        for queries in (1, (2, 5, 17, 25, 33, 49)[number % 6]):
            keys = (1, 3, 8, 17, 63, 64, 65, 70)[(number + queries) % 8]
            v_depth = (16, 1, 33, 4, 65, 7, 2)[number % 7]
            check(pages, Size((2,), 2, 1, queries, keys, depth, v_depth), dtype, at)


@both_ends
def test_every_number_of_queries_and_keys(isa, pages, at):
    for dtype in (F32, F16, F64):
        for queries in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 97):
            keys = (queries * 7) % 67 + 1
            check(pages, Size((1,), 2, 2, queries, keys, 5, 3), dtype, at)
        for keys in (1, 2, 3, 4, 5, 7, 9, 13, 31, 61, 62, 63, 64, 65, 66, 127, 129):
            for queries in (1, 5):
                check(pages, Size((1,), 3, 1, queries, keys, 5, 3), dtype, at)


@both_ends
def test_columns_first(isa, pages, at):
    """Fortran order: the last element of each array is still the last one."""
    for dtype in (F32, BF16):
        for queries, keys in ((1, 65), (1, 3), (17, 9), (50, 66)):
            check(pages, Size((2,), 2, 1, queries, keys, 9, 5), dtype, at, "F")


@both_ends
def test_strides_and_odd_addresses(isa, pages, at):
    """Gaps, negative steps and addresses that are no multiple of the item's size."""
    for dtype in (F32, F64, *HALVES):
        for queries, keys in ((1, 66), (30, 5)):
            size = Size((), 2, 1, queries, keys, 9, 5)
            arrays = dict(zip("qkv", size.qkv(dtype), strict=True))
            shape = (2, queries, 5)
            want = call(arrays)
            for step in (2, 3, -1, -2):
                views, whole = {}, {}
                for name, a in {**arrays, "out": np.zeros(shape, dtype)}.items():
                    columns = abs(step) * (a.shape[-1] - 1) + 1
                    whole[name] = pages[name].array((*a.shape[:-1], columns), dtype, at)
                    whole[name][...] = 7
                    views[name] = whole[name][..., ::step]
                    views[name][...] = a
                out = views.pop("out")
                assert_same_bits(call(views, out=out), want, (queries, step))
                between = np.ones(whole["out"].shape[-1], bool)
                between[::step] = False
                assert (whole["out"][..., between] == 7).all(), "wrote between the elements of out"
            odd = {}
            for name, a in {**arrays, "out": np.zeros(shape, dtype)}.items():
                offset = 1 if at == "start" else 0
                raw = pages[name].array((a.nbytes + 1,), np.uint8, at)[offset : offset + a.nbytes]
                odd[name] = raw.view(dtype).reshape(a.shape)
                odd[name][...] = a
            out = odd.pop("out")
            assert_same_bits(call(odd, out=out), want, (queries, "odd"))


@both_ends
@every_dtype
def test_keys_that_end_at_the_guard(isa, pages, dtype, at):
    """Few keys, whole query blocks; many keys, one query; grouped heads."""
    for size in (
        Size((1,), 4, 2, 99, 2, 33, 31),
        Size((1,), 7, 1, 1, 257, 20, 12),
        Size((1,), 8, 4, 1, 130, 7, 40),
        Size((1,), 12, 4, 2, 65, 8, 9),
    ):
        check(pages, size, dtype, at)


@both_ends
@every_dtype
def test_merge_attention(isa, pages, dtype, at):
    for columns in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100):
        for rows in (1, 3, 17):
            r = rng("merge", rows, columns)
            arrays = {
                "out_a": r.normal(0, 1, (rows, columns)).astype(dtype),
                "lse_a": r.normal(0, 1, rows).astype(compute_type(dtype)),
                "out_b": r.normal(0, 1, (rows, columns)).astype(dtype),
                "lse_b": r.normal(0, 1, rows).astype(compute_type(dtype)),
            }
            want = fs.merge_attention(*arrays.values())
            for order in "CF":
                got = fs.merge_attention(*with_guards(pages, arrays, at, order).values())
                assert_same_bits(got[0], want[0], (rows, columns))
                assert_same_bits(got[1], want[1], (rows, columns))
