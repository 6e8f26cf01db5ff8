/* portable C, the fallback and the oracle of the others. */
#include "vec_scalar.h"
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

const fsm_isa fsm_isa_scalar = {"scalar", &f32_kernels, &f64_kernels};
