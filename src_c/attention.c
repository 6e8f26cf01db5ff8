/* Attention over strided arrays: how a problem is cut into units of work.
 *
 * A place is one leading index and one KV head. Its rows, the queries of all heads that share the KV
 * head, are cut into units of some groups (attention.inc.h); each runs over all the keys that its
 * rows see. One query instead (decode.inc.h) is cut along the keys, into parts at places that
 * depend on the number of keys alone, which are then merged: so that few heads keep many threads
 * busy, and the bits do not depend on how many.
 *
 * fsm_attention_run does a slice of the units, so that the caller can look for signals in between. */
#include "attention_places.h"
#include "parallel.h"

#include <stdlib.h>
#include <string.h>

enum {
    PARTS = 16,             /* of the keys of one query, at the most */
    PART_KEYS = 512,        /* at the least; a multiple of FSM_DECODE_KEYS */
    SERIAL_BELOW = 1 << 19, /* multiply-adds: 10 us or so, twice the cost of waking a thread */
    MERGE_SLICE = 1 << 21   /* elements between two looks at the signals: 10 ms or so */
};
static const double UNIT = 0x1p29;  /* multiply-adds of a unit, about, at the most: 10 ms */
static const double SLICE = 0x1p30; /* and of a slice, for each thread; portable C: 1/16 of it */

struct fsm_attention_plan {
    fsm_attention problem;
    const fsm_kernels *kernels;
    int threads, decode;
    ptrdiff_t places, share; /* heads of a KV head */
    ptrdiff_t real_size, scratch_size;
    char *scratch;
    /* many queries: units of `rows` rows, per_span of them in each `span` of rows, which they do not
     * cross, and per_place at a place */
    ptrdiff_t rows, span, per_span, per_place, units, per_slice, unit;
    /* one query: `parts` of part_keys keys, for `batch` places at a time */
    ptrdiff_t chunk, chunks, part_keys, parts, part_size, batch;
    char *results;
};

/* ---- making a plan ---- */

static double slice_work(const fsm_attention_plan *p) {
    return SLICE * p->threads / (p->problem.isa == &fsm_isa_scalar ? 16 : 1);
}

static void cut_queries(fsm_attention_plan *p, double row_work) {
    const fsm_attention *a = &p->problem;
    const ptrdiff_t rows = p->share * a->queries, group = p->kernels->attend_rows;
    /* Whole heads share a unit if they are short; else a unit stays within one, where the keys that
     * causal masks and windows leave are few. */
    p->span = a->queries < group ? rows : a->queries;
    ptrdiff_t groups = least(FSM_ATTEND_GROUPS, (p->span + group - 1) / group);
    while (groups > 1 && ((double)groups * (double)group * row_work > UNIT ||
                          p->places * (rows / (groups * group)) < 4 * p->threads))
        groups--;
    p->rows = groups * group;
    p->per_span = (p->span + p->rows - 1) / p->rows;
    p->per_place = rows / p->span * p->per_span;
    p->units = p->places * p->per_place;
    const double slice = slice_work(p) / ((double)p->rows * row_work + 1);
    p->per_slice = slice < (double)p->units ? (ptrdiff_t)slice + 1 : p->units;
    p->scratch_size = p->kernels->attend_scratch(a->depth, a->v_depth);
}

static void cut_keys(fsm_attention_plan *p, double row_work) {
    const fsm_attention *a = &p->problem;
    p->chunk = least(p->share, FSM_DECODE_HEADS);
    p->chunks = (p->share + p->chunk - 1) / p->chunk;
    p->part_keys = most(PART_KEYS, up_to_multiple((a->keys + PARTS - 1) / PARTS, FSM_DECODE_KEYS));
    p->parts = most(1, (a->keys + p->part_keys - 1) / p->part_keys);
    p->part_size = p->kernels->decode_part(a->v_depth, p->chunk) * p->real_size;
    p->scratch_size = p->kernels->decode_scratch(a->depth, a->v_depth, p->chunk);
    p->units = p->places * p->chunks;
    const double slice = slice_work(p) / ((double)p->chunk * row_work + 1);
    p->batch = least(p->units, slice < 4 * p->threads ? (ptrdiff_t)slice + 1 : 4 * p->threads);
}

fsm_status fsm_attention_new(fsm_attention_plan **result, const fsm_attention *problem) {
    *result = NULL;
    fsm_attention_plan draft = {.problem = *problem}, *p = &draft;
    const fsm_attention *a = &p->problem;
    p->kernels = a->compute == FSM_F64 ? a->isa->f64 : a->isa->f32;
    p->real_size = a->compute == FSM_F64 ? 8 : 4;
    p->places = places_of(a);
    if (p->places == 0 || a->heads == 0 || a->queries == 0) return FSM_DONE;
    p->share = a->heads / a->kv_heads;
    limit_window(&p->problem);

    const double row_work = (double)a->keys * (double)(a->depth + a->v_depth),
                 work = row_work * (double)p->places * (double)(p->share * a->queries);
    p->threads = work < SERIAL_BELOW ? 1 : a->threads;
    p->decode = a->queries == 1;
    if (p->decode) cut_keys(p, row_work);
    else cut_queries(p, row_work);
    const ptrdiff_t most_units = p->decode ? p->batch * p->parts : p->units;
    p->threads = (int)least(p->threads, most_units);

    p->scratch_size = up_to_multiple(p->scratch_size, FSM_ALIGN) + FSM_ALIGN;
    const size_t head = (size_t)up_to_multiple(sizeof *p, FSM_ALIGN),
                 scratch = (size_t)p->scratch_size * (size_t)p->threads,
                 results = p->decode ? (size_t)(p->part_size * p->parts * p->batch) : 0;
    char *block = malloc(head + scratch + results + FSM_ALIGN);
    if (!block) return FSM_NOMEM;
    *result = (fsm_attention_plan *)block;
    **result = draft;
    (*result)->scratch = block + head;
    (*result)->results = block + head + scratch;
    return FSM_AGAIN;
}

void fsm_attention_free(fsm_attention_plan *p) { free(p); }

/* ---- places ---- */

static char *scratch_of(const fsm_attention_plan *p, int thread) {
    char *at = p->scratch + p->scratch_size * thread;
    return at + (-(uintptr_t)at & (FSM_ALIGN - 1));
}

/* Heads [head, head + heads) at a place, which share a KV head. */
static fsm_attend attend_at(const fsm_attention_plan *p, ptrdiff_t place, ptrdiff_t head,
                            ptrdiff_t heads, int thread) {
    fsm_attend one = attend_place(&p->problem, place, head, heads);
    one.scratch = scratch_of(p, thread);
    return one;
}

/* ---- many queries ---- */

/* Backwards: the last queries see the most keys under a causal mask, and what takes longest is best
 * begun first. */
static void query_units(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_plan *p = context;
    for (ptrdiff_t i = begin + p->unit; i < end + p->unit; i++) {
        const ptrdiff_t place = i / p->per_place, unit = p->per_place - 1 - i % p->per_place;
        fsm_attend a = attend_at(p, place, 0, p->share, thread);
        const ptrdiff_t span = unit / p->per_span * p->span;
        a.begin = span + unit % p->per_span * p->rows;
        a.end = least(a.begin + p->rows, span + p->span);
        p->kernels->attend(&a);
    }
}

/* ---- one query ---- */

static char *results_of(const fsm_attention_plan *p, ptrdiff_t unit) {
    return p->results + unit * p->parts * p->part_size;
}

static fsm_attend decode_at(const fsm_attention_plan *p, ptrdiff_t unit, int thread) {
    const ptrdiff_t head = unit % p->chunks * p->chunk;
    return attend_at(p, unit / p->chunks, head, least(p->chunk, p->share - head), thread);
}

static void key_units(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_plan *p = context;
    for (ptrdiff_t i = begin; i < end; i++) {
        const ptrdiff_t unit = i / p->parts, part = i % p->parts, first = part * p->part_keys;
        const fsm_attend a = decode_at(p, p->unit + unit, thread);
        /* the last chunk of heads may be smaller, and so are its parts */
        const ptrdiff_t size = p->kernels->decode_part(a.v_depth, a.heads) * p->real_size;
        p->kernels->decode(&a, first, least(first + p->part_keys, a.keys),
                           results_of(p, unit) + part * size);
    }
}

static void key_ends(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_plan *p = context;
    for (ptrdiff_t unit = begin; unit < end; unit++) {
        const fsm_attend a = decode_at(p, p->unit + unit, thread);
        p->kernels->decode_end(&a, results_of(p, unit), p->parts);
    }
}

fsm_status fsm_attention_run(fsm_attention_plan *p) {
    const ptrdiff_t count = least(p->decode ? p->batch : p->per_slice, p->units - p->unit);
    if (p->decode) {
        fsm_parallel_for(p->threads, count * p->parts, 1, key_units, p);
        const int threads = p->problem.operand[FSM_ATTN_WEIGHTS].data ? p->threads : 1;
        fsm_parallel_for(threads, count, 1, key_ends, p);
    } else fsm_parallel_for(p->threads, count, 1, query_units, p);
    p->unit += count;
    return p->unit < p->units ? FSM_AGAIN : FSM_DONE;
}

/* ---- merge_attention ---- */

typedef struct {
    const fsm_merge *problem;
    ptrdiff_t begin;
} merge_slice;

static void merge_rows(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const merge_slice *slice = context;
    const fsm_merge *m = slice->problem;
    const fsm_kernels *kernels = m->compute == FSM_F64 ? m->isa->f64 : m->isa->f32;
    fsm_dtype dtype[FSM_MERGE_COUNT];
    (void)thread;
    for (int o = 0; o < FSM_MERGE_COUNT; o++) dtype[o] = m->operand[o].dtype;
    for (ptrdiff_t r = slice->begin + begin; r < slice->begin + end; r++) {
        fsm_matrix row[FSM_MERGE_COUNT];
        for (int o = 0; o < FSM_MERGE_COUNT; o++) {
            const fsm_array *array = &m->operand[o];
            row[o] = (fsm_matrix){.at = array->data + offset_of(array, m->shape, m->ndim, r),
                                  .column = array->strides[m->ndim]};
        }
        kernels->merge_row(row, dtype, m->columns);
    }
}

ptrdiff_t fsm_merge_attention(const fsm_merge *m, ptrdiff_t begin) {
    ptrdiff_t rows = 1;
    for (int d = 0; d < m->ndim; d++) rows *= m->shape[d];
    const ptrdiff_t columns = most(m->columns, 1),
                    count = least(rows - begin, MERGE_SLICE / columns + 1);
    const int threads = fsm_is_small(count * columns) ? 1 : m->threads;
    merge_slice slice = {m, begin};
    if (count > 0) fsm_parallel_for(threads, count, count / (threads * 8) + 1, merge_rows, &slice);
    return begin + count < rows ? begin + count : -1;
}
