"""The caller's floating-point environment: it changes no result, and is left as found.

For attention see test_attention_bits.py, for the flags test_special.py.
"""

import subprocess
import sys

import pytest
from common import assert_same_bits, every_dtype, normal
from test_attention_bits import ROUNDINGS, Environment, needs_x86_glibc
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
