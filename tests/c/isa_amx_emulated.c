/* isa_amx.c for CPUs without AMX: the instructions on tiles, of whole ones only (Intel SDM vol. 2, TDPBF16PS).
 * For `make emulate` only. */
#include "avx512_emulated.h"

typedef union {
    uint8_t bytes[16][64];
    uint16_t bf16[16][32];
    float f32[16][16];
} tile;

static _Thread_local tile tiles_of_cpu[8];
static _Thread_local uint8_t configuration[64];

/* Subnormal numbers are 0. */
static float flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0, a) : a; }
static float number(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float a;
    memcpy(&a, &wide, sizeof a);
    return flushed(a);
}

static void emulated_load(tile *to, const void *from, ptrdiff_t stride) {
    if (configuration[0] != 1) abort();
    for (int i = 0; i < 16; i++) memcpy(to->bytes[i], (const char *)from + i * stride, 64);
}
static void emulated_store(const tile *from, void *to, ptrdiff_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + i * stride, from->bytes[i], 64);
}
static void emulated_multiply(tile *sums, const tile *a, const tile *b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; k++) {
                even = flushed(fmaf(number(a->bf16[m][2 * k]), number(b->bf16[k][2 * n]), even));
                odd = flushed(
                    fmaf(number(a->bf16[m][2 * k + 1]), number(b->bf16[k][2 * n + 1]), odd));
            }
            sums->f32[m][n] = flushed(flushed(sums->f32[m][n]) + flushed(even + odd));
        }
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(p) memcpy(configuration, p, 64)
#define _tile_storeconfig(p) memcpy(p, configuration, 64)
#define _tile_zero(t) memset(&tiles_of_cpu[t], 0, sizeof(tile))
#define _tile_loadd(t, p, stride) emulated_load(&tiles_of_cpu[t], p, stride)
#define _tile_stored(t, p, stride) emulated_store(&tiles_of_cpu[t], p, stride)
#define _tile_dpbf16ps(c, a, b) \
    emulated_multiply(&tiles_of_cpu[c], &tiles_of_cpu[a], &tiles_of_cpu[b])

#include "isa_amx.c"
