/* Which ISAs a CPU and its system have: dispatch.c over made-up registers. Run by
 * tests/test_cpu.py with the hexadecimal values of ECX of CPUID's leaf 1, EBX of leaf 7 and
 * XCR0. */
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned leaf1_ecx, leaf7_ebx, xcr0_low;

#define FSM_HAVE_AVX2
#define FSM_HAVE_AVX512
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) \
    ((void)(a), (void)(d), *(b) = (leaf) == 7 ? leaf7_ebx : 0, *(c) = (leaf) == 1 ? leaf1_ecx : 0)
#define __asm__(...) (low = xcr0_low, high = 0) /* xgetbv */
#include "../../src_c/dispatch.c"

const fsm_isa fsm_isa_scalar = {"scalar", NULL, NULL}, fsm_isa_avx2 = {"avx2", NULL, NULL},
              fsm_isa_avx512 = {"avx512", NULL, NULL};

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    leaf1_ecx = (unsigned)strtoul(argv[1], NULL, 16);
    leaf7_ebx = (unsigned)strtoul(argv[2], NULL, 16);
    xcr0_low = (unsigned)strtoul(argv[3], NULL, 16);
    for (int i = 0; fsm_isa_at(i); i++) puts(fsm_isa_name(fsm_isa_at(i)));
    return 0;
}
