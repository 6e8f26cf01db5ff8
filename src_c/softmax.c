/* The softmax family over strided arrays: how a problem is walked.
 *
 * The dimensions of a problem are of two kinds, those of the rows and those of the softmax axis.
 * Since neither the order of the rows nor (exp.inc.h) that of the elements in a row matters,
 * dimensions are flipped, sorted and merged freely. What is left is walked in one of four ways:
 *
 *     direct   contiguous rows with nothing fused: the kernels take them where they lie
 *     fused    contiguous rows with scale, bias or where: some at a time go through scratch
 *     row      a row at a time is read into scratch, whatever its strides, dtype and masks
 *     lanes    FSM_LANES rows at a time, where they lie closer together than the elements of one (a
 *              strided axis), or are short; `columns` if side by side and nothing is fused
 *
 * A unit of work is a row, or a group of lanes. If it fits the scratch it is read once; else each
 * pass reads it again, in chunks. Units are dealt to the threads; a unit that is too long for that
 * (`wide`) is itself dealt, chunk by chunk, pass by pass, and the threads' sums merge exactly.
 * fsm_plan_run does a slice of all this, so that the caller can look for signals in between. */
#include "kernels.h"
#include "parallel.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    SERIAL_BELOW =
        1 << 15, /* elements: a second thread costs more than it brings (about 5 us to wake) */
    PER_THREAD = 1 << 14,    /* elements that each further thread must get */
    SCRATCH_BYTES = 1 << 19, /* of a unit that is read once: half of a common second-level cache */
    CHUNK_BYTES = 1 << 16,   /* of a piece of a longer one */
    FUSED_BYTES = 1 << 15,   /* of what is added to rows: as much as the nearest cache */
    FUSED_MOST = 1 << 14,    /* elements of a fused row */
    CACHE_LEAST = 1 << 25,   /* x and out of fewer bytes stay in the caches */
    CACHE_MOST = 1 << 26,    /* of more they do not, though a server says so (fills_the_caches) */
    DIRECT_MOST = 1 << 18,   /* elements of a direct row; a longer one is worth being dealt */
    SLICE = 1 << 23          /* elements done between two looks at the signals: 10 ms or so */
};

typedef enum { PASS_MAX, PASS_MAX2, PASS_SUM, PASS_MAP, PASS_FILL, PASS_END } pass_id;

typedef struct {
    ptrdiff_t size, stride[FSM_OPERAND_COUNT];
} dimension;

/* Where a unit starts in each operand, and how many of its lanes are rows. */
typedef struct {
    char *at[FSM_OPERAND_COUNT];
    int rows;
} unit_place;

struct fsm_plan {
    fsm_op op;
    fsm_dtype compute, dtype[FSM_OPERAND_COUNT];
    const fsm_kernels *kernels;
    const fsm_passes *pass;
    char *data[FSM_OPERAND_COUNT];
    int threads, row_ndim, axis_ndim;
    dimension row[FSM_MAX_NDIM], axis[FSM_MAX_NDIM];
    ptrdiff_t rows, n;

    int direct, fused, columns, wide, resident, from_memory, nontemporal, labels, lanes;
    ptrdiff_t block;          /* fused: rows at a time, if what is added to them differs */
    ptrdiff_t exps, additive; /* and where these begin in the scratch, behind z; elements */
    ptrdiff_t groups;         /* of lanes along the last row dimension */
    ptrdiff_t units, chunk, chunks, slice;
    ptrdiff_t real_size, scratch_elements, scratch_size;
    char *scratch;     /* one piece a thread */
    fsm_state *states; /* wide: that of the unit, then one a thread */

    ptrdiff_t unit, next_chunk; /* where the next slice starts */
    ptrdiff_t first_chunk;      /* of this slice, in the row */
    pass_id pass_at;
    unit_place place; /* wide: of the unit */
};

int fsm_is_small(ptrdiff_t elements) { return elements < SERIAL_BELOW; }

/* ---- making a plan ---- */

static ptrdiff_t itemsize(fsm_dtype dtype) {
    switch (dtype) {
    case FSM_I8:
    case FSM_U8: return 1;
    case FSM_F16:
    case FSM_BF16:
    case FSM_I16:
    case FSM_U16: return 2;
    case FSM_F32:
    case FSM_I32:
    case FSM_U32: return 4;
    default: return 8;
    }
}

static int has_labels(fsm_op op) {
    return op == FSM_CROSS_ENTROPY || op == FSM_CROSS_ENTROPY_BACKWARD;
}

/* Drops dimensions of size 1, walks the others forwards in x (but for an axis whose elements have
 * numbers), sorts them by x's stride, largest first, and merges those that are one. */
static int simplify(fsm_plan *p, dimension *d, int ndim) {
    int kept = 0;
    for (int i = 0; i < ndim; i++) {
        if (d[i].size == 1) continue;
        if (d[i].stride[FSM_X] < 0 && !(d == p->axis && has_labels(p->op)))
            for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
                if (p->data[o]) p->data[o] += (d[i].size - 1) * d[i].stride[o];
                d[i].stride[o] = -d[i].stride[o];
            }
        dimension one = d[i];
        int j = kept++;
        for (; j > 0 && d[j - 1].stride[FSM_X] < one.stride[FSM_X]; j--) d[j] = d[j - 1];
        d[j] = one;
    }
    int merged = 0;
    for (int i = 0; i < kept; i++) {
        int joins = merged > 0;
        for (int o = 0; o < FSM_OPERAND_COUNT && joins; o++)
            joins = !p->data[o] || d[merged - 1].stride[o] == d[i].stride[o] * d[i].size;
        if (!joins) d[merged++] = d[i];
        else {
            const ptrdiff_t outer = d[merged - 1].size;
            d[merged - 1] = d[i];
            d[merged - 1].size *= outer;
        }
    }
    return merged;
}

static int is_backward(fsm_op op) {
    return op == FSM_SOFTMAX_BACKWARD || op == FSM_LOG_SOFTMAX_BACKWARD;
}

/* Floating types that the row kernels of a compute type read and write by themselves. */
static int is_native(const fsm_plan *p, fsm_dtype dtype) {
    return p->compute == FSM_F64 ? dtype == FSM_F64
                                 : dtype == FSM_F16 || dtype == FSM_BF16 || dtype == FSM_F32;
}

static double bytes_of(const fsm_plan *p) {
    const double size = (double)(itemsize(p->dtype[FSM_X]) + itemsize(p->dtype[FSM_OUT]));
    return (double)p->rows * (double)p->n * size;
}

/* Whether there are so many results that they had better go past the caches: what is read next, and
 * not what was written, is then found there. Not in place, where each line is in a cache anyway. It
 * pays from 32 MB of x and out on a Zen 5 that says 32 (4096 x 1024: 429 us, else 707). Servers say
 * what all their cores have together. From 64 MB on: on a Xeon that says 300 8192 x 1024 took 3.6 ms of
 * one thread, else 6.0 to 6.7, of two 2.2, else 2.1; on one that says 480 of two 2.1, else 1.6, and
 * 16384 x 1024 4.1, else 4.5. */
static int fills_the_caches(const fsm_plan *p) {
    ptrdiff_t bits = (ptrdiff_t)(uintptr_t)p->data[FSM_OUT]; /* of all addresses of rows */
    for (int d = 0; d < p->row_ndim; d++) bits |= p->row[d].stride[FSM_OUT];
    return p->pass->map && p->dtype[FSM_OUT] == p->compute && bits % p->real_size == 0 &&
           p->data[FSM_X] != p->data[FSM_OUT] && p->n > FSM_SHORT_ROW &&
           bytes_of(p) >= (double)most(CACHE_LEAST, least(CACHE_MOST, fsm_last_cache()));
}

/* Units of a row, or of groups of `lanes` rows along the innermost dimension. */
static void count_units(fsm_plan *p, const dimension *lane) {
    p->groups = p->lanes > 1 ? (lane->size + p->lanes - 1) / p->lanes : 1;
    p->units = p->lanes > 1 ? p->rows / lane->size * p->groups : p->rows;
}

static void choose_way(fsm_plan *p, const fsm_problem *problem) {
    const dimension *axis = p->axis_ndim ? &p->axis[p->axis_ndim - 1] : NULL;
    const dimension *lane = p->row_ndim ? &p->row[p->row_ndim - 1] : NULL;
    const ptrdiff_t x_step = axis ? axis->stride[FSM_X] : itemsize(p->dtype[FSM_X]);
    const ptrdiff_t out_step = axis ? axis->stride[FSM_OUT] : itemsize(p->dtype[FSM_OUT]);
    const int plain = !p->data[FSM_BIAS] && !p->data[FSM_WHERE] && !p->data[FSM_SCALE];
    const int contiguous = p->axis_ndim <= 1 && x_step == itemsize(p->dtype[FSM_X]) &&
                           (!p->pass->map || out_step == itemsize(p->dtype[FSM_OUT]));
    p->labels = has_labels(p->op);
    const int whole = (p->op <= FSM_LOGSUMEXP || (p->labels && p->n > FSM_SHORT_ROW)) &&
                      contiguous && is_native(p, p->dtype[FSM_X]) &&
                      is_native(p, p->dtype[FSM_OUT]);
    p->direct = whole && plain;
    p->fused = whole && !plain && p->n <= FUSED_MOST;

    const ptrdiff_t fitting = SCRATCH_BYTES / p->real_size;
    p->lanes = 1;
    if (!p->direct && !p->fused && lane && lane->size > 1 && p->n < PTRDIFF_MAX / 4096 &&
        (lane->stride[FSM_X] < x_step || (p->n <= FSM_SHORT_ROW && lane->size >= 8))) {
        p->lanes = (int)least(FSM_LANES, up_to_multiple(lane->size, FSM_LANE_QUANTUM));
        const int few =
            p->rows / p->lanes < 2 * p->threads; /* narrower groups give every thread some */
        if (p->n * p->lanes > fitting || few) p->lanes = FSM_LANE_QUANTUM;
    }
    count_units(p, lane);
    const ptrdiff_t unit_elements = p->n * p->lanes;
    p->resident = unit_elements <= fitting;
    p->slice = SLICE / (p->compute == FSM_F64 ? 2 : 1) / (p->op == FSM_LOGSUMEXP_WEIGHTED ? 4 : 1) /
               (problem->isa == &fsm_isa_scalar ? 8 : 1);
    p->wide =
        unit_elements > DIRECT_MOST || (p->units < p->threads && unit_elements >= SERIAL_BELOW);
    if (p->wide) {
        p->resident = p->fused = 0;
        if (p->lanes > 1)
            p->lanes = (int)least(
                FSM_LANES,
                up_to_multiple(lane->size, FSM_LANE_QUANTUM)); /* threads share by chunks */
        count_units(p, lane);
    }
    p->chunk = p->resident ? p->n : least(p->n, CHUNK_BYTES / p->real_size / p->lanes);
    p->chunks = (p->n - 1) / p->chunk + 1; /* n may be PTRDIFF_MAX, of broadcast bytes */
    p->scratch_elements = up_to_multiple(p->chunk * p->lanes, FSM_LANE_QUANTUM);
    p->from_memory = bytes_of(p) >= CACHE_LEAST;
    p->nontemporal = (p->direct || p->fused) && !p->wide && !p->labels && fills_the_caches(p);
    if (p->direct && !p->wide && !p->labels) {
        p->scratch_elements = p->dtype[FSM_OUT] == p->compute && !p->nontemporal
                                  ? 0
                                  : exps_kept(p->n, p->nontemporal) * p->n;
    }
    p->columns = plain && p->op <= FSM_LOGSUMEXP && p->lanes > 1 && p->resident &&
                 p->axis_ndim <= 1 && is_native(p, p->dtype[FSM_X]) &&
                 is_native(p, p->dtype[FSM_OUT]) &&
                 lane->stride[FSM_X] == itemsize(p->dtype[FSM_X]) &&
                 lane->stride[FSM_OUT] == itemsize(p->dtype[FSM_OUT]);
    if (p->fused) {
        p->block = lane && (lane->stride[FSM_BIAS] || lane->stride[FSM_WHERE])
                       ? FUSED_BYTES / p->real_size / p->n + 1
                       : 1;
        p->exps = up_to_multiple(fused_kept(p->n), FSM_LANE_QUANTUM);
        p->additive =
            p->exps + up_to_multiple(exps_kept(p->n, p->nontemporal) * p->n, FSM_LANE_QUANTUM);
        p->scratch_elements = p->additive + p->block * p->n;
    }
}

fsm_status fsm_plan_new(fsm_plan **result, const fsm_problem *problem) {
    *result = NULL;
    ptrdiff_t rows = 1, n = 1;
    for (int d = 0; d < problem->ndim; d++)
        *(problem->reduced[d] ? &n : &rows) *= problem->shape[d];
    if (rows == 0 || n == 0) return FSM_DONE;

    fsm_plan draft, *p = &draft;
    p->op = problem->op;
    p->compute = problem->compute;
    p->real_size = p->compute == FSM_F64 ? 8 : 4;
    p->kernels = p->compute == FSM_F64 ? problem->isa->f64 : problem->isa->f32;
    p->pass = &p->kernels->passes[p->op];
    p->rows = rows;
    p->n = n;
    p->row_ndim = p->axis_ndim = 0;
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) {
        p->data[o] = problem->operand[o].data;
        p->dtype[o] = problem->operand[o].dtype;
    }
    for (int i = 0; i < problem->ndim; i++) {
        dimension *d = problem->reduced[i] ? &p->axis[p->axis_ndim++] : &p->row[p->row_ndim++];
        d->size = problem->shape[i];
        for (int o = 0; o < FSM_OPERAND_COUNT; o++)
            d->stride[o] = p->data[o] ? problem->operand[o].strides[i] : 0;
    }
    p->row_ndim = simplify(p, p->row, p->row_ndim);
    p->axis_ndim = simplify(p, p->axis, p->axis_ndim);
    const ptrdiff_t elements = rows > PTRDIFF_MAX / n
                                   ? PTRDIFF_MAX
                                   : rows * n; /* broadcast views can have more than memory holds */
    p->threads = elements < SERIAL_BELOW ? 1 : (int)least(problem->threads, elements / PER_THREAD);
    choose_way(p, problem);
    p->unit = p->next_chunk = 0;
    p->pass_at = PASS_MAX;

    /* One block: the plan, the scratch of each thread (two arrays if there is a second input), the
     * states. */
    const int buffers = p->data[FSM_Y] ? 2 : 1;
    p->scratch_size =
        up_to_multiple(p->scratch_elements * p->real_size * buffers + FSM_ALIGN, FSM_ALIGN);
    const size_t head = (size_t)up_to_multiple(sizeof *p, FSM_ALIGN),
                 scratch = (size_t)p->scratch_size * (size_t)p->threads;
    const size_t states = p->wide ? ((size_t)p->threads + 1) * sizeof(fsm_state) : 0;
    char *block = malloc(head + scratch + states + FSM_ALIGN);
    if (!block) return FSM_NOMEM;
    *result = (fsm_plan *)block;
    **result = draft;
    (*result)->scratch = block + head;
    (*result)->states = (fsm_state *)(block + head + scratch);
    return FSM_AGAIN;
}

void fsm_plan_free(fsm_plan *p) { free(p); }

/* ---- places ---- */

static char *aligned(char *p) { return p + (-(uintptr_t)p & (FSM_ALIGN - 1)); }
static char *scratch_of(const fsm_plan *p, int thread) {
    return aligned(p->scratch + p->scratch_size * thread);
}
static char *second_of(const fsm_plan *p, char *scratch) {
    return scratch + p->scratch_elements * p->real_size;
}

static unit_place place_of(const fsm_plan *p, ptrdiff_t unit) {
    unit_place at;
    memcpy(at.at, p->data, sizeof at.at);
    at.rows = 1;
    int d = p->row_ndim - 1;
    if (p->lanes > 1) {
        const ptrdiff_t first = unit % p->groups * p->lanes;
        at.rows = (int)least(p->lanes, p->row[d].size - first);
        for (int o = 0; o < FSM_OPERAND_COUNT; o++)
            at.at[o] += at.at[o] ? first * p->row[d].stride[o] : 0;
        unit /= p->groups;
        d--;
    }
    for (; d >= 0; unit /= p->row[d].size, d--)
        for (int o = 0; o < FSM_OPERAND_COUNT; o++)
            at.at[o] += at.at[o] ? unit % p->row[d].size * p->row[d].stride[o] : 0;
    return at;
}

/* What operand o adds to its address at element i of the axis, and how many elements follow at an
 * even step. */
static ptrdiff_t axis_offset(const fsm_plan *p, fsm_operand o, ptrdiff_t i) {
    ptrdiff_t offset = 0;
    for (int d = p->axis_ndim - 1; i > 0; i /= p->axis[d].size, d--)
        offset += i % p->axis[d].size * p->axis[d].stride[o];
    return offset;
}
static ptrdiff_t even_run(const fsm_plan *p, ptrdiff_t i) {
    if (p->axis_ndim == 0) return 1;
    const ptrdiff_t size = p->axis[p->axis_ndim - 1].size;
    return i == 0 ? size : size - i % size; /* a division is worth avoiding: rows may be short */
}
static ptrdiff_t axis_step(const fsm_plan *p, fsm_operand o) {
    return p->axis_ndim ? p->axis[p->axis_ndim - 1].stride[o] : 0;
}
static ptrdiff_t lane_step(const fsm_plan *p, fsm_operand o) {
    return p->row_ndim ? p->row[p->row_ndim - 1].stride[o] : 0;
}

static void advance(const fsm_plan *p, unit_place *at, ptrdiff_t rows) {
    for (int o = 0; o < FSM_OPERAND_COUNT; o++)
        if (at->at[o]) at->at[o] += rows * lane_step(p, o);
}

/* The run of operand x at element i of the axis; `step` is the one along the run. What is fused
 * goes with it if `fused`. */
static fsm_run run_at(const fsm_plan *p, const unit_place *at, fsm_operand x, ptrdiff_t i,
                      ptrdiff_t (*step)(const fsm_plan *, fsm_operand), int fused) {
    fsm_run run = {
        .x = at->at[x] + axis_offset(p, x, i), .x_stride = step(p, x), .x_dtype = p->dtype[x]};
    run.excluded = x == FSM_Y ? 0 : -INFINITY;
    if (at->at[FSM_WHERE] && (fused || x == FSM_Y)) {
        run.where = at->at[FSM_WHERE] + axis_offset(p, FSM_WHERE, i);
        run.where_stride = step(p, FSM_WHERE);
    }
    if (fused && at->at[FSM_BIAS]) {
        run.bias = at->at[FSM_BIAS] + axis_offset(p, FSM_BIAS, i);
        run.bias_stride = step(p, FSM_BIAS);
        run.bias_dtype = p->dtype[FSM_BIAS];
    }
    if (fused && at->at[FSM_SCALE]) {
        run.scale = at->at[FSM_SCALE]; /* one value a row */
        run.scale_stride = step == lane_step ? step(p, FSM_SCALE) : 0;
    }
    return run;
}

/* ---- pieces of a unit: elements [begin, end) of its rows ---- */

/* Reads operand x into `to`, in the shape of a tile; the lanes that are no rows become 0. */
static void load_piece(const fsm_plan *p, const unit_place *at, fsm_operand x, ptrdiff_t begin,
                       ptrdiff_t end, char *to) {
    const int fused = x == FSM_X && !is_backward(p->op);
    if (p->lanes == 1)
        for (ptrdiff_t i = begin, k; i < end; i += k) {
            const fsm_run run = run_at(p, at, x, i, axis_step, fused);
            k = least(even_run(p, i), end - i);
            p->kernels->load(to + (i - begin) * p->real_size, &run, k);
        }
    else
        for (ptrdiff_t i = begin; i < end; i++, to += p->lanes * p->real_size) {
            const fsm_run run = run_at(p, at, x, i, lane_step, fused);
            p->kernels->load(to, &run, at->rows);
            memset(to + at->rows * p->real_size, 0, (size_t)((p->lanes - at->rows) * p->real_size));
        }
}

static void store_piece(const fsm_plan *p, const unit_place *at, ptrdiff_t begin, ptrdiff_t end,
                        const char *from) {
    if (p->lanes == 1)
        for (ptrdiff_t i = begin, k; i < end; i += k) {
            k = least(even_run(p, i), end - i);
            p->kernels->store(at->at[FSM_OUT] + axis_offset(p, FSM_OUT, i), axis_step(p, FSM_OUT),
                              p->dtype[FSM_OUT], from + (i - begin) * p->real_size, k);
        }
    else
        for (ptrdiff_t i = begin; i < end; i++, from += p->lanes * p->real_size)
            p->kernels->store(at->at[FSM_OUT] + axis_offset(p, FSM_OUT, i), lane_step(p, FSM_OUT),
                              p->dtype[FSM_OUT], from, at->rows);
}

static int stores_exp(const fsm_plan *p) {
    return p->op == FSM_SOFTMAX || p->op == FSM_CROSS_ENTROPY_BACKWARD;
}

/* The tile of a piece: in place if direct, else in scratch, read there by this call unless it is
 * there already (`loaded`). */
static fsm_tile tile_of(const fsm_plan *p, const unit_place *at, ptrdiff_t begin, ptrdiff_t end,
                        char *scratch, int loaded) {
    fsm_tile t = {.n = end - begin,
                  .x = scratch,
                  .x_dtype = p->compute,
                  .out = scratch,
                  .out_dtype = p->compute};
    if (p->direct) {
        t.x = at->at[FSM_X] + begin * itemsize(p->dtype[FSM_X]);
        t.x_dtype = p->dtype[FSM_X];
        t.out_dtype = p->dtype[FSM_OUT];
        if (p->pass->map) t.out = at->at[FSM_OUT] + begin * itemsize(t.out_dtype);
        if (stores_exp(p) && t.out_dtype == p->compute) t.e = t.out;
        return t;
    }
    if (!loaded) load_piece(p, at, FSM_X, begin, end, scratch);
    if (p->data[FSM_Y]) {
        t.y = second_of(p, scratch);
        if (!loaded) load_piece(p, at, FSM_Y, begin, end, second_of(p, scratch));
    }
    if (stores_exp(p) && p->resident) t.e = scratch;
    return t;
}

static double max_of(const fsm_plan *p, const fsm_state *st, int lane) {
    return p->compute == FSM_F64 ? st->max.f64[lane] : (double)st->max.f32[lane];
}
static int is_special(const fsm_plan *p, const fsm_state *st, int lane) {
    return max_of(p, st, lane) - max_of(p, st, lane) != 0;
}

/* The label of a row of a unit; below 0: the row is ignored. */
static ptrdiff_t label_of(const fsm_plan *p, const unit_place *at, int lane) {
    int64_t label;
    memcpy(&label, at->at[FSM_LABEL] + lane * lane_step(p, FSM_LABEL), sizeof label);
    return (ptrdiff_t)label;
}

/* Rows without a finite maximum: NaN where they take part, elsewhere 0 (log_softmax: -inf). Rows that are
 * ignored: 0. */
static void fill_piece(const fsm_plan *p, unit_place at, const fsm_state *st, ptrdiff_t begin,
                       ptrdiff_t end, char *scratch) {
    const double excluded = p->op == FSM_LOG_SOFTMAX ? -INFINITY : 0;
    for (int l = 0; l < at.rows; l++) {
        const int ignored = p->labels && label_of(p, &at, 0) < 0;
        if (ignored || is_special(p, st, l))
            for (ptrdiff_t i = begin, k; i < end; i += k) {
                const fsm_run run = run_at(p, &at, FSM_X, i, axis_step, 1);
                k = least(even_run(p, i), least(end - i, p->scratch_elements));
                if (ignored) memset(scratch, 0, (size_t)(k * p->real_size));
                else p->kernels->load_special(scratch, &run, k, excluded);
                p->kernels->store(at.at[FSM_OUT] + axis_offset(p, FSM_OUT, i),
                                  axis_step(p, FSM_OUT), p->dtype[FSM_OUT], scratch, k);
            }
        if (l + 1 < at.rows) advance(p, &at, 1);
    }
}

static void do_pass(const fsm_plan *p, const unit_place *at, pass_id pass, fsm_state *st,
                    ptrdiff_t begin, ptrdiff_t end, char *scratch, int loaded) {
    if (pass == PASS_FILL) {
        fill_piece(p, *at, st, begin, end, scratch);
        return;
    }
    fsm_tile t = tile_of(p, at, begin, end, scratch, loaded);
    if (pass == PASS_MAX) p->pass->max(st, &t);
    else if (pass == PASS_MAX2) p->pass->max2(st, &t);
    else if (pass == PASS_SUM) p->pass->sum(st, &t);
    else {
        double scale[FSM_LANES]; /* room for either type */
        if (is_backward(p->op) && at->at[FSM_SCALE]) {
            memset(scale, 0, sizeof scale);
            const fsm_run run = {.x = at->at[FSM_SCALE],
                                 .x_stride = p->lanes > 1 ? lane_step(p, FSM_SCALE) : 0,
                                 .x_dtype = p->compute};
            p->kernels->load(scale, &run, at->rows);
            t.scale = scale;
        }
        p->pass->map(st, &t);
        if (!p->direct) store_piece(p, at, begin, end, scratch);
    }
}

/* What happens between the passes. Returns the next one that the operation has. */
static pass_id after_pass(const fsm_plan *p, pass_id pass, fsm_state *st) {
    if (pass == PASS_MAX) {
        p->pass->reference(st);
        return p->pass->max2 ? PASS_MAX2 : PASS_SUM;
    }
    if (pass == PASS_MAX2) return PASS_SUM;
    if (pass == PASS_SUM) {
        p->pass->finish(st);
        return p->pass->map ? PASS_MAP : PASS_END;
    }
    const int fills = p->labels || (!is_backward(p->op) && st->special);
    return pass == PASS_MAP && fills ? PASS_FILL : PASS_END;
}

/* What a state of cross entropy begins with; before anything is written, for that may be over x. */
static void begin_labels(const fsm_plan *p, const unit_place *at, fsm_state *st) {
    memset(&st->label, 0, sizeof st->label);
    memset(&st->grad, 0, sizeof st->grad);
    for (int l = 0; l < at->rows; l++) {
        const ptrdiff_t label = label_of(p, at, l);
        if (label < 0) continue;
        const fsm_run x = {.x = at->at[FSM_X] + l * lane_step(p, FSM_X) +
                                axis_offset(p, FSM_X, label),
                           .x_dtype = p->dtype[FSM_X]};
        p->kernels->load((char *)&st->label + l * p->real_size, &x, 1);
    }
    const fsm_run grad = {
        .x = at->at[FSM_GRAD], .x_stride = lane_step(p, FSM_GRAD), .x_dtype = p->compute};
    if (grad.x) p->kernels->load(&st->grad, &grad, at->rows);
}

/* The gradients at the labels, or the losses of the rows that are ignored. */
static void end_labels(const fsm_plan *p, unit_place at, const fsm_state *st) {
    static const double zero = 0;
    for (int l = 0; l < at.rows; l++) {
        const ptrdiff_t label = label_of(p, &at, 0);
        if (p->pass->map && label >= 0 && !is_special(p, st, l))
            p->kernels->store(at.at[FSM_OUT] + axis_offset(p, FSM_OUT, label), 0, p->dtype[FSM_OUT],
                              (const char *)&st->label + l * p->real_size, 1);
        else if (!p->pass->map && label < 0)
            p->kernels->store(at.at[FSM_OUT], 0, p->dtype[FSM_OUT], &zero, 1);
        if (l + 1 < at.rows) advance(p, &at, 1);
    }
}

static void end_unit(const fsm_plan *p, const unit_place *at, const fsm_state *st) {
    if (!p->pass->map) {
        const fsm_dtype dtype = p->dtype[FSM_OUT];
        p->kernels->store(at->at[FSM_OUT], p->lanes > 1 ? lane_step(p, FSM_OUT) : 0, dtype,
                          &st->value[0], at->rows);
        if (at->at[FSM_SIGN])
            p->kernels->store(at->at[FSM_SIGN], p->lanes > 1 ? lane_step(p, FSM_SIGN) : 0, dtype,
                              &st->value[1], at->rows);
    }
    if (p->labels) end_labels(p, *at, st);
}

/* ---- the four ways ---- */

static void direct_rows(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_plan *p = context;
    const ptrdiff_t inner = p->row_ndim ? p->row[p->row_ndim - 1].size : 1;
    begin += p->unit;
    end += p->unit;
    for (ptrdiff_t r = begin, k; r < end; r += k) {
        k = least(inner - r % inner, end - r);
        const unit_place at = place_of(p, r);
        const fsm_rows rows = {.x = at.at[FSM_X],
                               .out = at.at[FSM_OUT],
                               .x_stride = lane_step(p, FSM_X),
                               .out_stride = lane_step(p, FSM_OUT),
                               .rows = k,
                               .n = p->n,
                               .x_dtype = p->dtype[FSM_X],
                               .out_dtype = p->dtype[FSM_OUT],
                               .scratch = scratch_of(p, thread),
                               .from_memory = p->from_memory,
                               .nontemporal = p->nontemporal};
        p->kernels->rows(p->op, &rows);
    }
}

/* What is added to `rows` rows, -inf where an entry takes no part, into `to`. */
static void load_additive(const fsm_plan *p, unit_place at, ptrdiff_t rows, char *to) {
    static const double nothing = -0.0;
    const ptrdiff_t row = p->n * p->real_size;
    const int one_run = lane_step(p, FSM_BIAS) == p->n * axis_step(p, FSM_BIAS) &&
                        lane_step(p, FSM_WHERE) == p->n * axis_step(p, FSM_WHERE);
    const ptrdiff_t step = one_run ? rows : 1; /* of a few elements a call takes longer than they */
    for (ptrdiff_t r = 0; r < rows; r += step, advance(p, &at, step)) {
        const int biased = p->data[FSM_BIAS] != NULL;
        fsm_run run = run_at(p, &at, biased ? FSM_BIAS : FSM_X, 0, axis_step, 1);
        run.scale = run.bias = NULL;
        if (!biased) {
            run.x = (const char *)&nothing;
            run.x_stride = 0;
            run.x_dtype = FSM_F64;
        }
        p->kernels->load(to + r * row, &run, step * p->n);
    }
}

/* Rows whose maximum is not finite are NaN by now, every element of them: their entries that take
 * no part are made so. */
static void mend_special(const fsm_plan *p, unit_place at, ptrdiff_t rows, char *scratch) {
    fsm_state st = {.lanes = 1};
    for (ptrdiff_t r = 0; r < rows; r++, advance(p, &at, 1)) {
        const fsm_run first = {.x = at.at[FSM_OUT], .x_dtype = p->dtype[FSM_OUT]};
        p->kernels->load(&st.max, &first, 1); /* not a maximum, but NaN if that is special */
        if (max_of(p, &st, 0) != max_of(p, &st, 0)) fill_piece(p, at, &st, 0, p->n, scratch);
    }
}

static void fused_rows(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_plan *p = context;
    const ptrdiff_t inner = p->row_ndim ? p->row[p->row_ndim - 1].size : 1;
    char *z = scratch_of(p, thread), *e = z + p->exps * p->real_size,
         *additive = z + p->additive * p->real_size;
    /* What is added is the same for all rows; it is a bias that the kernels can read where it lies. */
    const int shared = lane_step(p, FSM_BIAS) == 0 && lane_step(p, FSM_WHERE) == 0;
    const int there = p->data[FSM_BIAS] && !p->data[FSM_WHERE] &&
                      p->dtype[FSM_BIAS] == p->compute && axis_step(p, FSM_BIAS) == p->real_size;
    for (ptrdiff_t r = begin + p->unit, k; r < end + p->unit; r += k) {
        k = least(inner - r % inner, end + p->unit - r);
        unit_place at = place_of(p, r);
        if (shared && !there) load_additive(p, at, 1, additive);
        for (ptrdiff_t i = 0, rows; i < k; i += rows) {
            rows = shared || there ? k : least(k - i, p->block);
            if (!shared && !there) load_additive(p, at, rows, additive);
            const fsm_fuse fuse = {.scale = at.at[FSM_SCALE],
                                   .scale_stride = lane_step(p, FSM_SCALE),
                                   .additive = there ? at.at[FSM_BIAS] : additive,
                                   .additive_stride = there    ? lane_step(p, FSM_BIAS)
                                                      : shared ? 0
                                                               : p->n * p->real_size,
                                   .z = z};
            const fsm_rows of = {.x = at.at[FSM_X],
                                 .out = at.at[FSM_OUT],
                                 .x_stride = lane_step(p, FSM_X),
                                 .out_stride = lane_step(p, FSM_OUT),
                                 .rows = rows,
                                 .n = p->n,
                                 .x_dtype = p->dtype[FSM_X],
                                 .out_dtype = p->dtype[FSM_OUT],
                                 .scratch = e,
                                 .from_memory = p->from_memory,
                                 .nontemporal = p->nontemporal,
                                 .fuse = &fuse};
            const int hiding = p->data[FSM_BIAS] || p->data[FSM_WHERE];
            if (p->kernels->rows(p->op, &of) && hiding && p->op != FSM_LOGSUMEXP)
                mend_special(p, at, rows, z);
            advance(p, &at, rows);
        }
    }
}

static void column_units(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_plan *p = context;
    for (ptrdiff_t u = begin + p->unit; u < end + p->unit; u++) {
        const unit_place at = place_of(p, u);
        const fsm_columns columns = {.x = at.at[FSM_X],
                                     .out = at.at[FSM_OUT],
                                     .x_step = axis_step(p, FSM_X),
                                     .out_step = axis_step(p, FSM_OUT),
                                     .n = p->n,
                                     .rows = at.rows,
                                     .x_dtype = p->dtype[FSM_X],
                                     .out_dtype = p->dtype[FSM_OUT],
                                     .tile = scratch_of(p, thread)};
        p->kernels->columns(p->op, &columns);
    }
}

static void whole_units(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_plan *p = context;
    char *scratch = scratch_of(p, thread);
    fsm_state st;
    for (ptrdiff_t u = begin + p->unit; u < end + p->unit; u++) {
        const unit_place at = place_of(p, u);
        p->kernels->begin(&st, p->lanes, p->n);
        st.want_sign = p->data[FSM_SIGN] != NULL;
        if (p->labels) begin_labels(p, &at, &st);
        for (pass_id pass = PASS_MAX; pass != PASS_END; pass = after_pass(p, pass, &st))
            for (ptrdiff_t c = 0; c < p->chunks; c++)
                do_pass(p, &at, pass, &st, c * p->chunk, least((c + 1) * p->chunk, p->n), scratch,
                        p->resident && pass != PASS_MAX);
        end_unit(p, &at, &st);
    }
}

static void wide_chunks(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_plan *p = context;
    for (ptrdiff_t c = begin + p->first_chunk; c < end + p->first_chunk; c++) {
        const ptrdiff_t first = c * p->chunk;
        do_pass(p, &p->place, p->pass_at, &p->states[1 + thread], first,
                first + least(p->chunk, p->n - first), scratch_of(p, thread), 0);
    }
}

/* A slice of one pass of one wide unit. */
static void run_wide(fsm_plan *p) {
    fsm_state *st = &p->states[0];
    const uint64_t before = fsm_fp_enter();
    if (p->pass_at == PASS_MAX && p->next_chunk == 0) {
        p->place = place_of(p, p->unit);
        p->kernels->begin(st, p->lanes, p->n);
        st->want_sign = p->data[FSM_SIGN] != NULL;
        if (p->labels) begin_labels(p, &p->place, st);
    }
    const ptrdiff_t per_slice = p->slice / (p->chunk * p->lanes) + 1,
                    count = least(per_slice, p->chunks - p->next_chunk);
    for (int t = 0; t < p->threads; t++) {
        fsm_state *own = &p->states[1 + t];
        *own = *st; /* its constants, but nothing of what is merged by adding */
        memset(&own->sum, 0, sizeof own->sum);
        memset(&own->nonfinite, 0, sizeof own->nonfinite);
    }
    /* every other pass goes back: it begins with what the caches still hold */
    const int back = p->pass_at == PASS_SUM;
    p->first_chunk = back ? p->chunks - p->next_chunk - count : p->next_chunk;
    fsm_parallel_shares(p->threads, count, 1, back, wide_chunks, p);
    for (int t = 0; t < p->threads && p->pass_at < PASS_MAP; t++)
        p->kernels->merge(st, &p->states[1 + t]);
    p->next_chunk += count;
    if (p->next_chunk == p->chunks) {
        p->next_chunk = 0;
        p->pass_at = after_pass(p, p->pass_at, st);
    }
    if (p->pass_at == PASS_END) {
        end_unit(p, &p->place, st);
        p->pass_at = PASS_MAX;
        p->unit++;
    }
    fsm_fp_leave(before);
}

fsm_status fsm_plan_run(fsm_plan *p) {
    if (p->wide) run_wide(p);
    else {
        const ptrdiff_t unit_elements = p->n * p->lanes,
                        count = least(p->slice / unit_elements + 1, p->units - p->unit);
        const ptrdiff_t grain =
            count / (p->threads * 8) + 1; /* several pieces a thread, so that they end together */
        fsm_parallel_shares(p->threads, count, grain, 0,
                            p->labels    ? whole_units
                            : p->direct  ? direct_rows
                            : p->fused   ? fused_rows
                            : p->columns ? column_units
                                         : whole_units,
                            p);
        p->unit += count;
    }
    return p->unit < p->units ? FSM_AGAIN : FSM_DONE;
}

void fsm_softmax_small(const fsm_isa *isa, fsm_dtype dtype, int log, const void *x, void *out,
                       ptrdiff_t rows, ptrdiff_t n) {
    const ptrdiff_t stride = n * itemsize(dtype);
    const fsm_rows w = {.x = x,
                        .out = out,
                        .x_stride = stride,
                        .out_stride = stride,
                        .rows = rows,
                        .n = n,
                        .x_dtype = dtype,
                        .out_dtype = dtype};
    const uint64_t before = fsm_fp_enter();
    (dtype == FSM_F64 ? isa->f64 : isa->f32)->rows(log ? FSM_LOG_SOFTMAX : FSM_SOFTMAX, &w);
    fsm_fp_leave(before);
}
