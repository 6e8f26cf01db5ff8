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

SHORT = ["--peers", "numpy", "--rounds", "1", "--seconds", "0"]


@pytest.fixture
def short_suites(monkeypatch):
    monkeypatch.setitem(bench.SUITES, "softmax", [bench.Case((8, 5)), bench.Case((3, 4), axis=0)])
    monkeypatch.setitem(bench.SUITES, "small", [bench.Case((8,), out=False)])
    monkeypatch.setattr(bench, "DISTRIBUTIONS", {"scale 1": None})


def test_bench_of_speed(capsys, tmp_path, short_suites):
    path = tmp_path / "speed.json"
    assert cli.main(["bench", *SHORT, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert output.count("8 x 5 float32 ") == 2
    assert output.count("3 x 4 float32, axis 0 ") == 2
    results = json.loads(path.read_text())["results"]
    assert [r["axis"] for r in results] == [-1, 0]
    assert all(r["seconds"][name] > 0 for r in results for name in ("fastsoftmax", "numpy"))


@pytest.mark.full
def test_bench_of_accuracy(capsys, tmp_path, short_suites):
    path = tmp_path / "accuracy.json"
    assert cli.main(["bench", "accuracy", *SHORT, "--json", str(path)]) == 0
    for result in json.loads(path.read_text())["results"]:
        assert result["ulp"]["fastsoftmax"] <= 2 < result["ulp"]["numpy"]


@pytest.mark.parametrize("name", bench.IMPLEMENTATIONS)
def test_each_peer_computes_softmax(name):
    """The peers that are installed here, in this process."""
    pytest.importorskip(name.split()[0])
    bench.checked_call(name, bench.Case((4, 7)))()


def test_a_wrong_peer_is_found_out(monkeypatch):
    wrong = {"numpy": lambda x, axis, use_out: lambda: x}
    monkeypatch.setattr(bench, "IMPLEMENTATIONS", wrong)
    with pytest.raises(ArithmeticError):
        bench.checked_call("numpy", bench.Case((4, 6)))


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
