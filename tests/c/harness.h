/* What the drivers share: elements of all types, arrays laid out in many ways between guards, ISAs
 * and counts.
 *
 * Guards have all bits set and so are NaN: a read that no tool sees (GCC's ASan is blind to masked
 * vector loads) spoils the results. So does one of fresh memory, which has all bits set, too. */
#ifndef HARNESS_H
#define HARNESS_H

#define _POSIX_C_SOURCE 200112L
#include "fastsoftmax.h"

#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
const char *__asan_default_options(void);
const char *__asan_default_options(void) {
    return "max_malloc_fill_size=1000000000:malloc_fill_byte=255";
}
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif
#ifndef GUARD /* bytes on either side of an array; 0 where a tool watches the ends of each malloc */
#define GUARD 64
#endif
#ifndef ONE_IN /* for slow machines: run one test in so many */
#define ONE_IN 1
#endif
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* ---- elements ---- */

static const char *const type_names[] = {"f16", "bf16", "f32", "f64", "i8",  "i16",
                                         "i32", "i64",  "u8",  "u16", "u32", "u64"};
static const int sizes[] = {2, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8};
static const struct {
    double ulp, least, most; /* of 1; the smallest and the largest number */
} floats[] = {{0x1p-10, 0x1p-24, 65504},
              {0x1p-7, 0x1p-133, 0x1.fep127},
              {0x1p-23, 0x1p-149, 0x1.fffffep127},
              {0x1p-52, 0x1p-1074, 0x1.fffffffffffffp1023}};

/* Halves are cut off, not rounded, and f16 has no subnormals: any number will do. */
static void encode(fsm_dtype type, double v, void *to) {
    uint64_t bits;
    if (type == FSM_F64) memcpy(&bits, &v, sizeof v);
    else if (type > FSM_F64) bits = v < 0 ? (uint64_t)(int64_t)v : (uint64_t)v;
    else {
        const float f = (float)v;
        uint32_t u, low, sign;
        memcpy(&u, &f, sizeof u);
        low = u & 0x7fffffff;
        sign = u >> 16 & 0x8000;
        if (type == FSM_F32) bits = u;
        else if (type == FSM_BF16) bits = u >> 16;
        else if (low > 0x7f800000) bits = 0x7e00;
        else if (low >= 0x47800000) bits = sign | 0x7c00;
        else bits = sign | (low < 0x38800000 ? 0 : (low - 0x38000000) >> 13);
    }
    switch (sizes[type]) {
    case 1: memcpy(to, &(uint8_t){(uint8_t)bits}, 1); break;
    case 2: memcpy(to, &(uint16_t){(uint16_t)bits}, 2); break;
    case 4: memcpy(to, &(uint32_t){(uint32_t)bits}, 4); break;
    default: memcpy(to, &bits, 8);
    }
}

static double decode(fsm_dtype type, const void *from) { /* one of the floating types */
    double d;
    float f;
    uint16_t h;
    if (type == FSM_F64) return memcpy(&d, from, sizeof d), d;
    if (type == FSM_F32) return memcpy(&f, from, sizeof f), f;
    memcpy(&h, from, sizeof h);
    const int bits = type == FSM_F16 ? 10 : 7, one = 1 << bits, most = (1 << (15 - bits)) - 1;
    const int e = h >> bits & most, m = h & (one - 1);
    if (e == most) d = m ? NAN : INFINITY;
    else d = e ? ldexp(one + m, e - most / 2 - bits) : ldexp(m, 1 - most / 2 - bits);
    return h & 0x8000 ? -d : d;
}

static double rounded_to(fsm_dtype type, double v) {
    char bytes[8];
    if (type > FSM_F64) return v;
    encode(type, v, bytes);
    return decode(type, bytes);
}

static uint64_t mix(uint64_t h) { /* splitmix64 */
    h *= 0x9e3779b97f4a7c15;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9;
    h = (h ^ h >> 27) * 0x94d049bb133111eb;
    return h ^ h >> 31;
}

/* Finer than double, but not under valgrind. */
static int has_long_double(void) {
    volatile long double one = 1;
    return one + 0x1p-60L != one;
}

/* ---- arrays ---- */

/* order: the dimensions, by name; the last moves fastest. step: elements from one to the next.
 * pad: further ones between runs of the last dimension. back: bits of the dimensions that run
 * backwards. skew: bytes off the alignment. */
typedef struct {
    const char *name, *order;
    int step, pad, back, skew;
} layout;

enum { MAX_DIMS = 5, STILL = -1 };

typedef struct {
    char *block, *copy, *first; /* with its guards; as it was (an input); element (0, ..., 0) */
    ptrdiff_t size, stride[MAX_DIMS];
} array;

static void *allocate(ptrdiff_t bytes) {
    void *p = malloc((size_t)bytes);
    if (!p) abort();
    return p;
}

/* All bits set. extent: along each of the dimensions `names`, or STILL for a stride of 0. */
static array new_blank(const layout *l, const char *names, const ptrdiff_t *extent, int size) {
    ptrdiff_t pitch = size * l->step, bytes = size, start = 0;
    array a = {0};
    for (size_t k = strlen(names); k-- > 0;) {
        const int d = (int)(strchr(names, l->order[k]) - names), back = l->back >> d & 1;
        if (extent[d] == STILL) continue;
        const ptrdiff_t reach = (extent[d] ? extent[d] - 1 : 0) * pitch;
        a.stride[d] = back ? -pitch : pitch;
        start += back ? reach : 0;
        bytes = extent[d] && bytes ? bytes + reach : 0;
        pitch = pitch * extent[d] + (names[k + 1] ? 0 : l->pad * size);
    }
    if (!bytes) start = 0;
    a.size = GUARD + l->skew + bytes + GUARD;
    a.block = memset(allocate(a.size), 0xff, (size_t)a.size);
    a.first = a.block + GUARD + l->skew + start;
    return a;
}

/* Before it is used; an input is then as it shall stay. */
static void guard(array *a, int is_input) {
    if (is_input) a->copy = memcpy(allocate(a->size), a->block, (size_t)a->size);
    ASAN_POISON_MEMORY_REGION(a->block, GUARD);
    ASAN_POISON_MEMORY_REGION(a->block + a->size - GUARD, GUARD);
}

static int is_untouched(const array *a) {
    ASAN_UNPOISON_MEMORY_REGION(a->block, a->size);
    return memcmp(a->block, a->copy, (size_t)a->size) == 0;
}

/* Moves an element out. */
static void take(char *from, char *to, int size) {
    memcpy(to, from, (size_t)size);
    memset(from, 0xff, (size_t)size);
}

static int is_blank(const array *a) {
    ASAN_UNPOISON_MEMORY_REGION(a->block, a->size);
    if (a->size == 0) return 1;
    return a->block[0] == (char)0xff && !memcmp(a->block, a->block + 1, (size_t)a->size - 1);
}

static void free_array(array *a) {
    free(a->block);
    free(a->copy);
}

/* ---- ISAs and counts ---- */

static const fsm_isa *isas[8], *scalar;
static int isa_count;
static atomic_long passed, failed;

static int tell(int ok) { /* whether to say more: of the first failures, enough to read */
    atomic_fetch_add(ok ? &passed : &failed, 1);
    return !ok && failed <= 20;
}

/* Those that are named, or all; but `like` only if it is named, for to this driver it is what the next one
 * is. */
static void choose_isas(int argc, char **argv, const char *like) {
    setvbuf(stdout, NULL, _IOLBF, 0); /* a failure is told even if the next test crashes */
    fsm_openmp_limit(); /* LLVM's OpenMP raises a floating-point flag when it is first asked */
    for (int i = 0; fsm_isa_at(i); i++) {
        scalar = fsm_isa_at(i); /* the last one */
        int chosen = argc == 1 && strcmp(like, fsm_isa_name(scalar));
        for (int k = 1; k < argc; k++) chosen |= strcmp(argv[k], fsm_isa_name(scalar)) == 0;
        if (chosen) isas[isa_count++] = scalar;
    }
    if (isa_count >= argc - 1) return;
    fprintf(stderr, "usage: %s [ISA...]; here there is", argv[0]);
    for (int i = 0; fsm_isa_at(i); i++) fprintf(stderr, " %s", fsm_isa_name(fsm_isa_at(i)));
    fputs("\n", stderr);
    exit(2);
}

/* One line about the tests of `name`, which began with these counts. */
static void report(const char *name, long good, long bad, time_t start) {
    printf("%-13s %7ld passed, %ld failed, %ld s\n", name, passed - good, failed - bad,
           (long)(time(NULL) - start));
    fflush(stdout);
}

static int total(void) {
    printf("%ld passed, %ld failed\n", (long)passed, (long)failed);
    return failed != 0;
}

/* One flag is up before a call of the library; afterwards it is, and no other. */
static inline void raise_one_flag(void) {
    feclearexcept(FE_ALL_EXCEPT);
    feraiseexcept(FE_DIVBYZERO);
}
static inline int only_that_flag(void) { return fetestexcept(FE_ALL_EXCEPT) == FE_DIVBYZERO; }

#endif
