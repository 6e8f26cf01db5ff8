"""The examples that users read are run: docstrings, those of compat and the oracle, the pages."""

import doctest
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from common import PUBLIC

import fastsoftmax as fs
from fastsoftmax import compat, reference, reference_gradients, ufuncs
from fastsoftmax.compat import scipy, torch

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]  # none beside an installed copy


@pytest.fixture(autouse=True)
def printing():
    """Examples print arrays with NumPy's own defaults; what they set is undone."""
    before = fs.get_num_threads()
    with np.printoptions():
        yield
    fs.set_num_threads(before)


def run(text, name, source):
    globs = {"np": np, "fastsoftmax": fs, "fs": fs, **{n: getattr(fs, n) for n in PUBLIC}}
    test = doctest.DocTestParser().get_doctest(text, globs, name, source, 0)
    output = []
    failed, tried = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=output.append)
    assert not failed, "".join(output)
    return tried


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstring(name):
    """Every example is right, and the functions that compute have at least one."""
    tried = run(inspect.getdoc(getattr(fs, name)), name, "docstring")
    if "softm" in name or name == "logsumexp":
        assert tried, f"{name} has no example"


@pytest.mark.parametrize("name", [n for n in PUBLIC if "softm" in n or n == "logsumexp"])
def test_public_docstring_is_numpydoc(name):
    """Sections, and a line for every parameter."""
    assert_numpydoc(getattr(fs, name))


def assert_numpydoc(function):
    name, doc = function.__name__, inspect.getdoc(function)
    returns = () if name == "register" else ("Returns\n-------",)
    for section in ("Parameters\n----------", *returns, "Examples\n--------"):
        assert section in doc, f"{name}: no section {section.splitlines()[0]}"
    parameters = re.split(r"\n\w+\n----", doc.split("Parameters\n----------\n")[1])[0]
    documented = set(
        re.findall(r"\w+", " ".join(re.findall(r"^(\w[\w, ]*?) ?(?::|$)", parameters, re.M)))
    )
    missing = set(inspect.signature(function).parameters) - documented
    assert not missing, f"{name} does not document {missing}"


def test_package_docstring():
    assert fs.__doc__
    run(fs.__doc__, "fastsoftmax", "docstring")


@pytest.mark.parametrize("module", [scipy, torch], ids=lambda module: module.__name__)
def test_compat(module):
    """Every function has an example, and a line for every parameter."""
    run(module.__doc__, module.__name__, "docstring")
    for name in module.__all__:
        function = getattr(module, name)
        assert run(inspect.getdoc(function), name, "docstring"), f"{name} has no example"
        assert_numpydoc(function)


@pytest.mark.parametrize("name", ["dask", "awkward"])
def test_arrays_of_other_libraries(name):
    """Their functions, likewise."""
    test_compat(pytest.importorskip(f"fastsoftmax.{name}", exc_type=ImportError))


def test_compat_docstring():
    assert run(compat.__doc__, "fastsoftmax.compat", "docstring")


def test_ufuncs():
    assert run(ufuncs.__doc__, "fastsoftmax.ufuncs", "docstring")
    for name in ufuncs.__all__:
        assert run(getattr(ufuncs, name).__doc__, name, "docstring"), f"{name} has no example"


@pytest.mark.parametrize("module", [reference, reference_gradients], ids=lambda m: m.__name__)
def test_reference(module):
    finder = doctest.DocTestFinder()
    tests = finder.find(module, "reference", globs={**vars(module), "reference": reference})
    assert sum(len(t.examples) for t in tests), f"{module.__name__} has no examples"
    for test in tests:
        output = []
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=output.append)
        assert not failed, "".join(output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page):
    """The Python sessions of a page, in order, in one namespace; there is no other Python."""
    blocks = re.findall(r"^```(\S*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    sessions = [text for kind, text in blocks if kind == "pycon"]
    assert not [text for kind, text in blocks if kind in ("python", "py")], "it would not be run"
    assert all(">>>" in text for text in sessions)
    if page.stem == "dask":
        pytest.importorskip("dask.array")
    run("\n".join(sessions), page.name, str(page))


def test_readme_has_a_session():
    if PAGES:
        assert ">>>" in PAGES[0].read_text("utf-8")
