/* NEON of AArch64. */
#include "vec_neon.h"

#define FSM_ISA neon
#include "isa.inc.h"
