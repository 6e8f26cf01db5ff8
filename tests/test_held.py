"""What other code does to the arguments during a call cannot crash it.

NumPy refuses to resize an array that a call holds, also with refcheck=False; a shape set meanwhile
is the array's, not the call's; numbers that are addresses (kv_lengths, q_offset) are copied.
"""

import sys
import threading
import warnings

import numpy as np
import pytest
from common import F32, F64, assert_same_bits, normal

import fastsoftmax as fs

SIZE, ROUNDS = 200_000, 8


def during(call, disturb):
    """Do `disturb` over and over while `call` runs, again and again; what it raised."""
    stop, errors, done = threading.Event(), set(), 0

    def other():
        nonlocal done
        while not stop.is_set():
            try:
                disturb()
            except ValueError as error:
                errors.add(str(error).split()[0])
            done += 1

    worker = threading.Thread(target=other)
    worker.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(ROUNDS):
            call()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        worker.join()
    assert done > 0
    return errors


def resizer(array):
    """Grows and shrinks an array behind NumPy's back, whatever refers to it."""

    def resize():
        array.resize((array.size + SIZE,), refcheck=False)
        array.resize((SIZE,), refcheck=False)

    return resize


@pytest.mark.parametrize("threads", [1, 3])
def test_another_thread_resizes_an_array(isa, threads):
    x, bias = normal(SIZE, F32), np.zeros(SIZE, F32)
    for name in ("x", "bias", "out"):
        arrays = {"x": x.copy(), "bias": bias.copy(), "out": np.empty(SIZE, F32)}
        for call in (
            lambda a: fs.softmax(a["x"], out=a["out"]),
            lambda a: fs.softmax(a["x"], bias=a["bias"], out=a["out"]),
            lambda a: fs.logsumexp(a["x"][::2], out=np.empty((), F32)),
            lambda a: fs.softmax_backward(a["x"], a["bias"], out=a["out"]),
        ):

            def attempt(call=call, arrays=arrays, threads=threads):
                try:
                    with fs.num_threads(threads):
                        call(arrays)
                except ValueError:  # the shapes do not fit: it was resized between two calls
                    pass

            during(attempt, resizer(arrays[name]))


def set_shape(array, shape):
    """NumPy 2.5 warns, but it is still what other code may do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        array.shape = shape


def test_resizing_is_refused_during_a_call_and_not_afterwards():
    refused = []

    class Meanwhile:
        """An argument whose conversion is a chance for other code to run."""

        def __init__(self, target):
            self.target = target

        def __array__(self, dtype=None, copy=None):
            with pytest.raises(ValueError, match="resize"):
                self.target.resize((10**6,), refcheck=False)
            refused.append(True)
            set_shape(self.target, (4, 25))
            return np.zeros(100, F32)

    x = normal(100, F32).copy()
    want = fs.softmax(x)
    for view in (x, x[:], x[::-1][::-1]):  # it is the owner of the memory that is resized
        set_shape(x, (100,))
        assert_same_bits(fs.softmax(view, bias=Meanwhile(x)).ravel(), want)
    del view
    x.resize((7,), refcheck=False)
    assert x.shape == (7,) and len(refused) == 3


def test_an_argument_cannot_change_out_after_it_was_checked():
    q = normal((3, 4), F32)
    want = fs.attention(q, q, q)
    for harm in (
        lambda out: out.resize((1,), refcheck=False),
        lambda out: set_shape(out, (12,)),
        lambda out: out.setflags(write=False),
    ):
        out = np.empty((3, 4), F32)

        class Bias:
            def __array__(self, dtype=None, copy=None, harm=harm, out=out):
                try:
                    harm(out)
                except ValueError:
                    pass
                return np.zeros((3, 3), F32)

        assert fs.attention(q, q, q, bias=Bias(), out=out) is out
        assert_same_bits(out.reshape(3, 4), want)


@pytest.mark.parametrize("name", ["kv_lengths", "q_offset"])
@pytest.mark.parametrize("queries", [1, 4])
def test_numbers_that_are_addresses_are_copied(isa, name, queries):
    """In range when they are looked at, far away before they are used."""
    q, k = normal((3, 1, queries, 8), F32), normal((3, 1, 300, 8), F32)
    numbers = np.full(3, 200)
    want = fs.attention(q, k, k, **{name: numbers}, is_causal=True, sinks=np.zeros(1, F32))

    class Sinks:
        def __array__(self, dtype=None, copy=None):
            numbers[...] = 2**62
            return np.zeros(1, F32)

    got = fs.attention(q, k, k, **{name: numbers}, is_causal=True, sinks=Sinks())
    assert (numbers == 2**62).all()
    assert_same_bits(got, want)


def test_another_thread_writes_to_an_input(isa):
    """Any result, no crash: no address depends on a value."""
    x = normal((150, 250), F64)

    def disturb():
        x[::3] = np.nan
        x[::5] = 1e300
        x[...] = -np.inf
        x[...] = 1

    during(lambda: (fs.softmax(x), fs.logsumexp(x, 0), fs.attention(x, x, x)), disturb)
