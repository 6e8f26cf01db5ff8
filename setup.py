"""Build the compiled core. Everything else about the package stands in pyproject.toml.

The core is one extension of Cython and C, and src_c/isa_NAME.c, the kernels of one instruction set,
are compiled with flags of their own. The compiler is asked by a probe what it can do, which gives
the right answer when cross-compiling, too. FASTSOFTMAX_OPENMP=0 makes a serial build,
FASTSOFTMAX_COVERAGE=1 one that counts which lines run (tests/coverage.sh).
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

# Flags by compiler_type. They come after those of CFLAGS, and win. None may break the rules of
# IEEE 754 (-ffast-math) or contract a * b + c: every FMA is explicit in the source.
GNU = {
    # Cython's code. -O3 makes it a fifth larger and no faster, alignment is 5 KB of a wheel, and
    # the last four 33 KB. With -Os it would be less again, and small calls 15 % slower.
    "module": "-O2 -fno-align-functions -fno-align-jumps -fno-align-loops -fno-align-labels "
    "-fno-tree-pre -fno-caller-saves -fno-thread-jumps -fno-schedule-insns2",
    # Split loops, unswitched loops and aligned jumps were no faster, and are 15, 13 and 4 KB of a
    # wheel.
    "library": "-O3 -fno-split-loops -fno-unswitch-loops -fno-align-jumps",
    # No unwind tables: C never unwinds, and they are 27 KB of a wheel.
    "compile": "-g0 -std=c11 -fno-fast-math -ffp-contract=off -fno-math-errno -fvisibility=hidden "
    "-fno-asynchronous-unwind-tables",
    "openmp": "-fopenmp",
    "link openmp": "-fopenmp",
    "plans": "-O2",  # how work is cut: not where the time goes
    "scalar": "-Os",  # portable C is the last resort: half the size, in a wheel of three ISAs
    "coverage": "-O0 --coverage -fprofile-update=atomic -DCYTHON_TRACE=1",
    "link coverage": "--coverage",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl",
}
GNU["amx"] = GNU["avx512"] + " -mamx-tile -mamx-bf16"
MSVC = {
    "compile": "/O2 /std:c11 /fp:precise",
    "openmp": "/openmp",
    "link openmp": "",
    "avx2": "/arch:AVX2",
    "avx512": "/arch:AVX512",
}
PLANS = "attention", "attention_backward", "dispatch", "embed", "parallel", "parts", "softmax"
COVERAGE = os.environ.get("FASTSOFTMAX_COVERAGE") == "1"
FLAGS = {"unix": GNU, "mingw32": GNU, "msvc": MSVC}

X86_64 = """\
#include <immintrin.h>
#if !defined(__x86_64__) && !defined(_M_X64)
#error "not x86-64"
#endif
int main(void) { return 0; }
"""
AARCH64 = """\
#include <arm_neon.h>
#if !defined(__AARCH64EL__) && !defined(_M_ARM64)
#error "not little-endian AArch64"
#endif
int main(void) { return 0; }
"""
OPENMP = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
AMX = """\
#include <immintrin.h>
#include <sys/syscall.h>
int main(void) {
    _tile_dpbf16ps(0, 1, 2);
    return SYS_arch_prctl == 0;
}
"""
PROBES = {"avx2": X86_64, "avx512": X86_64, "amx": AMX, "neon": AARCH64, "openmp": OPENMP}


class BuildExt(build_ext):
    """Compile the kernels of each ISA with its flags, then build the extension around them."""

    def build_extension(self, ext):
        isas = ["scalar", *filter(self.can_build, ("avx2", "avx512", "amx", "neon"))]
        ext.define_macros = [(f"FSM_HAVE_{isa.upper()}", "1") for isa in isas]
        flags = ["compile"]
        if COVERAGE:
            flags += ["coverage"]
            ext.extra_link_args += self.flags("link coverage")
        if os.environ.get("FASTSOFTMAX_OPENMP") != "0" and self.can_build("openmp"):
            flags += ["openmp"]
            ext.extra_link_args += self.flags("link openmp")
        os.makedirs(self.build_temp, exist_ok=True)
        parts = [("isa_" + isa, isa) for isa in isas] + [(name, "plans") for name in PLANS]
        with ThreadPoolExecutor() as pool:  # an ISA takes a compiler half a minute
            ext.extra_objects = list(pool.map(lambda part: self.compiled(ext, flags, *part), parts))
        ext.extra_compile_args = self.flags("module", *flags)
        super().build_extension(ext)

    def compiled(self, ext, flags, name, kind):
        """Compile a source of the C library; the name of the object file."""
        (name,) = self.compiler.compile(
            [f"src_c/{name}.c"],
            self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=self.flags("library", *flags, kind),
        )
        return name

    def flags(self, *names):
        table = FLAGS[self.compiler.compiler_type]
        return [flag for name in names for flag in table.get(name, "").split()]

    def can_build(self, feature):
        """Whether the compiler makes a program of the feature's probe."""
        flags, link_flags = self.flags(feature), self.flags(f"link {feature}")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROBES[feature])
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=link_flags)
            except (CompileError, LinkError):
                print(f"fastsoftmax: building without {feature}, which this compiler cannot build")
                return False
        return True


class BuildPy(build_py):
    """Put the header, of which there is one copy, where fastsoftmax.get_include() looks for it."""

    def header(self):
        return os.path.join(self.build_lib, "fastsoftmax", "include", "fastsoftmax.h")

    def run(self):
        super().run()
        if not self.editable_mode:
            self.mkpath(os.path.dirname(self.header()))
            self.copy_file("src_c/fastsoftmax.h", self.header())

    def get_outputs(self, include_bytecode=True):
        own = [] if self.editable_mode else [self.header()]
        return super().get_outputs(include_bytecode) + own


core = Extension(
    "fastsoftmax._core",
    ["fastsoftmax/_core.pyx"],
    include_dirs=["src_c", numpy.get_include()],
    depends=["setup.py", *glob("src_c/*.[ch]"), *glob("fastsoftmax/*.px[di]")],
)
directives = {
    "language_level": 3,
    "binding": True,
    "embedsignature": True,
    "autotestdict": False,  # no second copy of the docstrings
    "linetrace": COVERAGE,
}
build_dir = None if COVERAGE else "build"  # where Cython's plugin of coverage.py looks
setup(
    ext_modules=cythonize([core], build_dir=build_dir, compiler_directives=directives),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
