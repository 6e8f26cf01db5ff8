/* Portable C: the fallback, and the oracle of the others. */
#include "vec_scalar.h"

#define FSM_ISA scalar
#include "isa.inc.h"
