"""Which ISAs are said to be there: on made-up CPUs (tests/c/cpuid.c). One too many is an illegal
instruction, which ends the process."""

import platform

import pytest

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="CPUID is of x86"
)

# Intel SDM vol. 2A, CPUID; vol. 1, 13.3, XCR0. What each level wants, and where it is told.
AVX2 = {"OSXSAVE": (0, 27), "AVX": (0, 28), "FMA": (0, 12), "F16C": (0, 29), "AVX2": (1, 5),
        "saves XMM": (2, 1), "saves YMM": (2, 2)}  # fmt: skip
AVX512 = {"F": (1, 16), "DQ": (1, 17), "BW": (1, 30), "VL": (1, 31), "saves opmask": (2, 5),
          "saves ZMM 0-15": (2, 6), "saves ZMM 16-31": (2, 7)}  # fmt: skip
AMX = {"TILE": (3, 24), "BF16": (3, 22), "saves its configuration": (2, 17),
       "saves tiles": (2, 18)}  # fmt: skip
ALL = AVX2 | AVX512 | AMX


@pytest.fixture
def isas_of(c_program):
    """The ISAs of a CPU with these features, whose system gives tiles if its answer is 0."""
    program = c_program("cpuid")

    def isas(features, answer=0):
        registers = [0] * 4
        for word, bit in features.values():
            registers[word] |= 1 << bit
        return program(*(f"{r:x}" for r in registers), str(answer))

    return isas


def test_of_each_level(isas_of):
    assert isas_of({}) == ["scalar"]
    assert isas_of(AVX512 | AMX) == ["scalar"]
    assert isas_of(AVX2) == isas_of(AVX2 | AMX) == ["avx2", "scalar"]
    assert isas_of(AVX2 | AVX512) == ["avx512", "avx2", "scalar"]
    assert isas_of(ALL) == ["amx", "avx512", "avx2", "scalar"]
    assert isas_of(ALL, answer=1) == ["avx512", "avx2", "scalar"]


def test_one_feature_is_lacking(isas_of):
    """Also one that the CPU has, but whose registers the system does not save."""
    for lacking in ALL:
        isas = ["avx512"] * (lacking in AMX) + ["avx2"] * (lacking not in AVX2) + ["scalar"]
        assert isas_of({k: bit for k, bit in ALL.items() if k != lacking}) == isas, lacking
