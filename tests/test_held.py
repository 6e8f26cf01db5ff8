"""What other code does to the arguments during a call cannot crash it.

NumPy refuses to resize an array that a call holds, also with refcheck=False; a shape or dtype set
meanwhile is the array's, not the call's; numbers that are addresses (labels, kv_lengths, q_offset,
cumulative lengths) are copied; each argument is converted once.
"""

import functools
import gc
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


MANY = 1_000_000


@pytest.mark.parametrize("name", ["labels", "starts", "swapped"])
def test_another_thread_resizes_what_is_copied(name):
    """It is held while it is copied."""
    array = np.zeros(MANY, ">f4" if name == "swapped" else np.int64)
    logits, q = np.broadcast_to(np.zeros(2, F32), (MANY, 2)), np.zeros((0, 1, 2), F32)
    call = {
        "labels": lambda: fs.cross_entropy(logits, array),
        "starts": lambda: fs.attention_varlen(q, q, q, array, array),
        "swapped": lambda: fs.logsumexp(array),
    }[name]

    def attempt():
        for _ in range(60 if name == "swapped" else 5):
            try:
                call()
            except ValueError:  # it was resized between two calls
                pass

    def resize():
        array.resize((10,), refcheck=False)
        array.resize((MANY,), refcheck=False)

    during(attempt, resize)


def test_another_thread_writes_to_labels():
    """A result or an error, no crash: what was checked is what is used."""
    logits, labels = np.broadcast_to(np.zeros(2, F32), (MANY, 2)), np.zeros(MANY, np.int64)

    def attempt():
        for call in (fs.cross_entropy, functools.partial(fs.cross_entropy_backward, 1.0)):
            try:
                call(logits, labels)
            except ValueError as error:
                assert "labels must be from 0 to 1" in str(error)

    def disturb():
        labels[::1000] = 2**40
        labels[::1000] = 0

    during(attempt, disturb)


class Meanwhile:
    """An argument whose conversion is a chance for other code to run."""

    def __init__(self, harm, array):
        self.harm, self.array = harm, array

    def __array__(self, dtype=None, copy=None):
        self.harm()
        return self.array


def test_arguments_of_gradients_are_converted_once():
    """What a gradient's memory was made for is what it is written with."""
    q = normal((2, 64, 512), F32)
    out, lse = fs.attention(q, q, q, return_lse=True, sinks=np.zeros(2, F32))
    options = {"return_dsinks": True}
    want = fs.attention_backward(out, q, q, q, out, lse, sinks=np.zeros(2, F32), **options)
    x = q.copy()
    grad_out = Meanwhile(lambda: set_shape(x, (2, 2, 16384)), out)
    got = fs.attention_backward(grad_out, x, q, q, out, lse, sinks=np.zeros(2, F32), **options)

    class Once:
        def __init__(self, array):
            self.arrays = [array]

        def __array__(self, dtype=None, copy=None):
            return self.arrays.pop()

    once = (Once(a) for a in (q, q, q))
    again = fs.attention_backward(out, *once, out, lse, sinks=Once(np.zeros(2, F32)), **options)
    for a, b, c in zip(want, got, again, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(a, c)


@pytest.mark.parametrize("harm", [">f4", "i4", "V4", "i1"])
def test_the_dtype_of_out_changes_meanwhile(harm):
    """The result is where out is, as the type that out had."""
    x = normal((100, 100), F32)
    for function, shape in ((fs.softmax, (100, 100)), (fs.logsumexp, (100,))):
        out = np.zeros(shape, F32)

        def change(out=out):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                out.dtype = harm

        more = {"where": Meanwhile(change, np.ones(100, bool))}
        axis = {"axis": 1}
        assert function(x, out=out, **more, **axis) is out
        assert_same_bits(out.view(F32).reshape(shape), function(x, **axis))


@pytest.mark.parametrize("name", ["x", "out"])
def test_the_garbage_collector_runs_while_arrays_are_held(name):
    """Whatever code it runs: the array is resized before the call holds it, or not at all."""
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    gc.collect()
    gc.freeze()  # what other tests have left, which would be gone through each time
    try:
        for threshold in range(1, 12):  # a call makes some 6 objects that count
            arrays = {"x": np.zeros((1000, 800), F32), "out": np.zeros((1000, 800), F32)}

            class Trap:
                def __del__(self, array=arrays[name]):
                    try:
                        array.resize((10,), refcheck=False)
                    except ValueError:
                        pass

            gc.disable()
            gc.collect()
            trap = Trap()
            trap.me = trap
            del trap
            gc.enable()
            gc.set_threshold(threshold)
            try:
                fs.softmax(arrays["x"], -1, out=arrays["out"])
            except ValueError as error:
                assert "out has shape" in str(error)
            finally:
                gc.set_threshold(*thresholds)
    finally:
        gc.unfreeze()
        (gc.enable if enabled else gc.disable)()


def set_shape(array, shape):
    """NumPy 2.5 warns, but it is still what other code may do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        array.shape = shape


def test_resizing_is_refused_during_a_call_and_not_afterwards():
    refused = []

    def resize():
        with pytest.raises(ValueError, match="resize"):
            x.resize((10**6,), refcheck=False)
        refused.append(True)
        set_shape(x, (4, 25))

    x = normal(100, F32).copy()
    want = fs.softmax(x)
    for view in (x, x[:], x[::-1][::-1]):  # it is the owner of the memory that is resized
        set_shape(x, (100,))
        assert_same_bits(fs.softmax(view, bias=Meanwhile(resize, np.zeros(100, F32))).ravel(), want)
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
