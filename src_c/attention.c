/* Attention over strided arrays: how a problem is cut into tasks.
 *
 * A place is one leading index and one KV head. Its rows, the queries of all heads that share the KV
 * head, are cut into units of some groups (attention.inc.h), as even as whole groups allow; each runs
 * over all the keys that its rows see. One query instead (decode.inc.h) is cut along the keys, into
 * parts at places that depend on the number of keys alone, which are then merged: so that few heads
 * keep many threads busy, and the bits do not depend on how many.
 *
 * A task is such a unit or part. Packed sequences, of any lengths, are cut each for itself, and their
 * tasks stand in one line, from which the threads take them, the longest first: how uneven the
 * lengths are does not matter.
 *
 * fsm_attention_run does a slice of the tasks, so that the caller can look for signals in between. */
#include "attention_places.h"
#include "parallel.h"

#include <stdlib.h>
#include <string.h>

enum {
    PARTS = 16,             /* of the keys of one query, at the most */
    PART_KEYS = 512,        /* at the least; a multiple of FSM_DECODE_KEYS */
    SLOTS = 4 * PARTS,      /* tasks of a slice, for each thread, if there are parts to keep */
    SERIAL_BELOW = 1 << 19, /* multiply-adds: 10 us or so, twice the cost of waking a thread */
    MERGE_SLICE = 1 << 21   /* elements between two looks at the signals: 10 ms or so */
};
static const double UNIT = 0x1p29;  /* multiply-adds of a unit, about, at the most: 10 ms */
static const double SLICE = 0x1p30; /* and of a slice, for each thread; portable C: 1/16 of it */

/* Places with as many queries and keys, which are cut alike: all of a problem, or those of one packed
 * sequence. */
typedef struct {
    ptrdiff_t lead, q_start, k_start, queries, keys; /* lead: the first leading index */
    ptrdiff_t first, tasks, per_place;               /* first: its first task in the line */
    double task_work;
    ptrdiff_t rows, span, per_span; /* many queries: units of `rows` rows, per_span of them in each
                                     * `span` of rows, which they do not cross */
    ptrdiff_t part_keys, parts;     /* one query: `parts` of part_keys keys; else 0 */
} sequence;

struct fsm_attention_plan {
    fsm_attention problem;
    const fsm_kernels *kernels;
    const fsm_products *products;
    int threads;
    ptrdiff_t share, chunk,
        chunks;          /* heads of a KV head; of these, in chunks, where there is one query */
    sequence *sequences; /* only those that have a query */
    ptrdiff_t count, tasks, next;
    ptrdiff_t scratch_size, part_size, slots; /* slots: of part_size, for the tasks of a slice */
    char *scratch, *results;
};

/* ---- making a plan ---- */

static double row_work(const fsm_attention *a, ptrdiff_t keys) {
    return (double)keys * (double)(a->depth + a->v_depth);
}

static void cut_queries(const fsm_attention_plan *p, sequence *s, ptrdiff_t places, double work) {
    const ptrdiff_t rows = p->share * s->queries, group = p->kernels->attend_rows;
    const double group_work = (double)group * row_work(&p->problem, s->keys);
    /* Whole heads share a unit if they are short; else a unit stays within one, where the keys that
     * causal masks and windows leave are few. */
    s->span = s->queries < group ? rows : s->queries;
    ptrdiff_t groups = least(FSM_ATTEND_GROUPS, (s->span + group - 1) / group);
    while (groups > 1 && ((double)groups * group_work > UNIT ||
                          (double)groups * group_work * 4 * p->threads > work))
        groups--;
    s->per_span = (s->span + groups * group - 1) / (groups * group);
    s->rows = up_to_multiple((s->span + s->per_span - 1) / s->per_span, group);
    s->per_place = rows / s->span * s->per_span;
    s->tasks = places * s->per_place;
    s->task_work = (double)groups * group_work;
}

static void cut_keys(const fsm_attention_plan *p, sequence *s, ptrdiff_t places) {
    s->part_keys = most(PART_KEYS, up_to_multiple((s->keys + PARTS - 1) / PARTS, FSM_DECODE_KEYS));
    s->parts = most(1, (s->keys + s->part_keys - 1) / s->part_keys);
    s->per_place = p->chunks * s->parts;
    s->tasks = places * s->per_place;
    /* It waits for the memory, and takes a few times as long as so much of many queries. */
    s->task_work = 4 * (double)p->chunk * row_work(&p->problem, least(s->keys, s->part_keys));
}

static ptrdiff_t part_bytes(const fsm_attention_plan *p, ptrdiff_t heads) {
    const ptrdiff_t real_size = p->problem.compute == FSM_F64 ? 8 : 4;
    return p->kernels->decode_part(p->problem.v_depth, heads) * real_size;
}

static int longest_first(const void *left, const void *right) {
    const sequence *a = left, *b = right;
    if (a->task_work != b->task_work) return a->task_work < b->task_work ? 1 : -1;
    return (a->lead > b->lead) - (a->lead < b->lead);
}

/* All tasks in a line. `places` of each sequence. */
static void cut(fsm_attention_plan *p, ptrdiff_t places, double work) {
    int single = 0, many = 0;
    for (ptrdiff_t i = 0; i < p->count; i++) {
        sequence *s = &p->sequences[i];
        if (s->queries == 1) cut_keys(p, s, places);
        else cut_queries(p, s, places, work);
        single |= s->queries == 1;
        many |= s->queries != 1;
    }
    qsort(p->sequences, (size_t)p->count, sizeof *p->sequences, longest_first);
    for (ptrdiff_t i = 0; i < p->count; p->tasks += p->sequences[i++].tasks)
        p->sequences[i].first = p->tasks;

    const fsm_attention *a = &p->problem;
    p->threads = (int)least(p->threads, p->tasks);
    if (many) {
        p->scratch_size = p->kernels->attend_scratch(a->depth, a->v_depth);
        if (p->products) p->scratch_size += p->products->scratch(a->depth, a->v_depth);
    }
    if (!single) return;
    p->scratch_size =
        most(p->scratch_size, p->kernels->decode_scratch(a->depth, a->v_depth, p->chunk));
    p->part_size = part_bytes(p, p->chunk);
    p->slots = least(p->tasks, SLOTS * p->threads) + PARTS; /* a slice ends with whole units */
}

fsm_status fsm_attention_packed_new(fsm_attention_plan **result, const fsm_attention *problem,
                                    const int64_t *q_starts, const int64_t *k_starts) {
    *result = NULL;
    fsm_attention_plan draft = {.problem = *problem}, *p = &draft;
    const fsm_attention *a = &p->problem;
    p->kernels = a->compute == FSM_F64 ? a->isa->f64 : a->isa->f32;
    if (a->operand[FSM_ATTN_Q].dtype == FSM_BF16) p->products = a->isa->bf16;
    const ptrdiff_t places = q_starts ? a->kv_heads : places_of(a),
                    sequences = q_starts ? a->shape[0] : 1;
    if (places == 0 || a->heads == 0 || sequences == 0) return FSM_DONE;
    if (a->v_depth == 0 && !a->operand[FSM_ATTN_LSE].data && !a->operand[FSM_ATTN_WEIGHTS].data)
        return FSM_DONE; /* no results, of however many queries */
    if (too_wide(a)) return FSM_NOMEM;
    p->share = a->heads / a->kv_heads;
    p->chunk = least(p->share, FSM_DECODE_HEADS);
    p->chunks = (p->share + p->chunk - 1) / p->chunk;
    limit_window(&p->problem);

    p->sequences = calloc((size_t)sequences, sizeof *p->sequences);
    if (!p->sequences) return FSM_NOMEM;
    double work = 0;
    for (ptrdiff_t i = 0; i < sequences; i++) {
        sequence s = {.lead = i, .queries = a->queries, .keys = a->keys};
        if (q_starts) {
            s.q_start = (ptrdiff_t)q_starts[i];
            s.k_start = (ptrdiff_t)k_starts[i];
            s.queries = (ptrdiff_t)q_starts[i + 1] - s.q_start;
            s.keys = (ptrdiff_t)k_starts[i + 1] - s.k_start;
        }
        if (s.queries == 0) continue;
        work += (double)(places * p->share) * (double)s.queries * row_work(a, s.keys);
        p->sequences[p->count++] = s;
    }
    p->threads = work < SERIAL_BELOW ? 1 : a->threads;
    cut(p, places, work);

    p->scratch_size = up_to_multiple(p->scratch_size, FSM_ALIGN) + FSM_ALIGN;
    const size_t head = (size_t)up_to_multiple(sizeof *p, FSM_ALIGN),
                 scratch = (size_t)p->scratch_size * (size_t)p->threads,
                 results = (size_t)p->part_size * (size_t)p->slots;
    char *block = p->count ? malloc(head + scratch + results + FSM_ALIGN) : NULL;
    if (!block) {
        free(p->sequences);
        return p->count ? FSM_NOMEM : FSM_DONE;
    }
    *result = (fsm_attention_plan *)block;
    **result = draft;
    (*result)->scratch = block + head;
    (*result)->results = block + head + scratch;
    return FSM_AGAIN;
}

fsm_status fsm_attention_new(fsm_attention_plan **result, const fsm_attention *problem) {
    return fsm_attention_packed_new(result, problem, NULL, NULL);
}

void fsm_attention_free(fsm_attention_plan *p) {
    if (p) free(p->sequences);
    free(p);
}

/* ---- places ---- */

static char *scratch_of(const fsm_attention_plan *p, int thread) {
    char *at = p->scratch + p->scratch_size * thread;
    return at + (-(uintptr_t)at & (FSM_ALIGN - 1));
}

/* Heads [head, head + heads) at a place of a sequence, which share a KV head. */
static fsm_attend attend_in(const fsm_attention_plan *p, const sequence *s, ptrdiff_t place,
                            ptrdiff_t head, ptrdiff_t heads, int thread) {
    fsm_attend a = attend_place(&p->problem, s->lead * p->problem.kv_heads + place, head, heads);
    a.scratch = scratch_of(p, thread);
    a.queries = s->queries;
    a.keys = s->keys;
    a.length = least(a.length, s->keys);
    a.q.at += s->q_start * a.q.row;
    a.k.at += s->k_start * a.k.row;
    a.v.at += s->k_start * a.v.row;
    a.out.at += s->q_start * a.out.row;
    if (a.lse.at) a.lse.at += s->q_start * a.lse.row;
    return a;
}

/* ---- tasks ---- */

/* The sequence that a task belongs to. */
static const sequence *sequence_of(const fsm_attention_plan *p, ptrdiff_t task) {
    ptrdiff_t low = 0, high = p->count;
    while (high - low > 1) {
        const ptrdiff_t middle = low + (high - low) / 2;
        if (p->sequences[middle].first <= task) low = middle;
        else high = middle;
    }
    return &p->sequences[low];
}

/* Backwards: the last queries see the most keys under a causal mask, and what takes longest is best
 * begun first. */
static void query_task(const fsm_attention_plan *p, const sequence *s, ptrdiff_t i, int thread) {
    const ptrdiff_t unit = s->per_place - 1 - i % s->per_place, span = unit / s->per_span * s->span;
    fsm_attend a = attend_in(p, s, i / s->per_place, 0, p->share, thread);
    a.products = p->products;
    a.begin = span + unit % s->per_span * s->rows;
    a.end = least(a.begin + s->rows, span + s->span);
    p->kernels->attend(&a);
}

/* The chunk of heads that task i of a sequence of one query works for. */
static fsm_attend decode_at(const fsm_attention_plan *p, const sequence *s, ptrdiff_t i,
                            int thread) {
    const ptrdiff_t head = i / s->parts % p->chunks * p->chunk;
    return attend_in(p, s, i / s->per_place, head, least(p->chunk, p->share - head), thread);
}

/* The parts of the chunk that task i of a sequence works for; they are as large as its heads need. */
static char *results_of(const fsm_attention_plan *p, const sequence *s, ptrdiff_t i) {
    return p->results + (s->first + i - i % s->parts - p->next) * p->part_size;
}

static void key_task(const fsm_attention_plan *p, const sequence *s, ptrdiff_t i, int thread) {
    const ptrdiff_t part = i % s->parts, first = part * s->part_keys;
    const fsm_attend a = decode_at(p, s, i, thread);
    char *results = results_of(p, s, i);
    p->kernels->decode(&a, first, least(first + s->part_keys, a.keys),
                       results + part * part_bytes(p, a.heads));
    if (s->parts == 1) p->kernels->decode_end(&a, results, 1);
}

static void do_tasks(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_plan *p = context;
    for (ptrdiff_t i = begin + p->next; i < end + p->next; i++) {
        const sequence *s = sequence_of(p, i);
        if (s->parts) key_task(p, s, i - s->first, thread);
        else query_task(p, s, i - s->first, thread);
    }
}

/* Merges the parts of the queries whose last part is among the tasks. */
static void merge_parts(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_attention_plan *p = context;
    for (ptrdiff_t i = begin + p->next; i < end + p->next; i++) {
        const sequence *s = sequence_of(p, i);
        if (s->parts < 2 || (i - s->first) % s->parts != s->parts - 1) continue;
        const fsm_attend a = decode_at(p, s, i - s->first, thread);
        p->kernels->decode_end(&a, results_of(p, s, i - s->first), s->parts);
    }
}

/* The end of the slice that begins with the next task. */
static ptrdiff_t slice_end(const fsm_attention_plan *p) {
    double work = SLICE * p->threads / (p->problem.isa == &fsm_isa_scalar ? 16 : 1);
    const ptrdiff_t room = p->slots ? p->next + p->slots - PARTS : p->tasks;
    ptrdiff_t end = p->next;
    for (const sequence *s = sequence_of(p, end); end < least(room, p->tasks) && work > 0; s++) {
        const ptrdiff_t left = s->first + s->tasks - end, unit = most(s->parts, 1);
        const double fit = work / (s->task_work + 1);
        const ptrdiff_t some = fit < (double)left ? (ptrdiff_t)fit + 1 : left;
        end += least(left, up_to_multiple(least(some, room - end), unit));
        work -= (double)some * s->task_work;
    }
    return end;
}

fsm_status fsm_attention_run(fsm_attention_plan *p) {
    const uint64_t before = fsm_fp_enter();
    const ptrdiff_t end = slice_end(p), count = end - p->next;
    fsm_fp_leave(before);
    fsm_parallel_for(p->threads, count, 1, do_tasks, p);
    const int threads = p->problem.operand[FSM_ATTN_WEIGHTS].data ? p->threads : 1;
    if (p->slots) fsm_parallel_for(threads, count, 1, merge_parts, p);
    p->next = end;
    return p->next < p->tasks ? FSM_AGAIN : FSM_DONE;
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
