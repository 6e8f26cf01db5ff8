"""Measure fastsoftmax and its peers: ``fastsoftmax bench``.

``cases`` says what is measured, ``peers`` how each library does it, ``measure`` how time is taken,
``report`` how the result is shown; below is the command. tests/perf has the same cases.
"""

import json
import math
from argparse import ArgumentTypeError
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

import fastsoftmax as fs

from . import report
from .cases import (
    DISTRIBUTIONS,
    OVERVIEW,
    OVERVIEW_OF_SPEED,
    ROW_LENGTHS,
    SCALING,
    SUITES,
    THREADS,
    dtype_of,
    to_json,
)
from .measure import Progress, best_of_rounds, best_time, workers
from .peers import FLOOR, PEERS, US
from .report import duration, table

__all__ = ["add_arguments", "best_time", "dtype_of", "duration", "run", "table"]


def time_case(running, case, args, progress):
    """Measure a case: {name: seconds, or the word in their place}."""
    asks = {name: partial(worker.time, case, args.seconds) for name, worker in running.items()}
    best = best_of_rounds(args.rounds, asks, progress, case)
    if isinstance(best[US], str):
        raise SystemExit(f"{US}, {case}: {best[US]}")
    return best


def compare_speed(args, groups=None):
    """Time every case of a suite, or of these groups."""
    groups = groups or SUITES[args.suite]
    cases = [(group, case) for group in groups for case in groups[group]]
    results = []
    with workers((US, FLOOR, *args.peers), args.threads) as running:
        say_who(running, args)
        with Progress(len(cases) * args.rounds * len(running)) as progress:
            for group, case in cases:
                work, unit = case.work
                seconds = time_case(running, case, args, progress)
                result = {"group": group, "case": str(case), "work": work, "unit": unit}
                results.append(result | to_json(case) | {"seconds": seconds})
    report.print_speed(results)
    return results


def compare_threads(args):
    """Time some cases with 1, 2, 4 ... threads."""
    counts = sorted({*(1 << i for i in range(args.threads.bit_length())), args.threads})
    times = []
    for threads in counts:
        with workers((US, *args.peers), threads) as running:
            if not times:
                say_who(running, args)
            with Progress(len(THREADS) * args.rounds * len(running)) as progress:
                times.append([time_case(running, case, args, progress) for case in THREADS])
    results = [
        growth(str(case), "threads", counts, best)
        for case, best in zip(THREADS, zip(*times, strict=True), strict=True)
    ]
    report.print_growth(results)
    return results


def compare_sizes(args):
    """Time cases that grow."""
    results = []
    turns = sum(len(sizes) for _, sizes, _ in SCALING.values()) * args.rounds
    with workers((US, *args.peers), args.threads) as running:
        say_who(running, args)
        with Progress(turns * len(running)) as progress:
            for title, (of, sizes, make) in SCALING.items():
                best = [time_case(running, make(n), args, progress) for n in sizes]
                results.append(growth(title, of, sizes, best))
    report.print_growth(results)
    return results


def growth(title, of, sizes, best):
    """Make a result of the times for each size."""
    seconds = {name: [times[name] for times in best] for name in best[0]}
    return {"title": title, "of": of, "sizes": list(sizes), "seconds": seconds}


def libraries(peers):
    """The peers without those that are another way of calling one of them."""
    return [name for name in peers if name not in ("torch out=", "onnxruntime bound")]


def compare_accuracy(args, distributions=None, dtypes=("float32", "float64")):
    """Measure the softmax of every distribution; print the largest errors in ulp."""
    distributions = distributions or DISTRIBUTIONS
    names = [US, *libraries(args.peers)]
    if np.finfo(np.longdouble).nmant <= 52:  # float64 needs an oracle that is wider
        dtypes = ["float32"]
    results = []
    with workers(names, args.threads) as running:
        say_who(running, args)
        print(f"largest error in ulp over rows of {ROW_LENGTHS[0]} to {ROW_LENGTHS[-1]:,} elements")
        with Progress(len(dtypes) * len(distributions) * len(running)) as progress:
            for dtype in dtypes:
                for distribution in distributions:
                    what = {"dtype": dtype, "distribution": distribution}
                    asks = {n: partial(worker.ask, **what) for n, worker in running.items()}
                    errors = best_of_rounds(1, asks, progress, distribution)
                    results.append(what | {"ulp": errors})
    for header, rows in report.accuracy_tables(results):
        print()
        table(rows, header)
    return results


def compare_overview(args):
    """Measure a little of both, by calls that make their result."""
    args.peers = libraries(args.peers)
    accuracy = compare_accuracy(args, OVERVIEW, ["float32"])
    print()
    return {"accuracy": accuracy, "speed": compare_speed(args, OVERVIEW_OF_SPEED)}


def say_who(running, args):
    """Print the versions of what is measured, and what is not installed."""
    libraries = dict.fromkeys(name.split()[0] for name in running if name not in (US, FLOOR))
    if libraries:
        print(", ".join(f"{name} {metadata.version(name)}" for name in libraries))
    print()
    absent = [name for name in args.peers if name not in running]
    if absent:
        print(f"not installed: {', '.join(absent)}\n")


COMMANDS = {  # what measures a suite, what makes tables of it, and what draws it
    **dict.fromkeys(SUITES, (compare_speed, report.speed_tables, report.plot_speed)),
    "threads": (compare_threads, report.growth_tables, report.plot_growth),
    "scaling": (compare_sizes, report.growth_tables, report.plot_growth),
    "overview": (compare_overview, report.overview_tables, report.plot_overview),
    "accuracy": (compare_accuracy, report.accuracy_tables, report.plot_accuracy),
}


def add_arguments(parser):
    """Tell argparse what the command takes."""
    add = parser.add_argument
    add("suite", nargs="?", choices=COMMANDS, default="softmax", help="default: softmax")
    about = "default: all that are installed, for scaling none"
    add("--peers", nargs="*", choices=PEERS, help=about)
    about = "of each; default: %(default)s"
    add("--threads", type=_count, default=fs.get_num_threads(), help=about)
    add("--rounds", type=_count, default=3, help="how often each is measured; default: %(default)s")
    add("--seconds", type=_seconds, default=0.2, help="how long, each time; default: %(default)s")
    add("--json", type=_output, metavar="FILE", help="save the numbers, too")
    add("--markdown", type=_output, metavar="FILE", help="write them as tables of a document")
    add("--plot", type=_drawing, metavar="FILE", help="draw them, as .png, .svg or .pdf")


def _count(text):
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise ArgumentTypeError(f"must be an integer from 1 to 1024, got {text!r}")
    return int(text)


def _seconds(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return seconds


def _output(text):
    """Return the path of a file to be written; what would go wrong is said before measuring."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    return path


def _drawing(text):
    if not text.endswith((".png", ".svg", ".pdf")):
        raise ArgumentTypeError(f"must end with .png, .svg or .pdf, got {text!r}")
    return _output(text)


def run(args):
    """Carry out the command; the exit status."""
    measure_suite, tables, plot = COMMANDS[args.suite]
    if args.plot:
        report.figure(1, 1)  # say now, not after minutes, that matplotlib is missing
    if args.peers is None:
        args.peers = () if args.suite == "scaling" else PEERS
    config = fs.show_config(mode="dicts") | {"num_threads": args.threads}
    title = f"{config['cpu']}, {config['isa']}, threads: {args.threads}"
    print(title)
    results = measure_suite(args)
    if args.json:
        text = json.dumps({"config": config, "suite": args.suite, "results": results}, indent=1)
        args.json.write_text(text + "\n")
    if args.markdown:
        report.markdown(tables(results), args.markdown)
    if args.plot:
        plot(results, f"{args.suite}, {title}", args.plot)
    return 0
