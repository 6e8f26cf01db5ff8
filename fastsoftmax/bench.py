"""Measure fastsoftmax and its peers: ``fastsoftmax bench [softmax | small | accuracy]``.

Each implementation runs in a process of its own, on the same data, with the same number of threads.
Its result is checked before it is timed. The processes take turns, several rounds of each, and the
best time counts: what else the machine does at the moment hits all of them alike.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import timeit
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

import fastsoftmax as fs
from fastsoftmax import reference

# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of softmax, with `out=` given where an implementation has it, or a fresh result."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1
    out: bool = True

    def __str__(self):
        axis = "" if self.axis == -1 else f", axis {self.axis}"
        return f"{' x '.join(map(str, self.shape))} {self.dtype}{axis}"

    def data(self):
        """The same logits in every process."""
        x = 3 * np.random.default_rng(2026).standard_normal(self.shape, np.float32)
        return x.astype(dtype_of(self.dtype))


LAST_AXIS = [
    (1024, 64), (64, 1000), (12288, 128), (4096, 1024), (4096, 4096),
    (16, 128256), (1, 128256), (65536, 8), (65536, 16),
]  # fmt: skip
SUITES = {
    "softmax": [
        *(Case(shape) for shape in LAST_AXIS),
        *(Case((4096, 1024), dtype) for dtype in ("float16", "bfloat16", "float64")),
        Case((2048, 2048), axis=0),
        Case((1000, 1024), axis=0),
        Case((64, 1000, 32), axis=1),
    ],
    "small": [Case(shape, out=False) for shape in ((8,), (32, 10), (1, 1000), (12, 16, 16))],
}

ROW_LENGTHS = 1, 2, 3, 8, 16, 33, 64, 100, 128, 1000, 1024, 20_000, 128_256, 1_000_000
DISTRIBUTIONS = {
    **{
        f"scale {scale:g}": lambda r, shape, scale=scale: r.normal(0, scale, shape)
        for scale in (0.1, 1, 10, 100, 1000)
    },
    **{
        f"offset {offset:g}": lambda r, shape, offset=offset: r.normal(offset, 3, shape)
        for offset in (100, -3000, 1e5, 1e6, 1e8, 1e30)
    },
    "constant": lambda r, shape: np.full(shape, r.normal(0, 100)),
    "few values": lambda r, shape: r.choice(r.normal(0, 5, 4), shape),
    "two scales": lambda r, shape: r.normal(0, 1, shape) * r.choice([0.1, 10], shape),
}


# --- the implementations: (x, axis, whether to use out=) -> a call that returns the result --------


def dtype_of(name):
    """A NumPy dtype by its name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def with_fastsoftmax(x, axis, use_out):
    """Us."""
    out = np.empty_like(x) if use_out else None
    return lambda: fs.softmax(x, axis, out=out)


def with_numpy(x, axis, use_out):
    """The formula that everybody writes, its temporaries saved."""
    out = np.empty_like(x) if use_out else None

    def call():
        e = np.subtract(x, x.max(axis, keepdims=True), out=out)
        np.exp(e, out=e)
        return np.divide(e, e.sum(axis, keepdims=True), out=e)

    return call


def with_scipy(x, axis, use_out):
    """Through scipy.special.softmax, which has no out=."""
    from scipy.special import softmax

    return lambda: softmax(x, axis)


def with_torch(x, axis, use_out):
    """Through torch.softmax with a fresh result."""
    import torch

    t = torch_tensor(x)
    return lambda: torch.softmax(t, axis)


def with_torch_out(x, axis, use_out):
    """Through torch.softmax with out=."""
    import torch

    t = torch_tensor(x)
    out = torch.empty_like(t)
    return lambda: torch.softmax(t, axis, out=out)


def torch_tensor(x):
    """Wrap an array; torch does not know the bfloat16 of ml_dtypes, but its bits."""
    import torch

    torch.set_num_threads(fs.get_num_threads())
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def with_onnxruntime(x, axis, use_out):
    """Through a model of one node, its buffers bound to the arrays."""
    import onnxruntime

    session = onnx_session(x.dtype, x.ndim, axis, fs.get_num_threads())
    out = np.empty_like(x)
    binding = onnxruntime.IOBinding(session)
    binding.bind_input("x", "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, x.dtype, x.shape, out.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return out

    call.bound = x, out  # a binding knows addresses only: keep the arrays alive
    return call


@lru_cache
def onnx_session(dtype, ndim, axis, threads):
    """Make the model of one Softmax node."""
    import onnxruntime
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(dtype)
    shape = [f"n{i}" for i in range(ndim)]
    x, y = (helper.make_tensor_value_info(name, kind, shape) for name in "xy")
    node = helper.make_node("Softmax", ["x"], ["y"], axis=axis)
    opset = [helper.make_opsetid("", 13)]
    graph = helper.make_graph([node], "softmax", [x], [y])
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # a dtype that it lacks is reported in the table
    cpu = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, cpu)


def with_jax(x, axis, use_out):
    """Through jax.nn.softmax under jit on the CPU."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    softmax = jax.jit(lambda t: jax.nn.softmax(t, axis))
    t = jax.numpy.asarray(x)
    return lambda: softmax(t).block_until_ready()


IMPLEMENTATIONS = {
    "fastsoftmax": with_fastsoftmax,
    "numpy": with_numpy,
    "scipy": with_scipy,
    "torch": with_torch,
    "torch out=": with_torch_out,
    "onnxruntime": with_onnxruntime,
    "jax": with_jax,
}
PEERS = tuple(IMPLEMENTATIONS)[1:]


# --- measuring, in a process of its own -----------------------------------------------------------


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
    return best / number


def as_float64(y):
    """Any framework's array of any dtype as a NumPy array."""
    return y.double().numpy() if hasattr(y, "double") else np.asarray(y, np.float64)


@lru_cache(maxsize=1)
def checked_call(name, case):
    """Prepare the call of a case; its result must be right but for a peer's usual rounding."""
    x = case.data()
    call = IMPLEMENTATIONS[name](x, case.axis, case.out)
    true = reference.softmax(x.astype(np.float64), case.axis)
    tolerance = {"float16": 0.02, "bfloat16": 0.15}.get(case.dtype, 0.001)
    if not np.allclose(as_float64(call()), true, rtol=tolerance, atol=1e-7):
        raise ArithmeticError("wrong")
    return call


def largest_error(name, dtype, distribution):
    """The largest error in ulp over rows of all lengths, among results that are normal numbers."""
    dtype, r, worst = np.dtype(dtype), np.random.default_rng(2026), 0.0
    for n in ROW_LENGTHS:
        x = DISTRIBUTIONS[distribution](r, (-(-(2**15) // n), n)).astype(dtype)
        true = reference.softmax(x, precise=np.longdouble)
        y = as_float64(IMPLEMENTATIONS[name](x, -1, False)())
        errors = np.where(true < np.finfo(dtype).tiny, 0, reference.ulp_error(y, true, dtype))
        worst = max(worst, float(errors.max()))
    return worst


def work(name, threads):
    """Answer requests, one JSON line each, with a number or the reason why there is none."""
    fs.set_num_threads(threads)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                case = Case(**request["case"] | {"shape": tuple(request["case"]["shape"])})
                answer = best_time(checked_call(name, case), request["seconds"])
            else:
                answer = largest_error(name, **request)
        except ImportError:
            answer = "absent"
        except ArithmeticError as error:
            answer = str(error)
        except Exception:  # each framework has its own way of saying that it lacks a dtype
            answer = "-"
        print(json.dumps(answer), flush=True)


class Worker:
    """The process of one implementation."""

    def __init__(self, name, threads):
        home = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(threads))
        self.process = subprocess.Popen(
            # -P: the package that started this one, not a folder that happens to lie here.
            [sys.executable, "-P", "-m", __name__, "--worker", name, "--threads", str(threads)],
            env=os.environ | counts | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        """Send a request and wait for the number, or the word that stands in its place."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline() or '"crashed"')

    def close(self):
        """End the process by ending its input."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


# --- the command ----------------------------------------------------------------------------------


def table(rows, header, file=None):
    """Print rows of cells below a header; columns of numbers, but for the first, to the right."""
    rows = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(*rows[1:], strict=True))
    numeric = [False, *(any(c[:1].isdigit() for c in column) for column in columns[1:])]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        cells = zip(row, widths, numeric, strict=True)
        line = "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in cells)
        print(line.rstrip(), file=file)


def duration(seconds):
    """Print a time with three digits: 711 us."""
    unit, name = (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    value = seconds / unit
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"


def best_of_rounds(workers, rounds, **request):
    """Let the workers take turns: {name: the best number, or the word in its place}."""
    best = {}
    for _ in range(rounds):
        for name, worker in workers.items():
            if isinstance(best.get(name), str):
                continue
            answer = worker.ask(**request)
            best[name] = answer if isinstance(answer, str) else min(answer, best.get(name, answer))
    return best


def present(workers, **request):
    """Drop the workers whose framework is not installed."""
    answers = best_of_rounds(workers, 1, **request)
    absent = [name for name in workers if answers[name] == "absent"]
    for name in absent:
        workers.pop(name).close()
    if absent:
        print(f"not installed: {', '.join(absent)}\n")


def compare_speed(workers, suite, rounds, seconds):
    """Time every case; print the times and the ratios."""
    present(workers, case=asdict(SUITES["small"][0]), seconds=0)
    names, results, times, ratios = list(workers), [], [], []
    for case in SUITES[suite]:
        best = best_of_rounds(workers, rounds, case=asdict(case), seconds=seconds)
        results.append({**asdict(case), "seconds": best})
        ours = best["fastsoftmax"]
        if isinstance(ours, str):
            raise SystemExit(f"fastsoftmax, {case}: {ours}")
        times.append([case, *(t if isinstance(t, str) else duration(t) for t in best.values())])
        theirs = list(best.values())[1:]
        ratios.append([case, *(t if isinstance(t, str) else f"{ours / t:.2f}" for t in theirs)])
    print("time of one call (wrong: off by > 0.1 %, float16 2 %, bfloat16 15 %; -: unsupported)\n")
    table(times, ["softmax", *names])
    print("\ntime of fastsoftmax / time of the peer: below 1, fastsoftmax is faster\n")
    table(ratios, ["softmax", *names[1:]])
    return results


def compare_accuracy(workers):
    """Measure every distribution; print the largest errors."""
    workers.pop("torch out=", None)
    present(workers, dtype="float32", distribution="constant")
    results = []
    # float64 needs an oracle that is wider.
    dtypes = ["float32", "float64"] if np.finfo(np.longdouble).nmant > 52 else ["float32"]
    print(f"largest error in ulp over rows of {ROW_LENGTHS[0]} to {ROW_LENGTHS[-1]:,} elements")
    for dtype in dtypes:
        rows = []
        for distribution in DISTRIBUTIONS:
            errors = best_of_rounds(workers, 1, dtype=dtype, distribution=distribution)
            results.append({"dtype": dtype, "distribution": distribution, "ulp": errors})
            cells = (e if isinstance(e, str) else f"{e:.2f}" for e in errors.values())
            rows.append([distribution, *cells])
        print()
        table(rows, [dtype, *workers])
    return results


def add_arguments(parser):
    """Tell argparse what the command takes."""
    add = parser.add_argument
    suites = [*SUITES, "accuracy"]
    add("suite", nargs="?", choices=suites, default="softmax", help="default: softmax")
    add("--peers", nargs="*", choices=PEERS, default=PEERS, help="default: all that are installed")
    add("--threads", type=int, default=fs.get_num_threads(), help="of each; default: %(default)s")
    add("--rounds", type=int, default=3, help="turns that each takes; default: %(default)s")
    add("--seconds", type=float, default=0.2, help="length of a turn; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="save the numbers, too")


def run(args):
    """Carry out the command; the exit status."""
    config = fs.show_config(mode="dicts") | {"num_threads": args.threads}
    print(f"{config['cpu']}, {config['isa']}, threads: {args.threads}\n")
    workers = {name: Worker(name, args.threads) for name in ("fastsoftmax", *args.peers)}
    try:
        if args.suite == "accuracy":
            results = compare_accuracy(workers)
        else:
            results = compare_speed(workers, args.suite, args.rounds, args.seconds)
    finally:
        for worker in workers.values():
            worker.close()
    if args.json:
        text = json.dumps({"config": config, "suite": args.suite, "results": results}, indent=1)
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    work(args.worker, args.threads)
