"""``fastsoftmax apply``: the right file, or one line that says why not and no file at all."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import BF16, F16, F32, F64, assert_same_bits, normal

import fastsoftmax as fs
from fastsoftmax import __main__ as cli
from fastsoftmax import apply

COMMAND = [sys.executable, "-m", "fastsoftmax", "apply"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments, status=2):
    """The one line of a command that fails and leaves the folder as it was."""
    before = sorted(os.listdir())
    assert cli.main(["apply", *arguments]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("fastsoftmax apply: ")
    assert sorted(os.listdir()) == before
    return err


@pytest.mark.parametrize("block", [1, 3000, apply.BLOCK])
@pytest.mark.parametrize("dtype", [F16, F32, F64, np.dtype(np.int16), np.dtype(">f4")], ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_every_axis_and_block(isa, monkeypatch, block, dtype, axis):
    monkeypatch.setattr(apply, "BLOCK", block)
    x = normal((13, 37, 11), F32, 9.0).astype(dtype)
    for order in "CF":
        np.save("in.npy", np.asarray(x, order=order))
        assert cli.main(["apply", "in.npy", "out.npy", "--axis", str(axis)]) == 0
        assert_same_bits(np.load("out.npy"), fs.softmax(x, axis))
    arguments = ["--log", "--temperature", "2.5", "--dtype", "float16", "--axis", str(axis)]
    assert cli.main(["apply", "in.npy", "out.npy", *arguments]) == 0
    assert_same_bits(np.load("out.npy"), fs.log_softmax(x, axis, temperature=2.5, dtype=F16))
    assert sorted(os.listdir()) == ["in.npy", "out.npy"]


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 4), (1,), (5, 1, 1)], ids=str)
def test_shapes(monkeypatch, shape):
    monkeypatch.setattr(apply, "BLOCK", 4)
    x = normal(shape, F32)
    np.save("in.npy", x)
    assert cli.main(["apply", "in.npy", "out.npy"]) == 0
    assert_same_bits(np.load("out.npy"), fs.softmax(x))


def test_blocks_are_disjoint_and_complete(monkeypatch):
    for size in (1, 7, 60, 1000):
        monkeypatch.setattr(apply, "BLOCK", size)
        for shape, axis in (((6, 5, 4), 0), ((6, 5, 4), 1), ((6, 5, 4), 2), ((97,), 0)):
            seen = np.zeros(shape, int)
            for block in apply._blocks(shape, axis, 1):
                part = seen[block]
                part += 1
                assert part.shape[axis] == shape[axis]
                assert part.size <= max(size, shape[axis])
            assert (seen == 1).all()


def test_bfloat16():
    x = normal((9, 20), F32)
    np.save("in.npy", x)
    assert cli.main(["apply", "in.npy", "out.npy", "--dtype", "bfloat16"]) == 0
    assert_same_bits(np.load("out.npy").view(BF16), fs.softmax(x, dtype=BF16))


def test_existing_out_is_replaced_and_readable():
    np.save("in.npy", normal((3, 4), F32))
    with open("out.npy", "w") as file:
        file.write("before")
    os.umask(before := os.umask(0o022))
    assert cli.main(["apply", "in.npy", "out.npy"]) == 0
    assert np.load("out.npy").shape == (3, 4)
    assert os.stat("out.npy").st_mode & 0o777 == 0o666 & ~before


def test_permissions_and_links_of_an_existing_out():
    np.save("in.npy", normal((3, 4), F32))
    np.save("out.npy", np.zeros(1))
    os.chmod("out.npy", 0o600)
    os.symlink("out.npy", "link.npy")
    assert cli.main(["apply", "in.npy", "link.npy"]) == 0
    assert os.path.islink("link.npy") and np.load("out.npy").shape == (3, 4)
    os.symlink("a.npy", "b.npy")
    os.symlink("b.npy", "a.npy")
    assert cli.main(["apply", "in.npy", "a.npy"]) in (0, 2)
    assert os.stat("out.npy").st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_replaced(capsys):
    np.save("in.npy", normal((3, 4), F32))
    os.mkfifo("pipe.npy")
    assert "pipe.npy is not a file" in refused(capsys, "in.npy", "pipe.npy")
    assert stat.S_ISFIFO(os.stat("pipe.npy").st_mode)


def test_bad_input(capsys):
    x = normal((30, 40), F32)
    np.save("in.npy", x)
    whole = Path("in.npy").read_bytes()
    for content, message in (
        (whole[:-1], "cut short"), (whole[:50], "damaged"), (b"", "not an .npy file"),
        (b"PK\3\4 no array", "not an .npy file"), (whole[:8] + b"\xff" * 200, "damaged"),
    ):  # fmt: skip
        with open("bad.npy", "wb") as file:
            file.write(content)
        assert message in refused(capsys, "bad.npy", "out.npy")
    np.save("bad.npy", np.array([1, "a", None], object))
    assert "Python objects" in refused(capsys, "bad.npy", "out.npy")
    for array in (
        np.zeros(3, complex),
        np.zeros(3, "U2"),
        np.zeros(3, "M8[s]"),
        np.zeros(3, "i4,f4"),
    ):
        np.save("bad.npy", array)
        assert "x has dtype" in refused(capsys, "bad.npy", "out.npy")
    assert "missing.npy: No such file" in refused(capsys, "missing.npy", "out.npy")
    assert "no/out.npy: No such file" in refused(capsys, "in.npy", "no/out.npy")
    assert "is a folder" in refused(capsys, "in.npy", ".")
    os.symlink("in.npy", "link.npy")
    os.link("in.npy", "hard.npy")
    for same in ("in.npy", "./in.npy", "link.npy", "hard.npy"):
        assert "the same file" in refused(capsys, "in.npy", same)
    for wrong, message in (
        (["--axis", "2"], "axis 2 is out of bounds"), (["--dtype", "int8"], "dtype must be"),
        (["--dtype", "nonsense"], "dtype must be"), (["--temperature", "0"], "temperature must be"),
        (["--dtype", "f4,,,"], "dtype must be"),
        (["--temperature", "nan"], "temperature must be"),
    ):  # fmt: skip
        assert message in refused(capsys, "in.npy", "out.npy", *wrong)
    assert_same_bits(np.load("in.npy"), x)


def test_failure_midway(capsys, monkeypatch):
    np.save("in.npy", normal((3000, 4), F32))
    np.save("out.npy", np.arange(3))
    monkeypatch.setattr(apply, "BLOCK", 1000)
    for error, status in ((KeyboardInterrupt, 130), (MemoryError, 2), (OSError(5, "no disk"), 2)):
        calls = []

        def failing(*_, error=error, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise error

        monkeypatch.setattr(apply, "_forget", failing)
        refused(capsys, "in.npy", "out.npy", status=status)
        assert_same_bits(np.load("out.npy"), np.arange(3))


SLOW = """
import sys, time
from fastsoftmax import __main__ as cli, apply
apply.BLOCK = 1000
apply._forget = lambda *_: (print("begun", flush=True), time.sleep(0.2))
sys.exit(cli.main(["apply", "in.npy", "out.npy"]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted(name):
    np.save("in.npy", normal((3000, 4), F32))
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=pipe, stderr=pipe, text=True) as run:
        assert run.stdout.readline() == "begun\n"
        assert len(os.listdir()) == 2
        run.send_signal(getattr(signal, name))
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err == "fastsoftmax apply: interrupted\n"
    assert os.listdir() == ["in.npy"]


def limited(kind, value):
    return lambda: resource.setrlimit(kind, (value, value))


def test_no_room_for_the_file():
    """The limit on the size of a file stands in for a full disk: what is reserved is not there."""
    np.save("in.npy", normal((3000, 4), F32))
    done = subprocess.run(
        [*COMMAND, "in.npy", "out.npy"],
        preexec_fn=limited(resource.RLIMIT_FSIZE, 20_000),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "fastsoftmax apply: out.npy: File too large\n"
    assert os.listdir() == ["in.npy"]


def test_full_disk(capsys, monkeypatch):
    np.save("in.npy", normal((3000, 4), F32))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "out.npy: No space left on device" in refused(capsys, "in.npy", "out.npy")


BOUNDED = """
import resource, sys
from fastsoftmax import __main__ as cli, apply
apply.BLOCK = 4 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
status = cli.main(["apply", "in.npy", "out.npy", "--axis", sys.argv[1]])
print(status, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB, and MADV_DONTNEED")
@pytest.mark.parametrize("shape, axis", [((4000, 4000), 1), ((4000, 4000), 0)], ids=str)
def test_memory_is_that_of_a_block(shape, axis):
    """64 MB in and out, of which 4 MB at a time: its pages in both maps, and the result."""
    np.save("in.npy", normal(shape, F32))
    code = [sys.executable, "-c", BOUNDED, str(axis)]
    status, grown = subprocess.check_output(code, text=True).split()
    assert status == "0" and int(grown) < 32 << 10
    x = np.load("in.npy", mmap_mode="r")
    part = (slice(None), slice(7)) if axis == 0 else slice(7)
    assert_same_bits(np.load("out.npy", mmap_mode="r")[part], fs.softmax(x[part], axis))


def test_progress_bar(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    shown = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(tqdm, "tqdm", lambda blocks, **_: shown.extend(blocks) or blocks)
    np.save("in.npy", normal((3000, 4), F32))
    monkeypatch.setattr(apply, "BLOCK", 1000)
    assert cli.main(["apply", "in.npy", "out.npy"]) == 0
    assert len(shown) == len(list(apply._blocks((3000, 4), -1, 4)))
