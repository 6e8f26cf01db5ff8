/* One ISA, FSM_ISA, whose vec_*.h is included already: the templates for float32 and for float64, and
 * the table of both, fsm_isa_NAME, the one symbol that its object file exports. */
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

#define FSM_QUOTE_(name) #name
#define FSM_QUOTE(name) FSM_QUOTE_(name)
const fsm_isa FSM_PASTE(fsm_isa, FSM_ISA) = {FSM_QUOTE(FSM_ISA), &f32_kernels, &f64_kernels, NULL};
