/* AVX2 + FMA + F16C. */
#include "vec_avx2.h"
#include "log.h"

#define FSM_BITS 32
#define FSM_TYPE f32
#include "table.inc.h"
static const fsm_kernels f32_kernels = FSM_KERNELS;

#undef FSM_BITS
#undef FSM_TYPE
#define FSM_BITS 64
#define FSM_TYPE f64
#include "table.inc.h"
static const fsm_kernels f64_kernels = FSM_KERNELS;

const fsm_isa fsm_isa_avx2 = {"avx2", &f32_kernels, &f64_kernels};
