"""Teams of threads in hard surroundings: none to be had, fork meanwhile, Ctrl-C.

That many callers share the threads is tested in C (tests/c/driver.c, teams).
"""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from common import F32, assert_same_bits, normal
from test_threads import in_child

import fastsoftmax as fs

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def run(code, timeout=120):
    """Run `code` in a fresh interpreter; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout.strip()


@needs_linux
def test_no_thread_is_started_by_import_or_small_calls():
    code = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own
import numpy as np, fastsoftmax as fs
fs.set_num_threads(4)
fs.softmax(np.zeros((32, 10)))
fs.attention(*np.zeros((3, 2, 8, 4), np.float32))
print(len(os.listdir("/proc/self/task")))
fs.softmax(np.zeros((1000, 1000)))
print(len(os.listdir("/proc/self/task")) > 1 or not fs.show_config("dicts")["openmp"])
"""
    assert run(code).split() == ["1", "True"]


@needs_linux
@pytest.mark.parametrize("call", ["fs.softmax(x)", "fs.attention(x, x, x)"])
def test_threads_that_cannot_be_started_are_done_without(call):
    """libgomp by itself ends the process: with no room for a stack it cannot start a thread."""
    code = f"""
import os, resource
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np, fastsoftmax as fs
x = np.random.default_rng(0).standard_normal((8, 512, 64), np.float32)
with fs.num_threads(1):
    want = {call}
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (6 << 20), resource.RLIM_INFINITY))
with fs.num_threads(4):
    print(np.array_equal({call}, want), len(os.listdir("/proc/self/task")))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(np.array_equal({call}, want), len(os.listdir("/proc/self/task")))
"""
    limited, free = run(code).splitlines()
    assert limited == "True 1"
    assert free in ("True 4", "True 1" if not fs.show_config("dicts")["openmp"] else "")


@needs_linux
def test_threads_of_a_larger_stack_that_cannot_be_started():
    """The stacks of OMP_STACKSIZE: 512 MB each, where there is room for the usual ones."""
    code = """
import os, resource
import numpy as np, fastsoftmax as fs
x = np.random.default_rng(0).standard_normal((500, 1000), np.float32)
with fs.num_threads(1):
    want = fs.softmax(x)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20), resource.RLIM_INFINITY))
with fs.num_threads(4):
    print(np.array_equal(fs.softmax(x), want), len(os.listdir("/proc/self/task")))
"""
    for value in ("512M", "524288", "0.5g", "512 m"):
        env = os.environ | {"OMP_STACKSIZE": value, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (value, done.stderr)
        if value != "0.5g":  # which libgomp does not understand, either
            assert done.stdout.split() == ["True", "1"], value


@needs_linux
def test_no_more_processes():
    """RLIMIT_NPROC, which root does not feel: root becomes somebody else first."""
    code = """
import os, resource
os.environ["OPENBLAS_NUM_THREADS"] = "1"
import numpy as np, fastsoftmax as fs
x = np.random.default_rng(0).standard_normal((500, 1000), np.float32)
with fs.num_threads(1):
    want = fs.softmax(x)
if os.getuid() == 0:
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
with fs.num_threads(4):
    print(np.array_equal(fs.softmax(x), want), len(os.listdir("/proc/self/task")))
"""
    assert run(code).split() == ["True", "1"]


GROUP = "/sys/fs/cgroup"
NO_LIMIT = str(2**31 - 1)
QUOTAS = {
    "none": ({}, NO_LIMIT),
    "v2, inside a container": ({f"{GROUP}/cpu.max": "150000 100000"}, "2"),
    "v2, no limit": ({f"{GROUP}/cpu.max": "max 100000"}, NO_LIMIT),
    "v2, the group's own": (
        {"/proc/self/cgroup": "0::/a/b\n", f"{GROUP}/a/b/cpu.max": "300000 100000"},
        "3",
    ),
    "v2, a group above has less": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            f"{GROUP}/a/b/cpu.max": "max 100000",
            f"{GROUP}/a/cpu.max": "50000 100000",
        },
        "1",
    ),
    "v1": ({f"{GROUP}/cpu/cpu.cfs_quota_us": "400000",
            f"{GROUP}/cpu/cpu.cfs_period_us": "100000"}, "4"),
    "v1, no limit": ({f"{GROUP}/cpu/cpu.cfs_quota_us": "-1",
                      f"{GROUP}/cpu/cpu.cfs_period_us": "100000"}, NO_LIMIT),
    "v1, the group's own": (
        {
            "/proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/x\n",
            f"{GROUP}/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000",
            f"{GROUP}/cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000",
        },
        "5",
    ),
    "v1, another controller's group": (
        {
            "/proc/self/cgroup": "4:memory:/m\n",
            f"{GROUP}/cpu/m/cpu.cfs_quota_us": "100000",
            f"{GROUP}/cpu/m/cpu.cfs_period_us": "100000",
        },
        NO_LIMIT,
    ),
    "nonsense": ({f"{GROUP}/cpu.max": "", "/proc/self/cgroup": "no colon\n"}, NO_LIMIT),
}  # fmt: skip


@needs_linux
def test_cgroup_quotas(c_program):
    program = c_program("quota")
    for name, (files, want) in QUOTAS.items():
        assert program(*[part for pair in files.items() for part in pair]) == [want], name


@pytest.mark.skipif(not fs.show_config("dicts")["openmp"], reason="built without OpenMP")
def test_threadpoolctl(threads):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    code = """
import threadpoolctl, fastsoftmax as fs
fs.set_num_threads(4)
counts = [fs.get_num_threads()]
for limit in (1, 2, 64):
    with threadpoolctl.threadpool_limits(limit, user_api="openmp"):
        counts.append(fs.get_num_threads())
print(*counts, fs.get_num_threads())
"""
    assert threadpoolctl.threadpool_info()
    env = os.environ | {"OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "1", "2", "4", "4"], done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_is_inside_a_call():
    x = normal((2000, 1000), F32)
    stop = threading.Event()

    def work():
        out = np.empty_like(x)
        with fs.num_threads(3):
            while not stop.is_set():
                fs.softmax(x, out=out)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        want = fs.softmax(x)
        for _ in range(5):
            assert in_child(lambda: assert_same_bits(fs.softmax(x), want)) == 0
            time.sleep(0.003)
    finally:
        stop.set()
        worker.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_pool_of_forked_workers():
    code = """
import multiprocessing as mp, warnings
import numpy as np, fastsoftmax as fs
warnings.simplefilter("ignore")
x = np.random.default_rng(0).standard_normal((8, 200, 64), np.float32)
def both(_):
    return fs.softmax(x).tobytes(), fs.attention(x, x, x).tobytes()
want = both(0)
with mp.get_context("fork").Pool(3) as pool:
    print(all(got == want for got in pool.map(both, range(12))))
print(both(0) == want)
"""
    assert run(code).split() == ["True", "True"]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize(
    "prepare, call",
    [
        ("x = np.broadcast_to(np.float64(1), (1, 2**33))", "fs.logsumexp(x)"),
        ("x = np.ones(2**27, 'f2')\nfs.set_num_threads(1)",
         "while True: fs.softmax(x, temperature=2.0, out=x)"),
        ("q, k, v = np.ones((3, 64, 16384, 64), 'f4'); mask = np.ones((64, 1, 16384), bool);"
         "bias = np.ones((16384, 1), 'f4')", "fs.attention(q, k, v, mask=mask, bias=bias)"),
        ("q = np.ones((64, 1, 64), 'f4'); k = np.broadcast_to(q, (64, 2**22, 64))",
         "fs.attention(q, k, k)"),
        ("q = np.ones((64, 4096, 64), 'f4'); lse = np.zeros((64, 4096), 'f4')",
         "fs.attention_backward(q, q, q, q, q, lse)"),
        ("q, lse = [np.broadcast_to(np.float32(1), shape) for shape in ((2**22, 64), 2**22)]",
         "while True: fs.merge_attention(q, lse, q, lse)"),
        ("x = np.broadcast_to(np.float64(1), (1, 2**33))", "fs.cross_entropy(x, [0])"),
    ],
    ids=["logsumexp of one huge row", "one huge row", "attention", "one query", "gradients",
         "merge", "cross entropy of one huge row"],
)  # fmt: skip
def test_ctrl_c(prepare, call):
    """KeyboardInterrupt soon, inputs intact, and the next call works."""
    code = f"""
import os, signal, threading, time
import numpy as np, fastsoftmax as fs
{prepare}
def interrupt():
    time.sleep(0.5)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    {call}
    print("done")
except KeyboardInterrupt:
    print(time.monotonic() - sent)
assert abs(float(fs.softmax([0.0, 0.0])[0]) - 0.5) < 1e-9
for name in ("q", "k", "v", "mask", "bias"):
    a = globals().get(name, np.ones(1))
    once = tuple(slice(1 if stride == 0 else None) for stride in a.strides)
    assert (a[once] == 1).all(), name + " has changed"
"""
    assert float(run(code)) < 0.3, "seconds from the signal to the exception"


def test_an_interrupt_leaves_the_handler_alone():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
