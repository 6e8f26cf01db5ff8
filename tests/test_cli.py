"""The command line: its output, its exit status, its messages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastsoftmax as fs
from fastsoftmax import __main__ as cli
from fastsoftmax import bench
from fastsoftmax.bench import measure, report
from fastsoftmax.bench.cases import Attention, Softmax, from_json, to_json
from fastsoftmax.bench.measure import workers
from fastsoftmax.bench.peers import IMPLEMENTATIONS

LAYER = Path(__file__).parent / "data" / "minilm_layer5.npz"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One call is time enough here."""
    monkeypatch.setattr(bench, "best_time", lambda call, seconds=0: call() is None or 1e-6)


@pytest.fixture
def layer():
    with np.load(LAYER) as file:
        return dict(file)


def save(tmp_path, layer):
    path = tmp_path / "layer.npz"
    np.savez(path, **layer)
    return str(path)


# --- demo -----------------------------------------------------------------------------------------


def test_demo_on_a_real_layer(capsys, isa):
    assert cli.main(["demo", str(LAYER)]) == 0
    output = capsys.readouterr().out
    assert output.count(" ok\n") == 4
    assert "FAILED" not in output
    for word in ("weights @ v", "NumPy", isa, f"threads: {fs.get_num_threads()}"):
        assert word in output


def test_demo_on_known_examples(capsys, isa):
    assert cli.main(["demo"]) == 0
    output = capsys.readouterr().out
    assert output.count(" ok\n") == 4
    for numbers in ("0.0900 0.2447 0.6652", "0.047 0.936 0.017", "0.186 0.307 0.506"):
        assert numbers in output


def test_demo_sees_a_wrong_result(capsys, tmp_path, layer):
    layer["out"] = layer["out"] * (1 + 1e-5)
    assert cli.main(["demo", save(tmp_path, layer)]) == 1
    assert capsys.readouterr().out.count("FAILED") == 1


def test_demo_sees_wrong_weights(capsys, monkeypatch):
    right = fs.softmax
    monkeypatch.setattr(fs, "softmax", lambda x, **keywords: right(x, **keywords) * 1.01)
    assert cli.main(["demo", str(LAYER)]) == 1
    assert cli.main(["demo"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"no arrays here", "not an .npz file"),
        (LAYER.read_bytes()[:-1000], "not an .npz file"),
        (b"".join([LAYER.read_bytes()[:5000], bytes(1000), LAYER.read_bytes()[6000:]]), ""),
    ],
    ids=["missing", "text", "cut", "damaged"],
)
def test_demo_refuses_what_is_no_npz_file(capsys, tmp_path, content, message):
    path = tmp_path / "file.npz"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["demo", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fastsoftmax demo: cannot use {path}: ")
    assert message in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("key_mask", None, "no array named key_mask"),
        ("k", lambda k: k[:, :, :-1], "k (4, 12, 63, 32)"),
        ("q", np.ravel, "q (98304,)"),
        ("key_mask", lambda mask: mask[0], "key_mask (64,)"),
        ("key_mask", np.float32, "key_mask must be bool, got float32"),
    ],
)
def test_demo_refuses_arrays_that_are_no_layer(capsys, tmp_path, layer, name, change, message):
    array = layer.pop(name)
    if change is not None:
        layer[name] = change(array)
    assert cli.main(["demo", save(tmp_path, layer)]) == 2
    assert message in capsys.readouterr().err


# --- info, selftest -------------------------------------------------------------------------------


def test_info(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert fs.__version__ in output
    assert fs.isa() in output


def test_selftest(capsys, monkeypatch):
    monkeypatch.setattr(cli, "SELFTEST_SHAPES", [((9, 40), -1), ((40, 9), 0), ((3, 4, 5), None)])
    assert cli.main(["selftest"]) == 0
    output = capsys.readouterr().out
    assert output.count(" ok\n") == 4 * len(fs.available_isas())
    assert "all is well" in output


def test_selftest_sees_a_wrong_result(capsys, monkeypatch):
    right = fs.log_softmax
    monkeypatch.setattr(cli, "SELFTEST_SHAPES", [((9, 40), -1)])
    monkeypatch.setattr(fs, "log_softmax", lambda x, **keywords: right(x, **keywords) * 2)
    assert cli.main(["selftest"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.skipif(len(fs.available_isas()) < 2, reason="one ISA only: nothing to compare")
def test_selftest_sees_one_different_bit(capsys, monkeypatch):
    right, first = fs.softmin, fs.available_isas()[0]

    def one_bit_off(x, **keywords):
        y = right(x, **keywords)
        if fs.isa() == first:
            y.flat[-1] = np.nextafter(y.flat[-1], y.dtype.type(2))
        return y

    monkeypatch.setattr(cli, "SELFTEST_SHAPES", [((9, 40), -1)])
    monkeypatch.setattr(fs, "softmin", one_bit_off)
    assert cli.main(["selftest"]) == 1
    assert capsys.readouterr().out.count("NO         FAILED") == 4


# --- bench ----------------------------------------------------------------------------------------

SHORT = ["--peers", "numpy", "--rounds", "1", "--seconds", "1e-9"]
TINY = [
    Softmax((8, 5)),
    Softmax((3, 4), axis=0),
    Softmax((6, 4, 5), "float16", axis=1, function="log_softmax", fused="bias"),
    Attention((1, 4, 2, 5, 7, 8), "causal"),
    Attention((1, 4, 2, 1, 7, 8)),
]


@pytest.fixture
def tiny_suites(monkeypatch):
    """Cases that take no time; the workers are told which ones."""
    for suite in bench.SUITES:
        monkeypatch.setitem(bench.SUITES, suite, {"group": TINY[:3], "others": TINY[3:]})
    monkeypatch.setattr(bench, "THREADS", TINY[2:4])
    sizes = "K", [4, 8, 16], lambda n: Softmax((3, n))
    monkeypatch.setattr(bench, "SCALING", {"three rows of K": sizes})
    monkeypatch.setattr(bench, "DISTRIBUTIONS", {"scale 1": None})
    monkeypatch.setattr(bench, "OVERVIEW", ["scale 1"])
    monkeypatch.setattr(bench, "OVERVIEW_OF_SPEED", {"a": TINY[:1], "b": TINY[3:4]})


def run_bench(tmp_path, *argv):
    path = tmp_path / "results.json"
    assert cli.main(["bench", *argv, *SHORT, "--json", str(path)]) == 0
    return json.loads(path.read_text())["results"]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--rounds", "0", "from 1 to 1024"),
        ("--rounds", "1.5", "from 1 to 1024"),
        ("--threads", "1025", "from 1 to 1024"),
        ("--seconds", "-1", "a finite number > 0"),
        ("--seconds", "nan", "a finite number > 0"),
        ("--seconds", "soon", "a finite number > 0"),
        ("--json", "nowhere/a.json", "in a folder that exists"),
        ("--markdown", ".", "in a folder that exists"),
        ("--plot", "nowhere/a.svg", "in a folder that exists"),
        ("--plot", "a.doc", "end with .png"),
    ],
)
def test_bench_refuses(capsys, option, value, says):
    """At once, not when all is measured."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", option, value])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"argument {option}: must" in error and says in error and repr(value) in error


@pytest.mark.parametrize("suite", ["softmax", "attention"])
def test_bench_of_speed(capsys, tmp_path, tiny_suites, suite):
    results = run_bench(tmp_path, suite)
    output = capsys.readouterr().out
    for case in TINY:
        assert output.count(f"\n{case} ") == 2  # in the table of times and in that of ratios
    assert "geometric mean" in output
    pairs = zip(TINY, results, strict=True)
    assert [from_json({f: result[f] for f in to_json(case)}) for case, result in pairs] == TINY
    for result in results[:2]:
        assert all(result["seconds"][name] > 0 for name in ("fastsoftmax", "floor", "numpy"))


def test_bench_of_threads(capsys, tmp_path, tiny_suites):
    results = run_bench(tmp_path, "threads", "--threads", "3")
    assert [r["sizes"] for r in results] == [[1, 2, 3]] * 2
    assert all(len(r["seconds"]["numpy"]) == 3 for r in results)
    assert capsys.readouterr().out.count("threads=3  exponent") == 2


def test_bench_of_scaling(capsys, tmp_path, tiny_suites):
    (result,) = run_bench(tmp_path, "scaling")
    assert result["sizes"] == [4, 8, 16]
    assert "K=16  exponent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "suite, last, count",
    [("softmax", "fastest", 5), ("threads", "exponent", 2 * 2), ("scaling", "exponent", 2)],
)
def test_bench_as_markdown(tmp_path, tiny_suites, suite, last, count):
    path = tmp_path / "table.md"
    run_bench(tmp_path, suite, "--markdown", str(path))
    header, under, *rows = path.read_text().splitlines()
    assert header.endswith(f" {last} |") and set(under) == set("| -:")
    assert len(rows) == count
    assert len({line.count("|") for line in (header, under, *rows)}) == 1


def test_exponents():
    assert report.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert report.exponent([1, 2, 4], [3, "wrong", 12]) == pytest.approx(1)
    assert np.isnan(report.exponent([1, 2], [3, "-"]))


@pytest.mark.parametrize("suite", ["softmax", "scaling", "overview"])
def test_bench_draws(tmp_path, tiny_suites, suite):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    run_bench(tmp_path, suite, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_drawings_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    result = {"dtype": "float32", "distribution": "scale 1", "ulp": {"fastsoftmax": 1, "jax": "-"}}
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        report.plot_accuracy([result], "title", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.full
def test_bench_of_accuracy(capsys, tmp_path, tiny_suites):
    for result in run_bench(tmp_path, "accuracy"):
        assert result["ulp"]["fastsoftmax"] <= 2 < result["ulp"]["numpy"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_each_implementation_is_right(name):
    """Those that are installed here, in a process of their own, on cases of every kind."""
    fused = [Softmax((6, 5), fused=fused) for fused in ("", "where", "bias", "temperature")]
    logs = [Softmax((6, 4, 5), axis=1, function=f) for f in ("log_softmax", "logsumexp")]
    types = [Softmax((6, 50), dtype) for dtype in ("float16", "bfloat16", "float64")]
    modes = "full", "causal", "window", "padding", "bias", "backward", "packed"
    attention = [Attention((2, 4, 4, 9, 9, 16), mode) for mode in modes]
    attention += [Attention((2, 4, 2, n, 9, 16), t) for n, t in ((9, "causal"), (1, "full"))]
    ours = name in ("fastsoftmax", "floor")
    with workers([name], 1) as running:
        if name not in running:
            pytest.skip(f"{name} is not installed")
        for case in (*fused, *logs, *types, Softmax((8,), out=False), *attention):
            answer = running[name].time(case, 0)
            allowed = ("absent",) if ours else ("-", "absent")
            if name in ("numpy", "scipy") and case.dtype == "bfloat16":
                allowed += ("wrong",)
            assert not isinstance(answer, str) or answer in allowed, (case, answer)


def test_a_wrong_peer_is_found_out(monkeypatch):
    def wrong(case, **operands):
        copies = tuple(operands[name].copy() for name in "qkv" if name in operands)
        return lambda: copies if "grad" in operands else next(iter(operands.values())).copy()

    monkeypatch.setitem(IMPLEMENTATIONS, "numpy", (wrong, wrong))
    modes = "full", "backward", "packed"
    attention = [Attention((2, 2, 2, 4, 4, 8), mode) for mode in modes]
    for case in (Softmax((4, 6)), *attention, Softmax((4, 6), "bfloat16")):
        if case.dtype == "bfloat16":
            pytest.importorskip("ml_dtypes")
        with pytest.raises(ArithmeticError):
            measure.checked_call("numpy", case)


def test_every_case_can_be_made_small_and_sent():
    groups = (group for suite in bench.SUITES.values() for group in suite.values())
    for case in (*(case for group in groups for case in group), *bench.THREADS):
        for one in (case, case.small()):
            assert from_json(json.loads(json.dumps(to_json(one)))) == one


# --- the program ----------------------------------------------------------------------------------


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastsoftmax {fs.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["dance"], ["demo", "a", "b"], ["bench", "--peers", "excel"]])
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: fastsoftmax" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "fastsoftmax", *argv]
        return subprocess.run(command, cwd=Path(fs.__file__).parents[1], capture_output=True)

    assert run("demo").returncode == 0
    assert run("demo", str(tmp_path / "nowhere.npz")).returncode == 2
