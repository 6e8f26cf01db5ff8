/* Which ISAs a CPU and its system have: dispatch.c over made-up registers. Run by
 * tests/test_cpu.py with the hexadecimal values of ECX of CPUID's leaf 1, EBX of leaf 7, XCR0 and
 * EDX of leaf 7, and with what the system answers when asked for tiles. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned leaf1_ecx, leaf7_ebx, leaf7_edx, xcr0_low, answer;

#define FSM_HAVE_AVX2
#define FSM_HAVE_AVX512
#define FSM_HAVE_AMX
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, subleaf, a, b, c, d)                                    \
    ((void)(a), *(b) = (leaf) == 7 ? leaf7_ebx : 0, *(d) = (leaf) == 7 ? leaf7_edx : 0, \
     *(c) = (leaf) == 1 ? leaf1_ecx : 0)
#define __asm__(...) (low = xcr0_low, high = 0) /* xgetbv */
#define syscall(...) ((long)answer)
#include "../../src_c/dispatch.c"

const fsm_isa fsm_isa_scalar = {"scalar", NULL, NULL, NULL},
              fsm_isa_avx2 = {"avx2", NULL, NULL, NULL},
              fsm_isa_avx512 = {"avx512", NULL, NULL, NULL},
              fsm_isa_amx = {"amx", NULL, NULL, NULL};

int main(int argc, char **argv) {
    unsigned *registers[] = {&leaf1_ecx, &leaf7_ebx, &xcr0_low, &leaf7_edx, &answer};
    if (argc != 6) return 2;
    for (int i = 0; i < 5; i++) *registers[i] = (unsigned)strtoul(argv[i + 1], NULL, 16);
    for (int i = 0; fsm_isa_at(i); i++) puts(fsm_isa_name(fsm_isa_at(i)));
    return 0;
}
