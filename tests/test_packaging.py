"""What an import does and says, in trees that are built and in trees that are not."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fastsoftmax as fs

PACKAGE = Path(fs.__file__).parent


def run(code, folder, *options, **environment):
    """Run code in a folder, which comes first on the path."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def unbuilt(tmp_path):
    """The package as it lies in a fresh clone, without the compiled core.

    Run it with -S: the finder of an editable install would lend it the core of this tree.
    """
    ignore = shutil.ignore_patterns("_core.*.so", "_core.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastsoftmax", ignore=ignore)
    return tmp_path


def test_unbuilt_tree_says_what_to_do(unbuilt):
    for code in ("import fastsoftmax", "import fastsoftmax.reference"):
        done = run(code, unbuilt, "-S")
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: the compiled core of fastsoftmax is missing from ")
        assert str(unbuilt / "fastsoftmax") in last
        assert "python -m pip install -e ." in last
        assert "another folder" in last
        assert "During handling" not in done.stderr


def test_other_import_errors_come_through(unbuilt):
    core = unbuilt / "fastsoftmax" / "_core.py"
    for code, message in (
        (
            "raise ImportError('FASTSOFTMAX_ISA must be ...')",
            "ImportError: FASTSOFTMAX_ISA must be",
        ),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "ImportError: cannot import name"),
    ):
        core.write_text(code)
        last = run("import fastsoftmax", unbuilt, "-S").stderr.strip().splitlines()[-1]
        assert last.startswith(message)


@pytest.mark.parametrize("variable", ["FASTSOFTMAX_ISA", "FASTSOFTMAX_NUM_THREADS"])
def test_bad_environment(variable):
    done = run("import fastsoftmax", PACKAGE.parent, **{variable: "dreadful"})
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert variable in last
    assert "dreadful" in last


def test_import_brings_in_numpy_only():
    code = """
import sys
import numpy
before = set(sys.modules)
import fastsoftmax
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    done = run(code, PACKAGE.parent)
    # Cython's shared types register themselves under a name of their own.
    third_party = [name for name in eval(done.stdout) if not name.startswith("_cython_")]
    assert third_party in (["fastsoftmax"], ["cython_runtime", "fastsoftmax"]), done.stderr


def test_version_is_the_same_everywhere():
    assert metadata.version("fastsoftmax") == fs.__version__
    assert fs.show_config(mode="dicts")["version"] == fs.__version__


def test_public_names():
    assert sorted(fs.__all__) == fs.__all__
    assert all(hasattr(fs, name) for name in fs.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_numpy_is_the_only_requirement():
    required = [r for r in metadata.requires("fastsoftmax") if "extra ==" not in r]
    assert required == ["numpy>=2.0"]


def test_console_script():
    (script,) = metadata.entry_points(group="console_scripts", name="fastsoftmax")
    assert script.value == "fastsoftmax.__main__:main"


def test_stub_names_what_the_core_has():
    stub = (PACKAGE / "_core.pyi").read_text()
    for name in set(fs.__all__) - {"__version__"}:
        assert f"def {name}(" in stub or f"class {name}:" in stub, name
