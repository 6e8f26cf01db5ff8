/* AVX-512 F, BW, DQ and VL. */
#include "vec_avx512.h"

#define FSM_ISA avx512
#include "isa.inc.h"

#if defined(FSM_HAVE_AMX) || defined(FSM_EMULATED_AVX512)
const fsm_isa fsm_isa_amx = {"amx", &f32_kernels, &f64_kernels, &fsm_products_amx};
#endif
