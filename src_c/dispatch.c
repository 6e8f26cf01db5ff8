/* Which ISAs this CPU and operating system can run, best first. */
#if defined(__linux__)
#define _GNU_SOURCE /* syscall */
#endif
#include "kernels.h"

#if defined(FSM_HAVE_AVX2) || defined(FSM_HAVE_AVX512)
#if defined(_MSC_VER)
#include <intrin.h>
static void cpuid(uint32_t leaf, uint32_t r[4]) { __cpuidex((int *)r, (int)leaf, 0); }
static uint64_t xcr0(void) { return _xgetbv(0); }
#else
#include <cpuid.h>
static void cpuid(uint32_t leaf, uint32_t r[4]) {
    r[0] = r[1] = r[2] = r[3] = 0;
    __get_cpuid_count(leaf, 0, &r[0], &r[1], &r[2], &r[3]);
}
static uint64_t xcr0(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

static int has(uint32_t word, int bit) { return word >> bit & 1; }

#ifdef FSM_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
/* Linux gives a process the tiles, 8 KB a thread, only if it asks
 * (Documentation/arch/x86/xstate.rst); it may do so any number of times. */
static int system_gives_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
}
#else
static int system_gives_tiles(void) { return 0; }
#endif

/* 0: none, 1: AVX2 + FMA + F16C, 2: also AVX-512 F + DQ + BW + VL, 3: also AMX TILE + BF16. Bits: Intel
 * SDM vol. 2A, CPUID. The system must save the registers. */
static int x86_level(void) {
    uint32_t basic[4], extended[4];
    cpuid(1, basic);
    cpuid(7, extended);
    if (!has(basic[2], 27)) return 0; /* OSXSAVE */
    const uint64_t saved = xcr0();
    if ((saved & 0x6) != 0x6) return 0; /* XMM, YMM */
    if (!has(basic[2], 12) || !has(basic[2], 28) || !has(basic[2], 29) || !has(extended[1], 5))
        return 0;
    if ((saved & 0xe6) != 0xe6) return 1; /* opmask, ZMM */
    if (!has(extended[1], 16) || !has(extended[1], 17) || !has(extended[1], 30) ||
        !has(extended[1], 31))
        return 1;
    if ((saved & 0x60000) != 0x60000) return 2; /* configuration of tiles, tiles */
    return has(extended[3], 22) && has(extended[3], 24) && system_gives_tiles() ? 3 : 2;
}
#endif

/* The list is computed anew at each call, a few dozen cycles to a microsecond: no state, nothing to
 * lock. */
const fsm_isa *fsm_isa_at(int i) {
    const fsm_isa *list[5];
    int count = 0;
#if defined(FSM_HAVE_AVX2) || defined(FSM_HAVE_AVX512)
    const int level = x86_level();
#endif
#ifdef FSM_HAVE_AMX
    if (level >= 3) list[count++] = &fsm_isa_amx;
#endif
#ifdef FSM_EMULATED_AVX512 /* tests/c/avx512_emulated.h */
    list[count++] = &fsm_isa_amx;
    list[count++] = &fsm_isa_avx512;
#elif defined(FSM_HAVE_AVX512)
    if (level >= 2) list[count++] = &fsm_isa_avx512;
#endif
#ifdef FSM_HAVE_AVX2
    if (level >= 1) list[count++] = &fsm_isa_avx2;
#endif
#ifdef FSM_HAVE_NEON /* every AArch64 has it */
    list[count++] = &fsm_isa_neon;
#endif
    list[count++] = &fsm_isa_scalar;
    return i >= 0 && i < count ? list[i] : NULL;
}

const char *fsm_isa_name(const fsm_isa *isa) { return isa->name; }

void fsm_exp_f32(const fsm_isa *isa, float *out, const float *x, ptrdiff_t n) {
    isa->f32->exp(out, x, n);
}
void fsm_exp_f64(const fsm_isa *isa, double *out, const double *x, ptrdiff_t n) {
    isa->f64->exp(out, x, n);
}
double fsm_multiply_add_f32(const fsm_isa *isa, ptrdiff_t count) { return isa->f32->fma(count); }
