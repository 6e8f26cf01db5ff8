"""fastsoftmax.dask: lazy, with the right chunks, and the bits of one call however they lie."""

import numpy as np
import pytest
from common import (
    F16,
    F32,
    F64,
    Attention,
    Size,
    assert_same_bits,
    every_dtype,
    normal,
    rng,
)

import fastsoftmax as fs

pytest.importorskip("dask.array")
import dask
import dask.array as da

import fastsoftmax.dask as fsd


@pytest.fixture(autouse=True)
def synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def chunked(shape, chunks, dtype, *key, scale=3.0):
    x = normal(shape, dtype, scale, *key)
    return x, da.from_array(x, chunks=chunks)


# --- softmax, log_softmax, logsumexp --------------------------------------------------------------

FUNCTIONS = ("softmax", "log_softmax", "logsumexp")


@every_dtype
@pytest.mark.parametrize("name", FUNCTIONS[:2])
def test_rows_in_one_chunk_keep_their_bits(isa, dtype, name):
    x, d = chunked((7, 60, 5), (2, -1, 3), dtype)
    y = getattr(fsd, name)(d, 1, dtype=dtype)
    assert isinstance(y, da.Array) and y.chunks == d.chunks and y.dtype == dtype
    assert y._meta.dtype == dtype
    assert_same_bits(y.compute(), getattr(fs, name)(x, 1))
    y = getattr(fsd, name)(d, axis=1, temperature=0.7)
    assert_same_bits(y.compute(), getattr(fs, name)(x, 1, temperature=0.7))


@every_dtype
@pytest.mark.parametrize("shape, chunks, axis", [
    ((5, 700), (2, 90), -1), ((300, 6), (7, 4), 0), ((4, 50, 6), (3, 11, 4), (0, 2)),
    ((40, 30), (7, 8), None), ((30,), (1,), 0), ((3, 20), (3, (7, 0, 13)), 1),
    ((2, 5000), (2, (1024, 1023, 1025, 1928)), 1),
])  # fmt: skip
def test_chunked_axis_keeps_the_bits(isa, dtype, shape, chunks, axis):
    x, d = chunked(shape, chunks, dtype, scale=20)
    for name in FUNCTIONS:
        want = getattr(fs, name)(x, axis)
        y = getattr(fsd, name)(d, axis)
        assert y.dtype == dtype and y._meta.dtype == dtype and y.shape == want.shape
        assert name == "logsumexp" or y.chunks == d.chunks
        assert_same_bits(y.compute(), want, name)
    keep = fsd.logsumexp(d, axis, keepdims=True)
    assert_same_bits(keep.compute(), fs.logsumexp(x, axis, keepdims=True))


def test_the_third_level_of_a_sum(isa, threads):
    """Rows so long that what two levels drop would count (src_c/exp.inc.h)."""
    n = (1 << 18) + 3
    for dtype in (F32, F64) if isa != "scalar" else (F32,):
        x = normal((n,), dtype, 1.0) - dtype.type(20 if dtype == F32 else 34)
        x[n // 2] = 0  # so that the rest of the sum is small
        d = da.from_array(x, chunks=n // 3)  # below 2^17, which alone would not have it
        for name in FUNCTIONS:
            want = getattr(fs, name)(x, 0)
            for count in (1, 3):
                with dask.config.set({"fastsoftmax.num-threads": count}):
                    assert_same_bits(getattr(fsd, name)(d, 0).compute(), want, (name, count))


@every_dtype
def test_special_values_across_chunks(isa, dtype):
    inf, nan, big = np.inf, np.nan, float(np.finfo(F32).max) if dtype == F32 else 6e4
    x = np.array([
        [1, 2, 3, 4, 5, 6], [-inf] * 3 + [1, 2, 3], [1, nan, 2, 3, 4, 5], [1, 2, 3, 4, inf, 5],
        [-inf] * 6, [inf, 1, 2, -inf, -inf, -inf], [nan, inf, 0, -inf, -inf, -inf], [-0.0] * 6,
        [big, -big, 0, 0, big, 1], [-700, 0, 0, 700, 0, -1000], [1e-45] * 6, [-0.0, -1, 0, 0, 0, 0],
        [0, -88, -104, -17, -18, -9], [0, -87.4, -95, -103.9, -104, -1],
    ]).astype(dtype)  # fmt: skip
    x[2, 1] = -x[2, 1]  # a NaN of the other sign
    for chunks in (1, 2, 3, 4):
        d = da.from_array(x, chunks=(3, chunks))
        for name in FUNCTIONS:
            want = getattr(fs, name)(x, axis=1)
            assert_same_bits(getattr(fsd, name)(d, axis=1).compute(), want, (name, chunks))


def test_dtype_temperature_and_integers(isa):
    for source in (F16, F32, F64, np.dtype(">f4"), np.dtype(np.int32), np.dtype(bool)):
        x = (10 * normal((4, 90), F32)).astype(source)
        x[0, :9] = 0
        d = da.from_array(x, chunks=(4, 40))
        for options in (
            {"temperature": 3},
            {"temperature": np.float32(0.7)},
            *({"dtype": t} for t in (F16, F32, F64)),
            {"dtype": F32, "temperature": 0.1},
            {"dtype": F64, "temperature": 7},
        ):
            for name in FUNCTIONS[:2]:
                got = getattr(fsd, name)(d, **options).compute()
                assert_same_bits(got, getattr(fs, name)(x, **options), (name, source, options))
        got = fsd.logsumexp(d, dtype=F16).compute()
        assert_same_bits(got, fs.logsumexp(x, dtype=F16))
    for shape in ((0, 4), (4, 0)):
        empty = da.zeros(shape, chunks=2)
        assert fsd.softmax(empty).compute().shape == shape
        assert_same_bits(fsd.logsumexp(empty, 1).compute(), fs.logsumexp(np.zeros(shape), 1))
    scalar = da.from_array(np.array(3.0))
    assert fsd.softmax(scalar).compute() == 1 and fsd.logsumexp(scalar).compute() == 3


def test_chunks_of_unknown_sizes():
    x = da.from_array(np.arange(12.0).reshape(6, 2), chunks=2)
    some = x[x[:, 0] > 3]
    want = fs.softmax(np.arange(4.0, 12).reshape(4, 2))
    assert_same_bits(fsd.softmax(some).compute(), want)
    with pytest.raises(ValueError, match=r"compute_chunk_sizes\(\)"):
        fsd.softmax(some, 0)
    some.compute_chunk_sizes()
    assert_same_bits(fsd.softmax(some, 0).compute(), fs.softmax(some.compute(), 0))


def test_masked_chunks_are_refused():
    masked = da.from_array(np.ma.masked_array(np.ones((4, 4)), np.eye(4) > 0), chunks=2)
    with pytest.raises(TypeError, match="MaskedArray"):
        fsd.softmax(masked).compute()


def test_parts_of_other_rows_are_refused():
    x, top, sums = np.ones((2, 3), F32), np.ones(2, F32), np.ones((2, 5), np.int64)
    core = fs._core
    assert core._sums_of_parts("softmax", x, top, 3).tolist() == [[3 << 22, 0, 0, 0, 0]] * 2
    for bad in ((x[:1], top, sums), (x, top[:1], sums), (x, top, sums[:, :4])):
        with pytest.raises(ValueError, match="as many rows"):
            core._results_of_parts("softmax", *bad, 3, F32)
    with pytest.raises(ValueError, match="as many rows"):
        core._sums_of_parts("softmax", x, top[:1], 3)


def test_lazy():
    def fail(*_):
        raise AssertionError("computed too early")

    x = da.from_array(np.zeros((6, 6), F32), chunks=2).map_blocks(
        fail, dtype=F32, meta=np.empty((0, 0), F32)
    )
    q = x[None]
    for y in (fsd.softmax(x), fsd.log_softmax(x, None), fsd.logsumexp(x), fsd.attention(q, q, q)):
        with pytest.raises(AssertionError, match="too early"):
            y.compute()


def test_errors():
    x = da.zeros((4, 4), chunks=2)
    for function in (fsd.softmax, fsd.log_softmax, fsd.logsumexp):
        with pytest.raises(TypeError, match="x must be a dask array, got ndarray"):
            function(np.zeros(3))
        with pytest.raises(np.exceptions.AxisError):
            function(x, 2)
        with pytest.raises(TypeError, match="dtype complex128"):
            function(x.astype(complex))
        with pytest.raises(TypeError, match="dtype must be"):
            function(x, dtype=int)
    with pytest.raises(ValueError, match="temperature"):
        fsd.softmax(x, temperature=0)
    with pytest.raises(ValueError, match="temperature must be a number"):
        fsd.softmax(x, temperature=[1, 2])
    q = da.zeros((2, 4, 8), chunks=2)
    for arrays, error, message in (
        ((q, q, np.zeros((2, 4, 8))), TypeError, "v must be a dask array"),
        ((q[0], q, q), ValueError, "q must have shape"),
        ((q, q[:, :2], q), ValueError, "same number of keys"),
        ((q, q[..., :3], q), ValueError, "same number of columns"),
        ((q, q.astype(F32), q), TypeError, "same dtype"),
        ((q[None], q, q), ValueError, "before the heads"),
    ):
        with pytest.raises(error, match=message):
            fsd.attention(*arrays)
    with pytest.raises(TypeError, match="q_offset"):
        fsd.attention(q, q, q, q_offset=1.5)
    with pytest.raises(ValueError, match="q_offset must be from"):
        fsd.attention(q, q, q, q_offset=2**63)
    unknown = q[:, q[0, :, 0] == 0]
    with pytest.raises(ValueError, match=r"q has chunks of unknown sizes"):
        fsd.attention(unknown, q, q)
    for threads in ("abc", None, 0, 5000):
        with (
            dask.config.set({"fastsoftmax.num-threads": threads}),
            pytest.raises(ValueError, match=r"fastsoftmax.num-threads of dask.config is"),
        ):
            fsd.softmax(x)
    with pytest.raises(ValueError, match="softcap"):
        fsd.attention(q, q, q, softcap=-1)
    for options, error, message in (
        ({"mask": np.ones((3, 4), bool)}, ValueError, "mask has shape"),
        ({"mask": np.ones((1, 2, 4, 4), bool)}, ValueError, "mask has shape"),
        ({"mask": np.ones((4, 4))}, TypeError, "bias"),
        ({"bias": np.ones((4, 4), bool)}, TypeError, "mask"),
        ({"kv_lengths": 5}, ValueError, "kv_lengths must be from 0 to 4"),
        ({"kv_lengths": 1.0}, TypeError, "kv_lengths must be integers"),
        ({"kv_lengths": np.ma.array(1)}, TypeError, "kv_lengths must be integers"),
        ({"kv_lengths": [1, [2]]}, ValueError, "kv_lengths must be array_like"),
        ({"kv_lengths": [1, 2]}, ValueError, "kv_lengths has shape"),
    ):
        with pytest.raises(error, match=message):
            fsd.attention(q, q, q, **options)


# --- attention ------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "all": {
        "is_causal": True, "q_offset": 31, "window": (60, 3), "softcap": 5.0, "scale": 0.4,
        "sinks": [0.5, -1, 2, 0], "alibi_slopes": [0.1, 0.2, 0, -0.05],
    },
    "mask": {"mask": rng("mask").random((3, 4, 90, 121)) < 0.5, "is_causal": True},
    "mask of keys": {"mask": rng("keys").random((3, 1, 1, 121)) < 0.7, "kv_lengths": [121, 0, 60]},
    "bias of queries": {"bias": rng("bias").normal(size=(4, 90, 1)), "kv_lengths": 77},
    "mask and bias": {
        "mask": rng("both").random((90, 121)) < 0.5,
        "bias": np.where(rng("bias").random((3, 1, 90, 121)) < 0.2, -np.inf, 0.5).astype(F32),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["u1", "i1", "u8", "i8"])
def test_lengths_of_any_integers(dtype):
    q = normal((2, 1, 300, 8), F64)
    a = da.from_array(q, (2, 1, 140, 8))
    lengths = np.array([100, 120], dtype)
    got = fsd.attention(a, a, a, kv_lengths=lengths).compute()
    np.testing.assert_allclose(got, fs.attention(q, q, q, kv_lengths=lengths), 1e-12)


@pytest.mark.parametrize("offset", [2**63 - 1, 2**63 - 5, 2**61 + 7, -(2**63), 5])
@pytest.mark.parametrize("chunks", [(40, 40), (10, 40), (10, 15)])
def test_offsets_of_any_size(offset, chunks):
    q = normal((2, 40, 8), F64)
    a, k = da.from_array(q, (2, chunks[0], 8)), da.from_array(q, (2, chunks[1], 8))
    got = fsd.attention(a, k, k, is_causal=True, q_offset=offset).compute()
    np.testing.assert_allclose(got, fs.attention(q, q, q, is_causal=True, q_offset=offset), 1e-12)


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_attention(dtype, name, record_max):
    """On one ISA: it is calls of attention and merge_attention, and no kernel of its own."""
    size = Size((3,), 4, 2, 90, 121, 9, 5)
    arrays, options = size.qkv(dtype), CASES[name]
    case = Attention(*arrays, **options)
    rows = fs.attention(*arrays, **options)
    for chunks in ((2, 1, 30, 4), (3, 4, 90, 9)):
        if chunks[0] == 2:  # lazy ones, too
            lazy = {n: da.from_array(options[n], chunks=40) for n in {"mask", "bias"} & {*options}}
        else:
            lazy = {}
        y = fsd.attention(*(da.from_array(a, chunks=chunks) for a in arrays), **options | lazy)
        assert y.chunks[:1] + y.chunks[2:3] == ((chunks[0], 3 - chunks[0])[: 1 + (chunks[0] < 3)],
                                                (chunks[2],) * (90 // chunks[2]))  # fmt: skip
        assert y.shape == rows.shape and y.dtype == dtype
        got = y.compute()
        assert got.dtype == dtype
        # three levels of merging, as the docstring has it
        v = np.abs(arrays[2].astype(F64)).max()
        lse = np.abs(np.where(np.isfinite(case.true[1]), case.true[1], 0)).max()
        unit = 2.0**-51 if dtype == F64 else 2.0**-22
        slack = {"out": 3 * unit * max(1, lse) * v}
        case.check(record_max, "dask attention", chunks, results=(got, None, None), slack=slack)
    one = [
        da.from_array(a, chunks=(1, -1, n, -1)) for a, n in zip(arrays, (31, -1, -1), strict=True)
    ]
    assert_same_bits(fsd.attention(*one, **options).compute(), rows)


# --- schedulers -----------------------------------------------------------------------------------


def our_threads(x):
    return np.full(x.shape, fs.get_num_threads())


def test_threads_of_tasks(threads, monkeypatch):
    """One in each task, unless the configuration says otherwise."""
    threads(6)
    seen = []

    def spy_on(name):
        right = getattr(fs._core, name)

        def spy(*arguments, **options):
            seen.append(fs.get_num_threads())
            return right(*arguments, **options)

        monkeypatch.setattr(fs._core, name, spy)

    for name in ("softmax", "_sums_of_parts", "_results_of_parts"):
        spy_on(name)
    _, d = chunked((8, 40), (2, 40), F32)
    for wanted in (1, 3):
        with dask.config.set({"fastsoftmax.num-threads": wanted}):
            y, z = fsd.softmax(d), fsd.softmax(d, 0)
        seen.clear()
        dask.compute(y, z, scheduler="threads")
        assert len(seen) == 3 * 4 and set(seen) == {wanted}


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0), (0, 65)])
def test_attention_of_nothing(queries, keys):
    q, k, v = np.ones((2, queries, 4)), np.ones((2, keys, 4)), np.ones((2, keys, 5))
    for shape in ((2, queries, keys), (queries, keys), (keys,)):
        for mask in (np.ones(shape, bool), da.ones(shape, dtype=bool)):
            y = fsd.attention(*(da.from_array(a) for a in (q, k, v)), mask=mask).compute()
            assert_same_bits(y, fs.attention(q, k, v))


def test_no_warnings():
    x, options = np.array([1e300, 1.0, 2.0]), {"temperature": 1e-30}
    y = fsd.softmax(da.from_array(x, chunks=2), **options).compute(scheduler="sync")
    assert_same_bits(y, fs.softmax(x, **options))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    import warnings

    limit = 400 << 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of distributed, about its own affairs
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, memory_limit=limit, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client, 2 * limit


@pytest.mark.filterwarnings("ignore")
def test_larger_than_the_memory_of_the_workers(cluster):
    client, memory = cluster
    with dask.config.set(scheduler=client):
        x = da.random.default_rng(1).standard_normal((36, 3_000_000), chunks=(1, 500_000))
        assert x.nbytes > memory
        y = fsd.softmax(x, axis=1)
        sums, top = client.compute([y.sum(axis=1), y.max(axis=1)], sync=True)
        np.testing.assert_allclose(sums, 1, 1e-12)
        assert ((top > 1e-6) & (top < 1e-4)).all()


@pytest.mark.filterwarnings("ignore")
def test_workers_stay_within_their_cpus(cluster):
    """Each of the workers' threads uses one of ours, whatever the worker's environment says."""
    client, _ = cluster
    client.run(fs.set_num_threads, 5)
    with dask.config.set(scheduler=client):
        x = da.zeros((4, 8), chunks=(1, 8))
        y = x.map_blocks(
            fsd._call, lambda x, axes: our_threads(x), (1,), fsd._threads(), {}, dtype=int
        )
        assert (y.compute() == 1).all()
        q = da.random.default_rng(2).standard_normal((2, 300, 16), chunks=(2, 70, 16))
        y = fsd.attention(q, q, q, is_causal=True)
        want = fs.attention(*[q.compute()] * 3, is_causal=True)
        np.testing.assert_allclose(y.compute(), want, 1e-10, 1e-12)
