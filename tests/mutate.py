"""Would the tests notice? One small error at a time is put into the C sources: who survives them?

    python tests/mutate.py                    # 150 mutants: make mutate
    python tests/mutate.py --mutants 20 --seed 7 --files score.inc.h decode.inc.h
    python tests/mutate.py --isa amx --files isa_amx.c  # on a CPU that has it

A mutant is one comparison, sign, constant, length of a tail or vector operation changed for
another, in a copy of the sources. The object that it is in is compiled anew, for one ISA, and
linked to the drivers of tests/c, which hold that ISA to the bits of the scalar kernels; if they
pass, to the Python extension, for the fuzzer and some of the tests (TESTS).
A mutant is killed by the first test that fails, crashes or does not end. One that does not compile,
or compiles to the same code, is none, and another is drawn. A killed one takes about 6 s of a core,
most of it the compiler's, a survivor 40.

All are listed, each with the line and what became of it. Survivors that no test can kill have their
reason in mutants.toml and are counted apart; any other makes the exit status 1. Ctrl-C ends the run
with the figures so far.
"""

import argparse
import collections
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
REASONS = Path(__file__).with_name("mutants.toml")
DRIVERS = ("driver", "attention_driver", "gradient_driver")
INLINE = "static inline __attribute__((always_inline))"
FUZZ_CALLS = 2000
# A test, and the files whose mutants it may notice. The drivers hold the kernels of softmax to the
# bits of the scalar ones; the rest wants some of the Python tests: seconds, not minutes.
TESTS = {
    "driver": "(?!attention|decode|score|isa_amx)",
    "attention_driver": "attention|decode|score|exp|load|vec|isa_amx",
    "gradient_driver": "attention|score|loss|softmax",
    "fuzz.py": "",
    "test_attention.py": "attention|decode|score|isa_amx",
    "test_attention_varlen.py": r"attention\.c",
    "test_attention_memory.py": "attention.inc|decode|score",
    "test_attention_backward.py": r"attention_backward|score",
    "test_special.py": r"softmax|backward\.inc|load",
    "test_guard_pages.py": "(?!attention|decode|score|isa_amx)",
    "test_exp.py": "exp|vec",
}
SECONDS = 900  # of a test: a machine may be busy, so that time alone says little

# What is changed: a pattern for code, and what its match becomes. Code has spaces around operators.
_OTHER = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&",
    "+": "-", "-": "+", "+=": "-=", "-=": "+=", "++": "--", "/": "*", "&": "|", "|": "&",
    "<<": ">>", ">>": "<<",
    "v_add": "v_sub", "v_sub": "v_add", "v_max": "v_add", "v_fma": "v_fms", "v_fms": "v_fma",
    "v_fnma": "v_fma", "v_add_int": "v_sub_int", "v_sub_int": "v_add_int",
}  # fmt: skip
MUTATIONS = {
    "comparison": (r"(?<= )(<=|>=|==|!=|<|>)(?= )", _OTHER.get),
    "logic": (r"(?<= )(&&|\|\|)(?= )", _OTHER.get),
    "arithmetic": (r"(?<= )(\+=|-=|\+|-|/|&|\||<<|>>)(?= )", _OTHER.get),
    "sign": (r"(?<=[ (,])-(?=[\w(])", lambda old: ""),
    "constant": (r"(?<![\w.'])\d+(?![\w.'])", lambda old: "0" if old == "1" else str(int(old) + 1)),
    "power": (r"(?<=p)[-+]?\d+(?=[f,;) ])", lambda old: f"{int(old) + 1:+d}"),
    "tail": (r"(?<=, )(?:k|n - i)(?=[,)])", lambda old: f"{old} - 1"),
    "operation": (r"\bv_(?:add|sub|max|fma|fms|fnma|add_int|sub_int)(?=\()", _OTHER.get),
    "negation": (r"(?<=[ (])!(?=\w)", lambda old: ""),
}
# Lines that decide nothing but speed, or nothing at all.
_IDLE = re.compile(r"^\s*(#\s*(if|elif|include|error|undef|pragma)|FSM_UNROLL)|PREFETCH|ask_for\(")


def code_of(text):
    """The text with comments, strings and lines that decide nothing blanked out."""
    pattern = r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
    code = re.sub(pattern, lambda m: re.sub(r"[^\n]", "\0", m[0]), text, flags=re.DOTALL)
    lines = code.split("\n")
    return "\n".join("\0" * len(line) if _IDLE.search(line) else line for line in lines)


class Mutant:
    """A place in a file, what stands there and what will."""

    def __init__(self, path, text, kind, start, old, new):
        self.path, self.kind = path, kind
        self.text = text[:start] + new + text[start + len(old) :]
        self.number = text.count("\n", 0, start) + 1
        self.line, self.mutated = (
            " ".join(t.split("\n")[self.number - 1].split()) for t in (text, self.text)
        )
        self.key = path.name, self.line, self.mutated

    def __str__(self):
        return f"{self.path.name}:{self.number}: {self.line}\n    -> {self.mutated}"


def all_mutants(paths):
    for path in paths:
        text = path.read_text()
        code = code_of(text)
        for kind, (pattern, other) in MUTATIONS.items():
            for match in re.finditer(pattern, code):
                yield Mutant(path, text, kind, match.start(), match[0], other(match[0]))


class Tree:
    """A copy of what is compiled, with commands to make it and run it."""

    def __init__(self, folder, isa):
        self.folder, self.isa, self.limits = folder, isa, {}
        for name in ("src_c", "fastsoftmax", "tests"):
            shutil.copytree(ROOT / name, folder / name,
                            ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self.run("make", *(f"build/mutate/{driver}" for driver in DRIVERS))
        header = folder / "src_c/vec.h"  # functions in one copy: a third of the compiler's time
        header.write_text(header.read_text().replace(INLINE, "static inline"))
        self.build = folder / "build/mutate"
        self.library = sorted(
            str(o) for o in self.build.glob("*.o") if o.stem not in DRIVERS
        )  # fmt: skip
        self.cc = shlex.split(os.environ.get("CC", "cc"))
        self.compile_binding()
        self.commands = {}

    def run(self, *command, quiet=True):
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=quiet, text=True)

    def compile_binding(self):
        import numpy

        self.run(sys.executable, "-m", "cython", "-3", "-X", "binding=True,embedsignature=True",
                 "fastsoftmax/_core.pyx", "-o", "_core.c")  # fmt: skip
        includes = "src_c", sysconfig.get_path("include"), numpy.get_include()
        self.run(*self.cc, "-O1", "-fPIC", *(f"-I{i}" for i in includes), "-c", "_core.c",
                 "-o", "_core.o")  # fmt: skip

    def object_of(self, path):
        """The object file that is made anew when a source changes."""
        stem = path.stem if path.suffix == ".c" else f"isa_{self.isa}"
        return self.build / f"{stem}.o"

    def compile_as_a_mutant(self, path):
        """What a mutant of a file is compared with; keeps the command, which is the Makefile's."""
        target = self.object_of(path)
        if target not in self.commands:
            self.commands[target] = self.command_for(target.relative_to(self.folder))
            self.run(*self.commands[target])

    def command_for(self, target):
        lines = self.run("make", "-n", "-B", "--no-print-directory", str(target)).stdout
        return [*shlex.split(lines.strip().split("\n")[-1]), "-Og"]

    def link(self):
        for driver in DRIVERS:
            objects = f"{self.build / driver}.o", *self.library
            self.run(*self.cc, "-fopenmp", "-o", str(self.build / driver), *objects, "-lm")

    def link_python(self):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self.run(*self.cc, "-shared", "-fopenmp", "-o", f"fastsoftmax/_core{suffix}", "_core.o",
                 *self.library, "-lm")  # fmt: skip

    def commands_for(self, name):
        """The tests that may notice a change of a file, in turn; the drivers come first."""
        python = sys.executable, "-W", "error"
        for test, files in TESTS.items():
            if not re.match(files, name):
                continue
            if test in DRIVERS:
                yield test, (str(self.build / test), self.isa)
            elif test == "fuzz.py":
                yield (
                    test,
                    (*python, "tests/fuzz.py", "--calls", str(FUZZ_CALLS), "--isa", self.isa),
                )
            else:
                chosen = (
                    "amx" if self.isa == "amx" else f"{self.isa} and not float16 and not float64"
                )
                yield test, (*python, "-m", "pytest", "-xqp", "no:cacheprovider", "-k", chosen,
                             f"tests/{test}")  # fmt: skip

    def fails(self, test, command):
        """How a test fails; None if it passes."""
        limit = self.limits.get(test, 600)
        here = os.environ | {"PYTHONPATH": str(self.folder)}  # not the package that is installed

        def limited():
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        with subprocess.Popen(
            command, cwd=self.folder, env=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, preexec_fn=limited, errors="replace",
        ) as process:  # fmt: skip
            begun = time.monotonic()
            for line in process.stdout:
                if line.startswith("FAILED") or time.monotonic() - begun > SECONDS:
                    process.kill()
                    return line.strip()
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                return "does not end"
            return f"exit status {code}" if code else None

    def judge(self, mutant):
        """What becomes of a mutant; "no mutant" if it is the same code, or not C."""
        copy = self.folder / mutant.path.relative_to(ROOT)
        target = self.object_of(mutant.path)
        command = self.commands[target]
        before, original = target.read_bytes(), copy.read_text()
        try:
            copy.write_text(mutant.text)
            made = subprocess.run(command, cwd=self.folder, capture_output=True)
            if made.returncode or target.read_bytes() == before:
                return "no mutant"
            self.link()
            for test, command in self.commands_for(mutant.path.name):
                if test == "fuzz.py":
                    self.link_python()
                if self.fails(test, command):
                    return f"killed by {test}"
            return "survived"
        finally:
            copy.write_text(original)
            target.write_bytes(before)


def cpu_seconds():
    """What the processes that have ended took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def reasons():
    with open(REASONS, "rb") as file:
        table = tomllib.load(file)["survivor"]
    return {(s["file"], s["line"], s["mutant"]): s["why"] for s in table}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="so many, judged by an earlier run")
    parser.add_argument("--isa", default="avx2", help="whose kernels are mutated")
    parser.add_argument("--files", nargs="+", help="names of files of src_c")
    args = parser.parse_args()
    names = args.files or [
        *sorted(p.name for p in ROOT.glob("src_c/*.inc.h") if p.name != "isa.inc.h"),
        f"vec_{args.isa}.h", "softmax.c", "attention.c", "attention_backward.c",
    ]  # fmt: skip
    mutants = list(all_mutants([ROOT / "src_c" / name for name in names]))
    places = len(mutants)
    random.Random(args.seed).shuffle(mutants)
    del mutants[places - args.skip :]
    os.environ["OMP_WAIT_POLICY"] = "passive"
    known, fates = reasons(), collections.Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Tree(Path(folder), args.isa)
        for name in names:
            tree.compile_as_a_mutant(ROOT / "src_c" / name)
        tree.link()
        tree.link_python()
        tests = {t: c for name in names for t, c in tree.commands_for(name)}
        for test, command in tests.items():
            before = cpu_seconds()
            if why := tree.fails(test, command):
                sys.exit(f"without a mutant {shlex.join(command)} fails: {why}")
            tree.limits[test] = int(3 * (cpu_seconds() - before)) + 5  # what does not end is killed
        try:
            while mutants and fates.total() - fates["no mutant"] < args.mutants:
                mutant = mutants.pop()
                before = cpu_seconds()
                fate = tree.judge(mutant)
                if fate == "survived" and mutant.key in known:
                    fate = "survived for a reason"
                fates[fate] += 1
                took = cpu_seconds() - before
                print(f"{fate} in {took:.0f} s, {mutant.kind}: {mutant}", flush=True)
        except KeyboardInterrupt:  # what has been done so far is worth knowing
            print("interrupted")
    print(f"{fates.total() - fates['no mutant']} mutants of {places} places, seed {args.seed}, "
          f"{args.isa}, {time.monotonic() - begun:.0f} s, "
          f"{cpu_seconds():.0f} s of a core:")  # fmt: skip
    for fate, count in fates.most_common():
        print(f"{count:6} {fate}")
    return bool(fates["survived"])


if __name__ == "__main__":
    sys.exit(main())
