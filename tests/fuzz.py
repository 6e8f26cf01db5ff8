"""Random calls of the whole public API: results equal the oracle, or a documented exception.

    python tests/fuzz.py --calls 1000000 --seed 0     # make fuzz
    python tests/fuzz.py --seed 0 --only 4711         # one call again, as a failure says

Call number N is drawn from (seed, N) and nothing else. A call has random dtypes, shapes, layouts
(strides negative and zero, unaligned, byte-swapped, read-only), options, `out` fresh or over an
input; one in three has something in the place of an argument that should not be there. Then

- a result is within the bounds of the other tests, of the right dtype and shape, in `out` if given;
- an exception is one of EXCEPTIONS and names an argument that was given (those of ufuncs are
  NumPy's, and have its words); `out` is as before;
- a call without garbage raises nothing, and what the oracle refuses raises;
- inputs keep every byte, and there are no warnings.
"""

import argparse
import collections
import re
import sys
import time
import warnings

import numpy as np
from common import ISAS, use_isa
from fuzz_attention import KINDS as ATTENTION_KINDS
from fuzz_draw import Case, Draw
from fuzz_rows import KINDS as ROW_KINDS

import fastsoftmax as fs

EXCEPTIONS = TypeError, ValueError, OverflowError, MemoryError, NotImplementedError


def settings(d):
    """The functions that take a number of threads, or a name."""
    name = d.one_of("set_num_threads", "num_threads", "show_config")
    value = "dicts" if name == "show_config" else d.integer(1, 3)
    function = getattr(fs, name)
    argument = {"mode" if name == "show_config" else "n": value}
    return Case(function, argument, {}, lambda *a, **k: None, lambda got, expected: None)


# How to draw a call; how often; which arguments besides those by position garbage may take.
KINDS = ROW_KINDS | ATTENTION_KINDS | {settings: (0.3, ())}
_WEIGHTS = np.array([weight for weight, _ in KINDS.values()], float)


# ---- a call ----


def make(seed, number):
    d = Draw(seed, number)
    kind = list(KINDS)[d.g.choice(len(KINDS), p=_WEIGHTS / _WEIGHTS.sum())]
    case = kind(d)
    if d.chance(1 / 3):
        case.spoil(d, KINDS[kind][1])
    return case


def keep(value):
    """A copy of an argument, as good for the oracle."""
    return value.copy() if type(value) is np.ndarray and value.size < 2**20 else value


# Those that call functions with other names for their arguments: these may be in the message, too.
_ALIASES = {
    "dim": {"axis"}, "query": {"q"}, "key": {"k"}, "value": {"v"}, "keepdim": {"keepdims"},
    "attn_mask": {"mask", "bias"},
}  # fmt: skip


def names_in(message):
    return set(re.findall(r"\w+", message))


def run(case):
    """Make the call; raises AssertionError if anything is wrong. What came of it, in a word."""
    arguments = case.positional | case.keywords
    out = case.keywords.get("out")
    out = None if isinstance(out, np.ma.MaskedArray) else out
    copies = {name: keep(value) for name, value in arguments.items()}
    positional = [copies[name] for name in case.positional]
    keywords = {name: copies[name] for name in case.keywords}
    before = out.tobytes() if isinstance(out, np.ndarray) and out.size < 2**20 else None
    try:
        got = case.call()
    except RuntimeWarning:  # NumPy's, which casts to the dtype of `out` by itself
        assert isinstance(case.function, np.ufunc) and case.garbage == "out"
        return "RuntimeWarning"
    except EXCEPTIONS as error:
        got, raised = None, error
    else:
        raised = None
    for name, value in arguments.items():
        if value is not out and type(value) is np.ndarray and value.size < 2**20:
            written = raised is None and type(out) is np.ndarray and np.may_share_memory(value, out)
            assert written or value.tobytes() == copies[name].tobytes(), f"{name} was modified"
    if raised is not None:
        assert case.garbage is not None, f"raised {raised!r}"
        assert before is None or out.tobytes() == before, f"out was modified, then {raised!r}"
        known = {case.garbage, *case.positional, *case.keywords}
        known = known.union(*(_ALIASES.get(name, ()) for name in known))
        silent = isinstance(raised, MemoryError) or isinstance(case.function, np.ufunc)
        assert silent or names_in(str(raised)) & known, f"no argument is named in {raised!r}"
        return type(raised).__name__
    if type(out) is np.ndarray:
        assert (got[0] if isinstance(got, tuple) else got) is out, "the result is not out"
    if case.garbage is not None:  # the checks are about other arguments
        try:
            with np.errstate(all="ignore"):
                case.oracle(*positional, **keywords)
        except Exception as error:
            raise AssertionError(f"no exception, but the oracle has {error!r}") from None
        return "accepted"
    with np.errstate(all="ignore"):
        case.check(got, case.oracle(*positional, **keywords))
    return "right"


def fuzz(calls, seed=0, isa=None, only=None, keep_going=False):
    """Run the calls; Counter of what came of them by function. The first that is wrong raises, or
    is printed."""
    seen = collections.Counter()
    with use_isa(isa or fs.isa()):
        for number in range(calls) if only is None else [only]:
            case = make(seed, number)
            threads = fs.get_num_threads()
            try:
                seen[case.name, run(case)] += 1
            except Exception as error:
                again = f"python tests/fuzz.py --seed {seed} --only {number} --isa {fs.isa()}"
                what = case.positional | case.keywords
                message = (
                    f"{again}\n{case.name}: {error or type(error).__name__}, garbage in "
                    f"{case.garbage}\n{what!r:.3000}"
                )
                if not keep_going:
                    raise AssertionError(message) from error
                print(message, flush=True)
                seen[case.name, "WRONG"] += 1
            finally:
                fs.set_num_threads(threads)
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    parser.add_argument("--isa", choices=ISAS, default=fs.isa())
    parser.add_argument("--keep-going", action="store_true", help="print what is wrong, go on")
    args = parser.parse_args()
    warnings.simplefilter("error")
    begun = time.monotonic()
    seen = fuzz(args.calls, args.seed, args.isa, args.only, args.keep_going)
    for (name, what), count in sorted(seen.items()):
        print(f"{name:30} {what:20} {count:9}")
    seconds = time.monotonic() - begun
    print(f"{seen.total()} calls, seed {args.seed}, {args.isa}, {seconds:.0f} s")
    return any(what == "WRONG" for _, what in seen)


if __name__ == "__main__":
    sys.exit(main())
