/* The backward pass of attention over strided arrays: how it is cut into units of work.
 *
 * At each place the rows, in units of some groups (attention_backward.inc.h), and the blocks of keys are
 * each divided into `parts`. A piece is a part of the rows and a part of the keys: it adds to dq of
 * the one, and to dk and dv of the other. In round t the pieces (i, (i + t) mod parts) are done, at
 * all places: no two of them add to the same numbers, so they may run at once, and whatever runs
 * when, each number is added up in the order of the rounds. The number of parts depends on the
 * lengths alone, so bits do not depend on the threads.
 *
 * Where gradients are broadcast, places add to the same numbers: then they are done one leading
 * index, or one place, after the other. Where the gradient of a bias is the same for all keys, so do
 * pieces of a round, if their rows meet in it, too: then there is one thread.
 *
 * fsm_attention_backward_run does a slice of a round, so that the caller can look for signals in
 * between. */
#include "attention_places.h"

#include <stdlib.h>

enum {
    PARTS = 16,            /* at the most, unless pieces are too long */
    PART_KEYS = 256,       /* at the least: setting up a unit is then below 2 % of its work */
    SERIAL_BELOW = 1 << 18 /* multiply-adds, as in attention.c */
};
static const double PIECE = 0x1p29; /* multiply-adds of a piece, about, at the most */
static const double SLICE = 0x1p29; /* multiply-adds for each thread: 10 ms; portable C: 1/16 */

struct fsm_attention_backward_plan {
    fsm_attention problem;
    const fsm_kernels *kernels;
    int threads;
    ptrdiff_t share;                           /* heads of a KV head */
    ptrdiff_t rows, span, per_span, per_place; /* of units, as in attention.c */
    ptrdiff_t blocks, parts;
    ptrdiff_t places, together, per_slice; /* together: places done at once */
    ptrdiff_t place, round, piece;         /* where the next slice starts */
    ptrdiff_t scratch_size;
    char *scratch;
};

/* Whether places along some leading dimension add to the same numbers. */
static int leads_meet(const fsm_attention *a) {
    for (int o = FSM_ATTN_DQ; o <= FSM_ATTN_DSINKS; o++)
        for (int d = 0; d < a->ndim && a->operand[o].data; d++)
            if (a->shape[d] > 1 && a->operand[o].strides[d] == 0) return 1;
    return 0;
}

fsm_status fsm_attention_backward_new(fsm_attention_backward_plan **result,
                                      const fsm_attention *problem) {
    *result = NULL;
    fsm_attention_backward_plan draft = {.problem = *problem}, *p = &draft;
    const fsm_attention *a = &p->problem;
    p->kernels = a->compute == FSM_F64 ? a->isa->f64 : a->isa->f32;
    p->places = places_of(a);
    if (p->places == 0 || a->heads == 0 || a->queries == 0 || a->keys == 0) return FSM_DONE;
    if (too_wide(a)) return FSM_NOMEM;
    limit_window(&p->problem);
    p->share = a->heads / a->kv_heads;

    const ptrdiff_t group = p->kernels->attend_rows, rows = p->share * a->queries;
    p->span = a->queries < group ? rows : a->queries;
    p->rows = group * least(FSM_ATTEND_GROUPS, (p->span + group - 1) / group);
    p->per_span = (p->span + p->rows - 1) / p->rows;
    p->per_place = rows / p->span * p->per_span;
    p->blocks = (a->keys + FSM_ATTEND_KEYS - 1) / FSM_ATTEND_KEYS;
    p->parts = least(least(PARTS, p->per_place), most(1, a->keys / PART_KEYS));

    const fsm_array *bias = &a->operand[FSM_ATTN_DBIAS];
    const ptrdiff_t *last = &bias->strides[a->ndim]; /* head, query, key */
    const int heads_meet = bias->data && last[0] == 0;
    p->together = heads_meet ? 1 : leads_meet(a) ? a->kv_heads : p->places;

    const double work = 2.5 * (double)rows * (double)a->keys * (double)(a->depth + a->v_depth);
    while (work / (double)(p->parts * p->parts) > PIECE &&
           2 * p->parts <= least(p->per_place, p->blocks))
        p->parts *= 2;
    const double piece = work / (double)(p->parts * p->parts);
    p->threads = work * (double)p->places < SERIAL_BELOW ? 1 : a->threads;
    const int rows_meet = last[1] == 0 || (heads_meet && p->share > 1);
    if (bias->data && last[2] == 0 && rows_meet) p->threads = 1;
    p->threads = (int)least(p->threads, p->together * p->parts);
    const double slice = SLICE * p->threads / (a->isa == &fsm_isa_scalar ? 16 : 1) / (piece + 1);
    p->per_slice =
        slice < (double)(p->together * p->parts) ? (ptrdiff_t)slice + 1 : p->together * p->parts;

    p->scratch_size = p->kernels->gradient_scratch(a->depth, a->v_depth);
    p->scratch_size = up_to_multiple(p->scratch_size, FSM_ALIGN) + FSM_ALIGN;
    const size_t head = (size_t)up_to_multiple(sizeof *p, FSM_ALIGN);
    char *block = malloc(head + (size_t)p->scratch_size * (size_t)p->threads);
    if (!block) return FSM_NOMEM;
    *result = (fsm_attention_backward_plan *)block;
    **result = draft;
    (*result)->scratch = block + head;
    return FSM_AGAIN;
}

void fsm_attention_backward_free(fsm_attention_backward_plan *p) { free(p); }

static void pieces(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_backward_plan *p = context;
    char *scratch = p->scratch + p->scratch_size * thread;
    scratch += -(uintptr_t)scratch & (FSM_ALIGN - 1);
    for (ptrdiff_t i = begin + p->piece; i < end + p->piece; i++) {
        const ptrdiff_t row_part = i % p->parts, key_part = (row_part + p->round) % p->parts;
        fsm_attend a = attend_place(&p->problem, p->place + i / p->parts, 0, p->share);
        a.scratch = scratch;
        a.key_begin = key_part * p->blocks / p->parts * FSM_ATTEND_KEYS;
        a.key_end = least((key_part + 1) * p->blocks / p->parts * FSM_ATTEND_KEYS, a.keys);
        const ptrdiff_t last = (row_part + 1) * p->per_place / p->parts;
        for (ptrdiff_t unit = row_part * p->per_place / p->parts; unit < last; unit++) {
            const ptrdiff_t span = unit / p->per_span * p->span;
            a.begin = span + unit % p->per_span * p->rows;
            a.end = least(a.begin + p->rows, span + p->span);
            p->kernels->gradient(&a);
        }
    }
}

fsm_status fsm_attention_backward_run(fsm_attention_backward_plan *p) {
    const ptrdiff_t places = least(p->together, p->places - p->place), all = places * p->parts,
                    count = least(p->per_slice, all - p->piece);
    fsm_parallel_for(p->threads, count, 1, pieces, p);
    p->piece += count;
    if (p->piece == all) {
        p->piece = 0;
        p->round++;
    }
    if (p->round == p->parts) {
        p->round = 0;
        p->place += places;
    }
    return p->place < p->places ? FSM_AGAIN : FSM_DONE;
}
