"""Fixtures and reporting. Every test with an ``isa`` argument runs once per ISA of this CPU."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from common import BF16, ISAS, KNOWN_ISAS, use_isa
from hypothesis import HealthCheck, settings

import fastsoftmax

# The same examples in every run, so that a failure is the change's. To search for new ones:
# HYPOTHESIS_PROFILE=search python -m pytest tests/test_hypothesis.py
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", derandomize=True, database=None, max_examples=120, **_COMMON)
settings.register_profile("search", max_examples=3000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_MAXIMA = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_MAXIMA] = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a script's `command &` starts it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config):
    missing = [name for name in KNOWN_ISAS if name not in ISAS]
    return [
        f"fastsoftmax {fastsoftmax.__version__}, ISAs under test: {', '.join(ISAS)}"
        f" (this CPU or build cannot run: {', '.join(missing) or 'none missing'})"
    ]


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    # Last, so that the ISA varies fastest: an oracle computed once (lru_cache) serves every ISA.
    if "isa" in metafunc.fixturenames:
        # amx is avx512 in all but the products of attention.
        apart = any(name in metafunc.definition.nodeid for name in ("attention", "fuzz"))
        isas = [isa for isa in ISAS if isa != "amx" or apart]
        metafunc.parametrize("isa", isas, indirect=True)


def pytest_collection_modifyitems(config, items):
    """And of these only in those of bfloat16."""

    def same(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("isa") == "amx" and parameters.get("dtype", BF16) != BF16

    config.hook.pytest_deselected(items=list(filter(same, items)))
    items[:] = [item for item in items if not same(item)]


@pytest.fixture
def isa(request):
    """The name of an ISA; every call inside the test uses it."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """``fastsoftmax.set_num_threads``, undone after the test."""
    before = fastsoftmax.get_num_threads()
    yield fastsoftmax.set_num_threads
    fastsoftmax.set_num_threads(before)


@pytest.fixture
def c_program(tmp_path):
    """Compiles a program of tests/c, which includes one of src_c: a function of its arguments that
    gives the words it prints. For tests/coverage.sh it counts what runs."""
    tests = Path(__file__).parent
    sources = tests.parent / "src_c"
    if not (shutil.which("cc") and sources.exists()):
        pytest.skip("needs a C compiler, and the sources")
    flags = ["--coverage"] if os.environ.get("FASTSOFTMAX_COVERAGE") == "1" else []

    def compiled(name):
        program = tmp_path / name
        command = ["cc", "-std=c11", "-pthread", *flags, "-I", sources, tests / f"c/{name}.c"]
        subprocess.run([*command, "-o", program], check=True)
        return lambda *arguments: subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=True
        ).stdout.split()

    return compiled


@pytest.fixture
def record_max(request):
    """Assert ``max(errors) <= bound`` and print the maximum at the end of the run.

    A NaN among the errors fails. Measurements under one name share a line in the summary.
    """
    maxima = request.config.stash[_MAXIMA]

    def check(name, errors, bound, what="", unit="ulp"):
        worst = float(np.max(errors, initial=0.0))
        seen, _, _ = maxima.get(name, (0.0, bound, unit))
        maxima[name] = worst if worst != worst else max(seen, worst), bound, unit
        assert worst <= bound, f"{name} {what}: error {worst:.4g} {unit}, bound {bound:.4g}"

    return check


def pytest_terminal_summary(terminalreporter, config):
    maxima = config.stash[_MAXIMA]
    if not maxima:
        return
    terminalreporter.section("largest errors measured, and their bounds")
    width = max(map(len, maxima))
    for name, (worst, bound, unit) in sorted(maxima.items()):
        terminalreporter.line(f"{name:{width}}  {worst:8.4f}  <= {bound:<7.5g} {unit}")
