"""How it is measured: each implementation in a process of its own, on checked results.

The processes take turns, several rounds of each, and the best time counts: what else the machine
does at the moment hits all of them alike.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import timeit
from functools import lru_cache
from pathlib import Path

import numpy as np

import fastsoftmax as fs
from fastsoftmax import reference

from .cases import DISTRIBUTIONS, KINDS, ROW_LENGTHS, Softmax, from_json, to_json
from .peers import FLOOR, IMPLEMENTATIONS, PEERS

# --- in the process of an implementation ----------------------------------------------------------


def best_time(call, seconds=0.2):
    """Seconds that one call takes: the best of many batches, each long enough for the clock."""
    timer = timeit.Timer(call)
    number, elapsed = 1, timer.timeit(1)
    while elapsed < 1e-3:
        number *= 2
        elapsed = timer.timeit(number)
    best, stop = elapsed, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        best = min(best, timer.timeit(number))
    return best / number / getattr(call, "times", 1)


def as_float64(y):
    """Any framework's array of any dtype, or a tuple of them, as NumPy's."""
    if isinstance(y, tuple):
        return [as_float64(one) for one in y]
    return y.double().numpy() if hasattr(y, "double") else np.asarray(y, np.float64)


def prepare(name, case, operands):
    """Return the call of an implementation."""
    function = IMPLEMENTATIONS[name][list(KINDS.values()).index(type(case))]
    if function is None:
        raise NotImplementedError
    return function(case, **operands)


@lru_cache(maxsize=1)
def checked_call(name, case):
    """Prepare the call of a case; its result must be right."""
    operands = case.operands()
    call = prepare(name, case, dict(operands))
    if name != FLOOR:
        restore = getattr(call, "restore", lambda y: y)
        if not case.is_right(restore(as_float64(call())), **operands):
            raise ArithmeticError("wrong")
    return call


def largest_error(name, dtype, distribution):
    """The largest error in ulp over rows of all lengths, among results that are normal numbers."""
    r, worst = np.random.default_rng(2026), 0.0
    for n in ROW_LENGTHS:
        case = Softmax((-(-(2**15) // n), n), dtype, out=False)
        x = DISTRIBUTIONS[distribution](r, case.shape).astype(dtype)
        true = reference.softmax(x, precise=np.longdouble)
        y = as_float64(prepare(name, case, {"x": x})())
        dt = np.dtype(dtype)
        errors = np.where(true < np.finfo(dt).tiny, 0, reference.ulp_error(y, true, dt))
        worst = max(worst, float(errors.max()))
    return worst


def work(name, threads):
    """Answer requests, one JSON line each, with a number or the reason why there is none."""
    fs.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                call = checked_call(name, from_json(request["case"]))
                answer = best_time(call, request["seconds"])
            else:
                answer = largest_error(name, **request)
        except ImportError:
            answer = "absent"
        except ArithmeticError as error:
            answer = str(error)
        except Exception as error:  # each peer has its own way of saying that it lacks a case
            answer = "-" if name in PEERS else repr(error)
        print(json.dumps(answer), file=answers, flush=True)


# --- in the process that asks ---------------------------------------------------------------------


class Worker:
    """The process of one implementation."""

    def __init__(self, name, threads):
        home = str(Path(fs.__file__).parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        pools = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"
        self.process = subprocess.Popen(
            # -P: the package that started this one, not a folder that happens to lie here.
            [sys.executable, "-P", "-c", f"import {__name__} as m; m.work({name!r}, {threads})"],
            env=os.environ
            | dict.fromkeys(pools, str(threads))
            | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        """Send a request and wait for the number, or the word that stands in its place."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or '"crashed"')

    def time(self, case, seconds):
        """Seconds that a call of the case takes."""
        return self.ask(case=to_json(case), seconds=seconds)

    def close(self):
        """End the process by ending its input."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def workers(names, threads):
    """Start the workers of those that are installed: {name: worker}."""
    started = {name: Worker(name, threads) for name in names}
    try:
        # A case that all of them know, for what is asked is only whether they can be imported.
        words = {name: worker.time(Softmax((8,)), 0) for name, worker in started.items()}
        yield {name: worker for name, worker in started.items() if words[name] != "absent"}
    finally:
        for worker in started.values():
            worker.close()


class Progress:
    """A bar on the terminal, if tqdm is installed: with progress: progress.step()."""

    def __init__(self, total):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, unit="turn", leave=False, disable=None)

    def __enter__(self):
        return self

    def step(self, about=""):
        """One turn was taken."""
        if self.bar is not None:
            self.bar.set_postfix_str(str(about), refresh=False)
            self.bar.update()

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()


def best_of_rounds(rounds, asks, progress, about=""):
    """Let the implementations take turns: {name: the best number, or the word in its place}.

    asks is {name: a function that returns the number or the word}.
    """
    best = {}
    for _ in range(rounds):
        for name, ask in asks.items():
            if not isinstance(best.get(name), str):
                answer = ask()
                number = not isinstance(answer, str)
                best[name] = min(answer, best.get(name, answer)) if number else answer
            progress.step(f"{about}, {name}")
    return best
