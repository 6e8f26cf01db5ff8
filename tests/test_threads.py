"""Threads, processes and the environment: fork, Python threads, the variables read on import."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from common import F32, F64, FAMILY, FLOATS, ISAS, KNOWN_ISAS, assert_same_bits, normal

import fastsoftmax as fs
from fastsoftmax import ufuncs

LONG = 400_000


# --- fork -----------------------------------------------------------------------------------------


def in_child(work, timeout=30):
    """Run `work` in a forked child; its exit status, or a failure if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork of a multi-threaded process
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"the forked child hangs (no result after {timeout} s)")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_forked_child_can_call(isa, threads):
    """After a parallel call in the parent: its thread pool does not exist in the child."""
    x = normal(LONG, F32)
    with fs.num_threads(threads):
        want = fs.softmax(x)

        def work():
            assert_same_bits(fs.softmax(x), want)
            assert_same_bits(fs.softmax(x.reshape(-1, 100), 0), columns)
            with fs.num_threads(3):
                assert_same_bits(fs.softmax(x), want)

        columns = fs.softmax(x.reshape(-1, 100), 0)
        assert in_child(work) == 0
        assert in_child(lambda: in_child(work) and os._exit(1)) == 0  # and a child of the child
        assert_same_bits(fs.softmax(x), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_child_helper_notices_a_failure():
    def fail():
        raise AssertionError

    assert in_child(fail) == 1


# --- Python threads -------------------------------------------------------------------------------


def test_blocks_that_do_not_end_in_order():
    def block(n):
        with fs.num_threads(n):
            yield

    before = fs.get_num_threads()
    inner = block(1)
    next(inner)
    with fs.num_threads(2):
        inner.close()
        assert fs.get_num_threads() == 2
    assert fs.get_num_threads() == before


def test_one_object_in_two_threads():
    """Who enters first leaves first."""
    scope = fs.num_threads(3)
    one_is_in, both_are_in, one_is_out = (threading.Event() for _ in range(3))

    def one():
        before = fs.get_num_threads()
        try:
            with scope:
                one_is_in.set()
                both_are_in.wait()
            return fs.get_num_threads() == before
        finally:
            one_is_out.set()

    def other():
        one_is_in.wait()
        before = fs.get_num_threads()
        with scope:
            both_are_in.set()
            one_is_out.wait()
            return fs.get_num_threads() == 3 != before

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(one), pool.submit(other)]
    assert all(done.result() for done in both)


@pytest.mark.parametrize("rounds", [1, pytest.param(8, marks=pytest.mark.full)])
def test_eight_python_threads_give_the_same_bits(isa, rounds):
    """Mixed functions, dtypes and sizes at once, each thread with a count of its own; over a
    hundred calls in each, or over a thousand."""
    shapes = (9, 100), (1000, 24), (70_000,), (130, 513)
    inputs = [normal(shape, dtype) for shape in shapes for dtype in FLOATS]
    functions = (*FAMILY, fs.logsumexp)
    calls = [(f, x, axis) for f in functions for x in inputs for axis in {0, x.ndim - 1}]
    for queries in (1, 80):
        q, k = normal((4, queries, 16), F32), normal((2, 1200, 16), F32)
        out, lse = fs.attention(q, k, k, return_lse=True)
        packed = [a.swapaxes(0, 1) for a in (q, k, k)]
        calls += [
            (fs.attention, q, k, k),
            (fs.attention_backward, q, q, k, k, out, lse),
            (fs.merge_attention, out, lse, q, lse),
            (fs.attention_varlen, *packed, [0, 1, queries], [0, 500, 1200]),
        ]
    logits, labels = normal((1500, 40), F32), np.arange(1500) % 40
    calls += [(fs.cross_entropy, logits, labels), (ufuncs.softmax, logits)]

    def parts(result):
        return result if isinstance(result, tuple) else (result,)

    with fs.num_threads(1):
        want = [parts(f(*arguments)) for f, *arguments in calls]
    failures, start = [], threading.Barrier(8)

    def work(k):
        try:
            start.wait(30)
            with fs.num_threads(k % 3 + 1):
                for i in np.random.default_rng(k).permutation(rounds * len(calls)) % len(calls):
                    f, *arguments = calls[i]
                    for got, right in zip(parts(f(*arguments)), want[i], strict=True):
                        assert_same_bits(got, right, (f.__name__, np.shape(arguments[0])))
                    assert fs.get_num_threads() == k % 3 + 1
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60 * rounds)
    assert not any(worker.is_alive() for worker in workers), "a thread hangs"
    assert not failures, failures[0]


def test_the_gil_is_released(isa):
    """Other Python threads run while a long row is computed."""
    x, out = normal(4_000_000, F64), np.empty(4_000_000)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.0005)

    worker = threading.Thread(target=tick, daemon=True)
    worker.start()
    try:
        began = time.monotonic()
        with fs.num_threads(1):
            for _ in range(20):
                fs.softmax(x, out=out)
        ended = time.monotonic()
    finally:
        stop.set()
        worker.join(10)
    during = sum(began < t < ended for t in ticks)
    # Were the lock held, the other thread would run about once per call, between two of them.
    assert during > 45 or ended - began < 0.1, f"{during} ticks in {ended - began:.2f} s"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer here")
def test_a_signal_handler_runs_during_a_long_call():
    """Work is cut into slices of <= 50 ms with a look at the signals in between."""
    row = normal(200_000, F64)
    x = np.broadcast_to(row, (20_000, row.size))  # many seconds of work, no memory

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with fs.num_threads(1):
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                fs.logsumexp(x, -1)
            took = time.monotonic() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert took < 1, f"the handler ran after {took:.2f} s"
    assert_same_bits(fs.logsumexp(x[:2], -1), np.repeat(fs.logsumexp(row), 2))


# --- environment ----------------------------------------------------------------------------------


def run(code, **env):
    """Run `code` in a fresh interpreter with these variables and none of ours or OpenMP's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSOFTMAX_", "OMP_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=120
    )


def printed(code, **env):
    done = run(f"import fastsoftmax as fs; print({code})", **env)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


needs_openmp = pytest.mark.skipif(
    not fs.show_config(mode="dicts")["openmp"], reason="built without OpenMP"
)


@needs_openmp
def test_thread_variables():
    cpus = printed("fs.get_num_threads()")
    assert 1 <= int(cpus) <= len(os.sched_getaffinity(0))
    assert printed("fs.get_num_threads()", OMP_NUM_THREADS="3") == "3"
    assert printed("fs.get_num_threads()", FASTSOFTMAX_NUM_THREADS="5") == "5"
    both = {"FASTSOFTMAX_NUM_THREADS": "4", "OMP_NUM_THREADS": "7"}
    assert printed("fs.get_num_threads()", **both) == "4"


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_affinity_limits_the_threads():
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{cpu}}}); import fastsoftmax as fs"
    done = run(f"{code}; print(fs.get_num_threads())")
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize(
    "value", ["0", "-1", "two", "1.5", "", " ", "1025", "99999999999999999999"]
)
def test_bad_thread_variable(value):
    done = run("import fastsoftmax", FASTSOFTMAX_NUM_THREADS=value)
    if not value.strip():
        return  # an empty variable may count as unset
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "FASTSOFTMAX_NUM_THREADS" in last
    assert value in last and "1024" in last


@pytest.mark.parametrize("name", ISAS)
def test_isa_variable(name):
    assert printed("fs.isa(), *fs.available_isas()", FASTSOFTMAX_ISA=name) == " ".join(
        (name, *ISAS)
    )


@pytest.mark.parametrize("name", ["mmx", "AVX-512", "neon" if "neon" not in ISAS else "avx2"])
def test_bad_isa_variable(name):
    done = run("import fastsoftmax", FASTSOFTMAX_ISA=name)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and "FASTSOFTMAX_ISA" in last and name in last
    assert any(known in last for known in KNOWN_ISAS) and "scalar" in last


def test_import_is_quiet_and_light():
    """No output, no thread started, ml_dtypes neither imported nor needed."""
    code = (
        "import sys, threading; sys.modules['ml_dtypes'] = None; import fastsoftmax as fs;"
        "assert threading.active_count() == 1;"
        "print(fs.softmax([0, 0]), {'scipy', 'torch', 'mpmath'} & set(sys.modules))"
    )
    done = run(code)
    assert (done.stdout.strip(), done.stderr) == ("[0.5 0.5] set()", "")
