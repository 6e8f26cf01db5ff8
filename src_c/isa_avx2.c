/* AVX2, FMA and F16C. */
#include "vec_avx2.h"

#define FSM_ISA avx2
#include "isa.inc.h"
