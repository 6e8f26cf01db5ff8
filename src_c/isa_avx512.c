/* AVX-512 F, BW, DQ and VL. */
#include "vec_avx512.h"

#define FSM_ISA avx512
#include "isa.inc.h"
