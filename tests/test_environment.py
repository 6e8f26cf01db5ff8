"""The caller's floating-point environment: it changes no result, and is left as found.

For attention see test_attention_bits.py, for the flags test_special.py.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import F32, assert_same_bits, every_dtype, normal
from test_attention_bits import FTZ_AND_DAZ, ROUNDINGS, Environment, needs_x86_glibc
from test_special import specials

import fastsoftmax as fs


@needs_x86_glibc
@every_dtype
def test_modes_of_the_caller_do_not_matter(isa, dtype):
    """Rounding, FTZ and DAZ, on one thread and several, small, large and with options."""
    x, large = specials(dtype), normal((400, 200), dtype, 20.0)
    calls = [
        lambda: fs.softmax(x),
        lambda: fs.log_softmax(large.T, 0),
        lambda: fs.softmax(large, bias=large[0], temperature=0.3),
        lambda: fs.logsumexp(large, b=large),
        lambda: fs.softmax_backward(large, fs.softmax(large), temperature=0.7),
    ]
    want = [call() for call in calls]
    for rounding in ROUNDINGS.values():
        for flush in (False, True):
            for count in (1, 2):
                with fs.num_threads(count), Environment(rounding, flush) as environment:
                    got = [call() for call in calls]
                assert environment.now[7] & 0xFFC0 == environment.mine[7] & 0xFFC0, "the modes"
                for number, (g, w) in enumerate(zip(got, want, strict=True)):
                    assert_same_bits(g, w, (number, rounding, flush, count))


@needs_x86_glibc
@pytest.mark.parametrize("mxcsr", [0x1F80, 0xFFC0], ids=["usual", "FTZ, DAZ, to zero"])
def test_import_leaves_the_environment_alone(mxcsr):
    code = f"""
import ctypes, numpy as np
libm, words = ctypes.CDLL("libm.so.6"), np.zeros(8, np.uint32)
where = words.ctypes.data_as(ctypes.c_void_p)
libm.fegetenv(where)
words[7] = {mxcsr}
libm.fesetenv(where)
import fastsoftmax
libm.fegetenv(where)
print(words[7] & 0xFFC0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(mxcsr), done.stderr


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """tests/c/workers.c, which sees the threads that OpenMP keeps for this one."""
    if not shutil.which("cc") or not fs.show_config("dicts")["openmp"]:
        pytest.skip("needs a C compiler and OpenMP")
    library = tmp_path_factory.mktemp("workers") / "workers.so"
    source = Path(__file__).with_name("c") / "workers.c"
    subprocess.run(["cc", "-fopenmp", "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(library)


@needs_x86_glibc
def test_the_workers_keep_their_modes(isa, workers):
    """What a thread of the team had set before, its flags included, it has afterwards, and it makes
    no difference to results, on whatever thread they are computed."""
    count = 3
    mxcsr, ids = np.zeros(count, np.uint32), np.zeros(count, np.int32)

    def now():
        workers.get_workers(count, *(a.ctypes.data_as(ctypes.c_void_p) for a in (mxcsr, ids)))
        return mxcsr.tolist(), ids.tolist()

    large, row = normal((400, 200), F32, 30.0), normal(200_000, F32, 30.0)
    q = normal((4, 200, 16), F32)
    out, lse = fs.attention(q, q, q, return_lse=True)
    calls = [
        lambda: fs.softmax(large),
        lambda: fs.log_softmax(large.T, 0),
        lambda: fs.softmax(row),
        lambda: fs.softmax(large, bias=large[0]),
        lambda: fs.attention(q, q, q),
        lambda: fs.attention(q[:, :1], np.tile(q, (1, 20, 1)), np.tile(q, (1, 20, 1))),
        lambda: fs.attention_backward(q, q, q, q, out, lse)[1],
    ]
    with fs.num_threads(1):
        want = [call() for call in calls]
    usual = now()[0][1]
    try:
        for rounding in ROUNDINGS.values():
            # The exceptions are masked; the two workers have different flags.
            workers.set_workers(count, 0x1F80 | rounding << 3 | FTZ_AND_DAZ)
            before = now()
            with fs.num_threads(count):
                for number, (call, right) in enumerate(zip(calls, want, strict=True)):
                    assert_same_bits(call(), right, (number, rounding))
                    assert now() == before, (number, rounding)
    finally:
        workers.set_workers(count, usual & ~1)
    assert len(os.listdir("/proc/self/task")) >= count
