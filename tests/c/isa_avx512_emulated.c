/* isa_avx512.c for CPUs without AVX-512. */
#include "avx512_emulated.h"

#include "isa_avx512.c"
