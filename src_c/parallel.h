/* Loops over units of work, on the threads that there are. */
#ifndef FSM_PARALLEL_H
#define FSM_PARALLEL_H

#include "fastsoftmax.h"

/* Does units [begin, end). `thread` is below the number of threads asked for and differs between
 * those that run at once. */
typedef void (*fsm_body)(void *context, int thread, ptrdiff_t begin, ptrdiff_t end);

/* Calls body on pieces of [0, n), `grain` units at a time, in any order, on at most `threads`
 * threads, and returns when all is done. Every call of body sees the default floating-point mode
 * (nearest, no flush to zero, no traps), and the caller's is as before afterwards. */
void fsm_parallel_for(int threads, ptrdiff_t n, ptrdiff_t grain, fsm_body body, void *context);

/* The same where units are alike: each thread begins with a share of its own, which is the same in
 * each call, for its caches may still hold it. Backward: each share from its end to its beginning. */
void fsm_parallel_shares(int threads, ptrdiff_t n, ptrdiff_t grain, int backward, fsm_body body,
                         void *context);

/* For cutting work. */
static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

/* Bytes of the last-level cache; 0 if that is not known. */
ptrdiff_t fsm_last_cache(void);

/* The floating-point mode and flags of this thread: enter returns what to give to leave. */
uint64_t fsm_fp_enter(void);
void fsm_fp_leave(uint64_t before);

#endif
