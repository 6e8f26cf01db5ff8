"""The performance tests: the cases and the implementations of `fastsoftmax bench`.

    python -m pytest tests/perf                      # every case, smaller, for correctness, untimed
    python -m pytest tests/perf -m perf              # timed (extra [bench])
    python -m pytest tests/perf -m perf -k "attention and decode and (torch or fastsoftmax)"

As in the command each implementation has a process of its own, which checks its result before it
measures: a round is a turn of that process, and its time the best of one call during the turn.
"""

import pytest

import fastsoftmax as fs
from fastsoftmax import _core
from fastsoftmax.bench.cases import SUITES
from fastsoftmax.bench.measure import Worker, checked_call
from fastsoftmax.bench.peers import FLOOR, IMPLEMENTATIONS, US

ROUNDS, SECONDS = 5, 0.2
CASES = [
    pytest.param(case, id=f"{suite}-{group}-{case}")
    for suite, groups in SUITES.items()
    for group, cases in groups.items()
    for case in cases
]


@pytest.mark.parametrize("case", CASES)
def test_right(case):
    """Ours, once, on fewer rows, heads, queries and keys than are measured."""
    if case.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    checked_call(US, case.small())


def test_operations(isa):
    """The floor of attention does what it says it did: FMAs of whole vectors, so many a step."""
    one = _core._multiply_add(1, isa)
    assert one >= 24
    assert _core._multiply_add(1000, isa) == 1000 * one
    assert _core._multiply_add(0, isa) == 0


class Clock:
    """The time that the workers say has passed: the timer of pytest-benchmark here."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="session")
def worker():
    """The worker of an implementation, started when it is first asked for."""
    started = {}

    def get(name):
        if name not in started:
            started[name] = Worker(name, fs.get_num_threads())
        return started[name]

    yield get
    for process in started.values():
        process.close()


@pytest.mark.perf
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_speed(case, name, worker, request):
    pytest.importorskip("pytest_benchmark")
    answer = worker(name).time(case, 0)
    if isinstance(answer, str):
        assert name not in (US, FLOOR), answer
        pytest.skip(f"{name}: {answer}")

    clock = Clock()
    request.applymarker(pytest.mark.benchmark(group=str(case), timer=clock))
    benchmark = request.getfixturevalue("benchmark")
    work, unit = case.work

    def turn():
        clock.now += worker(name).time(case, SECONDS)

    benchmark.pedantic(turn, rounds=ROUNDS)
    benchmark.extra_info.update(implementation=name, work=work, unit=unit)
