"""Forked processes compute, with threads of their own: children, pools, pre-fork servers.

libgomp by itself waits for ever in a child for the threads that the parent had.
"""

import os
import socket
import subprocess
import sys
import threading

import pytest
from common import F32, assert_same_bits, normal
from test_teams import run
from test_threads import in_child, needs_openmp

import fastsoftmax as fs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork, and a look into /proc")


def tasks():
    return len(os.listdir("/proc/self/task"))


def check_with_threads(x, want):
    """In a child: one thread at first, several after a call, and the same bits."""
    assert tasks() == 1
    assert fs.get_num_threads() == 3
    assert_same_bits(fs.softmax(x), want)
    assert tasks() == 3


@needs_openmp
def test_a_child_has_threads_and_so_has_its_child():
    x = normal((1000, 300), F32)
    with fs.num_threads(3):
        want = fs.softmax(x)

        def work():
            check_with_threads(x, want)
            assert in_child(lambda: check_with_threads(x, want)) == 0
            assert_same_bits(fs.softmax(x), want)

        for _ in range(3):
            assert in_child(work) == 0
            assert_same_bits(fs.softmax(x), want)


@needs_openmp
def test_forked_by_another_thread_than_that_which_called():
    """And while that one is inside a call."""
    x = normal((1000, 300), F32)
    want, stop, codes = fs.softmax(x), threading.Event(), []

    def calls():
        with fs.num_threads(2):
            while not stop.is_set():
                fs.softmax(x)

    def forks():
        with fs.num_threads(3):
            codes.extend(in_child(lambda: check_with_threads(x, want)) for _ in range(5))

    with fs.num_threads(2):
        fs.softmax(x)
        workers = [threading.Thread(target=f) for f in (calls, forks)]
        for worker in workers:
            worker.start()
        workers[1].join(100)
        stop.set()
        workers[0].join(100)
    assert codes == [0] * 5


def test_joblib():
    pytest.importorskip("joblib")
    code = """
import os, warnings
import joblib, numpy as np, fastsoftmax as fs
x = np.random.default_rng(0).standard_normal((8, 200, 64), np.float32)
def both():
    return fs.softmax(x).tobytes(), fs.attention(x, x, x).tobytes()
want = both()
warnings.simplefilter("ignore")
for backend in ("loky", "multiprocessing", "threading"):
    got = joblib.Parallel(2, backend=backend)(joblib.delayed(both)() for _ in range(6))
    print(backend, all(g == want for g in got) and both() == want)
"""
    lines = run(code).splitlines()
    assert lines == ["loky True", "multiprocessing True", "threading True"]


def test_a_pre_fork_server():
    """As gunicorn with preload: the master imports, computes, listens and forks; workers answer."""
    code = """
import os, signal, socket, warnings
import numpy as np, fastsoftmax as fs
warnings.simplefilter("ignore")
fs.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((500, 1000), np.float32)
want = fs.softmax(x).tobytes()
server = socket.create_server(("127.0.0.1", 0))
workers = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        while True:
            connection, _ = server.accept()
            same = fs.softmax(x).tobytes() == want
            connection.sendall(b"%d %d" % (os.getpid(), same))
            connection.close()
    workers.append(pid)
print(server.getsockname()[1], *workers, flush=True)
input()
assert fs.softmax(x).tobytes() == want
for pid in workers:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""
    master = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        port, *pids = map(int, master.stdout.readline().split())
        answers = []
        for _ in range(12):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                answers.append(connection.recv(100).split())
        assert all(same == b"1" for _, same in answers), answers
        assert {int(pid) for pid, _ in answers} <= set(pids)
        master.communicate("\n", timeout=60)
        assert master.returncode == 0
    finally:
        master.kill()
        master.wait()
