"""fastsoftmax.ufuncs in libraries that work with ufuncs; skipped where one is missing."""

import re

import numpy as np
import pytest
from common import BF16, F16, F32, F64, assert_same_bits, normal

import fastsoftmax as fs
from fastsoftmax import ufuncs


@pytest.fixture
def da():
    return pytest.importorskip("dask.array")


def lazily(da, call):
    """The array that `call` returns, computed after it was seen to compute nothing itself."""
    import dask

    def refuse(*_, **__):
        raise AssertionError("computed at once")

    with dask.config.set(scheduler=refuse):
        result = call()
        assert type(result) is da.Array
    return result, result.compute(scheduler="threads")


@pytest.mark.parametrize("dtype", [F16, F32, F64, BF16], ids=lambda dtype: dtype.name)
def test_dask(da, dtype):
    x = normal((60, 7, 33), dtype)
    chunked = da.from_array(x, chunks=(13, 3, 33))
    for name in ("softmax", "log_softmax"):
        ufunc, function = getattr(ufuncs, name), getattr(fs, name)
        lazy, got = lazily(da, lambda ufunc=ufunc: ufunc(chunked))
        assert lazy.chunks == chunked.chunks
        assert_same_bits(got, function(x))
        over_first = chunked.rechunk({0: -1})
        lazy, got = lazily(da, lambda ufunc=ufunc, x=over_first: ufunc(x, axis=0))
        assert_same_bits(got, function(x, 0))
    lazy, got = lazily(da, lambda: ufuncs.logsumexp(chunked))
    assert lazy.shape == (60, 7)
    assert_same_bits(got, fs.logsumexp(x, -1))
    with pytest.raises(ValueError, match="chunk"):
        ufuncs.softmax(da.from_array(x, chunks=(60, 7, 11)))


def test_dask_integers(da):
    x = np.arange(12, dtype=np.int8).reshape(3, 4)
    lazy, got = lazily(da, lambda: ufuncs.softmax(da.from_array(x, chunks=(1, 4))))
    assert lazy.dtype == got.dtype == F64
    assert_same_bits(got, fs.softmax(x))


@pytest.mark.parametrize("dask", [False, True])
def test_xarray(dask):
    xarray = pytest.importorskip("xarray")
    values = normal((4, 6, 5), F32)
    x = xarray.DataArray(
        values, dims=("time", "class", "site"), coords={"site": list("abcde")}, name="logits"
    )
    if dask:
        pytest.importorskip("dask.array")
        x = x.chunk({"time": 2, "class": -1, "site": 3})
    options = {"dask": "parallelized", "output_dtypes": [x.dtype]}
    cores = {"input_core_dims": [["class"]], "output_core_dims": [["class"]]}
    y = xarray.apply_ufunc(ufuncs.softmax, x, **cores, **options)
    assert y.dims == ("time", "site", "class") and y.coords["site"].equals(x.coords["site"])
    assert bool(y.chunks) == dask
    assert_same_bits(y.transpose(*x.dims).values, fs.softmax(values, 1))
    y = xarray.apply_ufunc(ufuncs.logsumexp, x, input_core_dims=[["class"]], **options)
    assert y.dims == ("time", "site") and bool(y.chunks) == dask
    assert_same_bits(y.values, fs.logsumexp(values, 1))


def test_awkward():
    """A jagged array by the lines of the documentation: the bits of each list alone."""
    ak = pytest.importorskip("awkward")
    lists = [normal(n, F64, 3.0, n) for n in (3, 0, 1, 40, 7)]
    jagged = ak.Array(lists)
    (recipe,) = re.findall(r"::\n\n((?:    .*\n)+)", ufuncs.__doc__)
    assert "jagged" in recipe
    scope = {"ak": ak, "np": np, "fastsoftmax": fs, "jagged": jagged}
    exec(re.sub("^    ", "", recipe, flags=re.M), scope)
    result = scope["result"]
    assert ak.num(result).tolist() == [3, 0, 1, 40, 7]
    for got, one in zip(result, lists, strict=True):
        assert_same_bits(np.asarray(got), fs.softmax(one))
    # What the documentation warns of: a ufunc is given all the numbers at once.
    together = ak.to_numpy(ak.flatten(ufuncs.softmax(jagged)))
    assert_same_bits(together, fs.softmax(np.concatenate(lists)))
