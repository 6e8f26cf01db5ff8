"""The command line: ``fastsoftmax demo | info | selftest | bench | apply``."""

import argparse
import hashlib
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

import fastsoftmax as fs
from fastsoftmax import _core, apply, bench, reference

# --- demo -----------------------------------------------------------------------------------------

EXAMPLES = [  # logits, keywords, softmax as textbooks print it
    ([1, 2, 3], {}, [0.0900, 0.2447, 0.6652]),
    ([2, 5, 1], {}, [0.047, 0.936, 0.017]),
    ([1, 2, 3], {"temperature": 2}, [0.186, 0.307, 0.506]),
    ([1, 2, 3], {"temperature": 0.5}, [0.016, 0.117, 0.867]),
]
ULP_BOUND = 2.0


def demo(args):
    """Run the main job: on a transformer's tensors if a file is given, else on known examples."""
    if args.file is None:
        passed = demo_examples()
    else:
        try:
            tensors = load_layer(args.file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            print(f"fastsoftmax demo: cannot use {args.file}: {why}", file=sys.stderr)
            return 2
        passed = demo_layer(**tensors)
    return 0 if passed else 1


def load_layer(path):
    """Read q, k, v, key_mask and the float64 out of one attention layer."""
    names = "q", "k", "v", "key_mask", "out"
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz file")
    with np.load(path) as file:
        missing = set(names).difference(file.files)
        if missing:
            raise ValueError(f"it has no array named {', '.join(sorted(missing))}")
        layer = {name: file[name] for name in names}
    batch, heads, length, size = layer["q"].shape if layer["q"].ndim == 4 else (0, 0, 0, 0)
    shapes = dict.fromkeys(("q", "k", "v", "out"), (batch, heads, length, size))
    shapes["key_mask"] = batch, length
    if not layer["q"].size or any(layer[name].shape != shapes[name] for name in names):
        got = ", ".join(f"{name} {array.shape}" for name, array in layer.items())
        raise ValueError(f"q, k, v and out must be (B, H, L, D) and key_mask (B, L), got {got}")
    if layer["key_mask"].dtype != bool:
        raise ValueError(f"key_mask must be bool, got {layer['key_mask'].dtype}")
    return layer


def demo_layer(q, k, v, key_mask, out):
    """Compute the attention of a layer, check it and time it."""
    batch, heads, length, size = q.shape
    print(f"attention: {batch} sentences, {heads} heads, {length} tokens, head size {size}\n")
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(size))
    where = key_mask[:, None, None, :]
    weights = fs.softmax(scores, where=where)

    true = reference.softmax(scores, where=where, precise=np.longdouble)
    worst = reference.ulp_error(weights, true, weights.dtype).max()
    row_sum = np.abs(weights.sum(axis=-1, dtype=np.float64) - 1).max()
    masked = np.count_nonzero(weights[~np.broadcast_to(where, weights.shape)])
    error = np.abs(weights @ v - out).max() / np.abs(out).max()
    passed = print_checks(
        ("weights against the reference", f"{worst:.3f} ulp", f"<= {ULP_BOUND:g} ulp", worst <= 2),
        ("rows sum to 1", f"{row_sum:.1e}", "<= 1e-06", row_sum <= 1e-6),
        ("masked weights that are not 0", masked, "0", masked == 0),
        ("weights @ v against float64", f"{error:.1e}", "<= 1e-06", error <= 1e-6),
    )

    def formula():
        z = np.where(where, scores, -np.inf)
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    print_times(lambda: fs.softmax(scores, where=where), formula, f"softmax of {scores.shape}")
    return passed


def demo_examples():
    """Compute examples whose results are in every textbook."""
    print("examples without a file; with one: fastsoftmax demo tests/data/minilm_layer5.npz\n")
    rows = []
    for logits, keywords, known in EXAMPLES:
        y = fs.softmax(np.array(logits, np.float32), **keywords)
        arguments = ", ".join([str(logits), *(f"{k}={v}" for k, v in keywords.items())])
        digits = max(len(str(p)) for p in known) - 2
        text, want = (" ".join(f"{p:.{digits}f}" for p in ps) for ps in (y, known))
        rows.append((f"softmax({arguments})", text, want, text == want))
    passed = print_checks(*rows)
    x = np.array([1, 2, 3], np.float32)

    def formula():
        e = np.exp(x - x.max())
        return e / e.sum()

    print_times(lambda: fs.softmax(x), formula, "softmax of 3 elements")
    return passed


def print_checks(*checks):
    """Print what was checked, measured, expected and whether it holds; whether all do."""
    rows = [[*cells, "ok" if passed else "FAILED"] for *cells, passed in checks]
    bench.table(rows, ["check", "measured", "expected", "result"])
    return all(passed for *_, passed in checks)


def print_times(ours, formula, what):
    """Print the time of fastsoftmax beside that of the NumPy formula."""
    a, b = bench.best_time(ours), bench.best_time(formula)
    print()
    times = [["fastsoftmax", bench.duration(a), ""], ["NumPy", bench.duration(b), f"{b / a:.1f} x"]]
    bench.table(times, [what, "time", "ratio"])
    config = fs.show_config(mode="dicts")
    print(f"\n{config['cpu']}, {config['isa']}, threads: {config['num_threads']}")


# --- selftest -------------------------------------------------------------------------------------

# (shape, axis) of the arrays: rows of every kind that the kernels tell apart.
SELFTEST_SHAPES = [
    *(((-(-2000 // n), n), -1) for n in (1, 2, 3, 5, 8, 16, 17, 31, 33, 64, 100, 320, 1000, 4099)),
    ((2, 70_001), -1),
    ((300, 70), 0),
    ((7, 90, 33), 1),
    ((6, 7, 8, 9), (0, 2)),
    ((12, 100), None),
]
# In ulp of the result; of the logarithms in ulp of max(1, |max|, |value|).
WIDE = np.longdouble
SELFTEST_BOUNDS = {
    "float16": 0.51,
    "bfloat16": 0.51,
    "float32": 2.0,
    "float64": 2.0 if np.finfo(WIDE).nmant > 52 else np.inf,  # inf: there is no wider oracle
}
SIGNIFICANT_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def selftest(args):
    """Check every ISA of this CPU against the oracle and against each other."""
    isas, rows = fs.available_isas(), []
    for name, bound in SELFTEST_BOUNDS.items():
        try:
            dtype = bench.dtype_of(name)
        except ImportError:
            print(f"{name} is not checked: ml_dtypes is not installed\n")
            continue
        digests = {isa: hashlib.sha256() for isa in isas}
        worst = dict.fromkeys(isas, (0.0, 0.0, 0.0))
        for arguments, oracle in selftest_cases(dtype):
            for isa in isas:
                with _core._use_isa(isa):
                    errors = selftest_errors(arguments, oracle, digests[isa])
                worst[isa] = tuple(map(np.maximum, worst[isa], errors))  # NaN stays
        for isa in isas:
            same = digests[isa].digest() == digests["scalar"].digest()
            passed = same and all(error <= bound for error in worst[isa])
            errors = (f"{error:.3f} <= {bound:g}" for error in worst[isa])
            end = "yes" if same else "NO", "ok" if passed else "FAILED"
            rows.append([isa, name, *errors, *end])
    rows.sort(key=lambda row: isas.index(row[0]))
    header = ["ISA", "dtype", "softmax", "log_softmax", "logsumexp", "same bits", "result"]
    bench.table(rows, header)
    passed = all(row[-1] == "ok" for row in rows)
    print(f"\nlargest errors in ulp; {'all is well' if passed else 'SOME CHECKS FAILED'}")
    return 0 if passed else 1


def selftest_cases(dtype):
    """Yield (x, keywords) and what the oracle makes of them, without a mask and with one."""
    r = np.random.default_rng(2026)
    for shape, axis in SELFTEST_SHAPES:
        for scale, offset, where in ((1, 0, None), (20, -300, r.random(shape) < 0.8)):
            x = r.normal(offset, scale, shape).astype(dtype)
            keywords = {"axis": axis, "where": where}
            functions = reference.softmax, reference.log_softmax, reference.logsumexp
            yield (x, keywords), [f(x, **keywords, precise=WIDE) for f in functions]


def selftest_errors(arguments, oracle, digest):
    """Call the softmax family; the largest errors of softmax, log_softmax and logsumexp."""
    x, keywords = arguments
    axis = keywords["axis"]
    y, log_y, lse = (f(x, **keywords) for f in (fs.softmax, fs.log_softmax, fs.logsumexp))
    more = (
        fs.softmin(x, **keywords, temperature=3),
        fs.softmax_backward(x, y, axis),
        fs.log_softmax_backward(x, log_y, axis),
    )
    for result in (y, log_y, lse, *more):
        digest.update(result.tobytes())
    top = np.abs(x.astype(np.float64)).max(axis, keepdims=True)
    return (
        reference.ulp_error(y, oracle[0], x.dtype).max(),
        log_error(log_y, oracle[1], top, x.dtype),
        log_error(lse, oracle[2], top.reshape(np.shape(lse)), x.dtype),
    )


def log_error(got, true, top, dtype):
    """Measure the error of a logarithm in ulp of the largest number that it is made of."""
    got = np.asarray(got).astype(np.float64)
    size = np.maximum(np.maximum(top, 1), np.where(np.isfinite(true), np.abs(true), 0))
    ulp = np.ldexp(WIDE(1), np.frexp(size)[1] - SIGNIFICANT_BITS[dtype.name])
    error = np.subtract(got, true, out=np.zeros(np.shape(true), WIDE), where=got != true)
    return (np.abs(error) / ulp).max()


# --- info, and the parser -------------------------------------------------------------------------


def info(args):
    """Print version, CPU, ISAs and threads."""
    fs.show_config()
    return 0


def main(argv=None):
    """Run the command line; the exit status: 0, 1 if a check failed, 2 if the input is wrong."""
    parser = argparse.ArgumentParser(prog="fastsoftmax", description="Softmax for NumPy arrays.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {fs.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, run, about):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    about = "the softmax of an attention layer, or of known examples: checked and timed"
    command = add("demo", demo, about)
    about = "q, k, v (B, H, L, D), key_mask (B, L) and the true out (B, H, L, D)"
    command.add_argument("file", nargs="?", type=Path, metavar="FILE.npz", help=about)
    add("info", info, "version, CPU, instruction sets (ISAs) and threads")
    about = "check every instruction set (ISA) of this CPU against a slow, exact reference: seconds"
    add("selftest", selftest, about)
    command = add("bench", bench.run, "compare speed or accuracy with other libraries")
    bench.add_arguments(command)
    command = add("apply", apply.run, "softmax of an array in a file, of any size, into another")
    apply.add_arguments(command)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
