"""fastsoftmax.ufuncs in libraries that work with ufuncs; skipped where one is missing."""

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


# --- Awkward Array --------------------------------------------------------------------------------

LISTS = [normal(n, F64, 3.0, n) for n in (3, 0, 1, 40, 7, 1, 40_000, 3)]


@pytest.fixture
def ak(monkeypatch):
    """The library, whose table of overloads has none of ours, and is put back after the test."""
    awkward = pytest.importorskip("awkward")
    theirs = {k: v for k, v in awkward.behavior.items() if k != (np.ufunc, "logits")}
    monkeypatch.setattr(awkward, "behavior", theirs)
    return awkward


def of_lists(function, nested, depth=2):
    """What the functions for jagged arrays should give: a call for each of the innermost lists."""
    if nested is None:
        return None
    if depth > 1:
        return [of_lists(function, one, depth - 1) for one in nested]
    there = np.array([one for one in nested if one is not None], F64)
    got = function(there, -1).tolist()
    if function is fs.logsumexp:
        return got
    given = iter(got)
    return [None if one is None else next(given) for one in nested]


@pytest.mark.parametrize("name", ufuncs.__all__)
def test_awkward(isa, ak, name):
    """Jagged arrays by the functions: the bits of each list alone."""
    import fastsoftmax.awkward as fsa

    function = getattr(fs, name)
    for dtype in (F64, F32, F16, np.dtype(np.int8)):
        lists = [one.astype(dtype) for one in LISTS]
        x = ak.unflatten(np.concatenate(lists), [one.size for one in lists])
        for changed, kept in ((x, lists), (x[::-1], lists[::-1]), (x[2:5], lists[2:5])):
            result = getattr(fsa, name)(changed)
            assert type(result) is ak.Array and len(result) == len(kept)
            for got, one in zip(result, kept, strict=True):
                assert_same_bits(np.asarray(got), np.asarray(function(one, -1)), (name, dtype))
    for nested, depth in (
        ([[[1.0, 2.0], []], [], [[3.0]]], 3),
        ([[1.0, None, 3.0], [None], [], [0.5]], 2),
        ([None, [1.0, 2.0], None], 2),
        ([[None, [1.0, None]], [[]]], 3),
    ):
        assert getattr(fsa, name)(nested).tolist() == of_lists(function, nested, depth)
    for regular in (normal((3, 4), F32), normal((2, 3, 4), F32)):
        got = ak.to_numpy(getattr(fsa, name)(regular))
        assert_same_bits(got, function(regular, -1))
    for empty in (x[:0], ak.Array([[], []]), ak.Array([[[1.0]], []])[1:]):
        assert ak.to_list(getattr(fsa, name)(empty)) in ([], [[], []], [-np.inf] * 2, [[]])
    assert ak.to_list(getattr(fsa, name)([1.0, None, 2.0])) == of_lists(
        function, [1.0, None, 2.0], 1
    )


def test_awkward_refuses(ak):
    import fastsoftmax.awkward as fsa

    for bad in ([["a"]], [{"x": 1.0}], [[{"x": 1.0}]], [["a", 1.0]], ["words"]):
        with pytest.raises(TypeError, match="x must hold lists of numbers, got"):
            fsa.softmax(bad)
    with pytest.raises(TypeError, match="x has dtype complex128"):
        fsa.logsumexp([[1j]])
    for axis in (0, None, 1):
        with pytest.raises(ValueError, match="axis must be -1"):
            fsa.softmax([[1.0]], axis)
    traced = ak.to_backend(ak.Array([[1.0, 2.0], [3.0]]), "typetracer")  # has no numbers
    with pytest.raises(TypeError, match="x must be on the backend cpu, got typetracer"):
        fsa.softmax(traced)


@pytest.mark.parametrize("name", ufuncs.__all__)
def test_awkward_ufuncs(ak, name):
    """The ufuncs on lists that have the name; other ufuncs and other lists as ever."""
    import fastsoftmax.awkward as fsa

    ufunc, function = getattr(ufuncs, name), getattr(fs, name)
    plain = ak.Array([one[:50] for one in LISTS])
    named = ak.with_parameter(plain, "__list__", "logits")
    with pytest.raises(TypeError, match="overloads for custom types"):
        ufunc(named)
    fsa.register()
    assert ufunc(named).tolist() == of_lists(function, plain.tolist())
    assert ufunc(named / 2 + named).tolist() == of_lists(function, (plain / 2 + plain).tolist())
    nested = ak.unflatten(plain, [3, 0, 5]).tolist()
    got = ufunc(ak.unflatten(named, [3, 0, 5])).tolist()
    assert got == of_lists(function, nested, 3)
    parts = np.modf(named)
    assert [one.tolist() for one in parts] == [one.tolist() for one in np.modf(plain)]
    for array in (named, parts[1], np.negative(named), named + 1, 1 + named, named + named):
        assert ak.parameters(array)["__list__"] == "logits"
    assert (np.exp(named) == np.exp(plain)).tolist() == [[True] * n for n in ak.num(plain)]
    fsa.register("scores")
    scores = ak.with_parameter(plain, "__list__", "scores")
    assert ufunc(scores).tolist() == ufunc(named).tolist()


@pytest.mark.parametrize("name", ufuncs.__all__)
def test_awkward_ufuncs_refuse_lists_without_a_name(ak, name):
    """They would be given the numbers of all lists at once; everybody else is not disturbed."""
    ufunc = getattr(ufuncs, name)
    if not hasattr(ufunc, "__dict__"):
        pytest.skip("ufuncs of this NumPy have no attributes")
    jagged = ak.Array([[1.0, 2.0], [], [3.0]])
    regular = ak.to_regular(ak.Array([[1.0, 2.0], [3.0, 4.0]]))
    for x in (jagged, regular, jagged[1:], ak.Array([[[1, 2]], []]), ak.Array([[1.0, None]])):
        for backend in "cpu", "typetracer":  # the one of dask-awkward
            with pytest.raises(TypeError, match=f"use fastsoftmax.awkward.{name}, or"):
                ufunc(ak.to_backend(x, backend))
    for dtype in (F16, F32, F64, BF16):
        assert ufunc.resolve_dtypes((dtype, None)) == (dtype, dtype)
    assert ufunc.resolve_dtypes((np.dtype(np.int8), None)) == (F64, F64)
    assert np.exp(jagged).tolist() == [[np.exp(1.0), np.exp(2.0)], [], [np.exp(3.0)]]


@pytest.mark.parametrize("name", ufuncs.__all__)
def test_awkward_of_what_was_picked(ak, name):
    """Of filtered records Awkward keeps which ones they are, of slices what lies behind them."""
    import fastsoftmax.awkward as fsa

    function = getattr(fsa, name)
    records = ak.Array([[{"x": 1.0}, {"x": 2.0}, {"x": 3.0}], [], [{"x": 4.0}, {"x": 9.0}]])
    picked = records[records.x != 1].x
    assert function(picked).tolist() == function(ak.Array(picked.tolist())).tolist()
    cut = function(ak.Array([[1.0, None, 2.0], [3.0, None, 4.0]])[:1])
    assert ak.is_valid(cut)
    assert cut.tolist() == function(ak.Array([[1.0, None, 2.0]])).tolist()


def test_lists_do_not_lead_outside():
    """The private function behind it checks where rows begin and end."""
    of_lists = fs._core._of_lists
    assert of_lists("softmax", [1, 2, 3], [0, 1, 1, 3]).tolist() == [1.0, *fs.softmax([2, 3])]
    for starts in ([0, 4], [1, 3], [0, 2], [0, 5, 3], [0.0, 3.0], [], [[0, 3]]):
        with pytest.raises((ValueError, TypeError), match="starts"):
            of_lists("softmax", np.ones(3), starts)
