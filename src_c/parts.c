/* Parts of rows, for rows that lie in no one memory, such as the chunks of a distributed array. What is
 * known of the whole row is its length, its maximum and, in the end, the sums of the parts: integers
 * (exp.inc.h), which their owner adds. So the bits are those of the whole row in one call. */
#include "kernels.h"
#include "parallel.h"

#include <math.h>
#include <string.h>

static const fsm_kernels *kernels_of(const fsm_parts *p) {
    return p->compute == FSM_F64 ? p->isa->f64 : p->isa->f32;
}

static const char *row_of(const fsm_parts *p, ptrdiff_t r, ptrdiff_t i) {
    return (const char *)p->x + (r * p->n + i) * float_size(p->x_dtype);
}

/* The state of a whole row after its maximum is known; its minimum is not, which changes no bit. */
static void begin_row(const fsm_parts *p, fsm_state *st, ptrdiff_t r) {
    const fsm_kernels *kernels = kernels_of(p);
    kernels->begin(st, 1, p->whole);
    if (p->compute == FSM_F64) {
        const double m = ((const double *)p->max)[r];
        st->max.f64[0] = m == m ? m + 0 : NAN;
        st->min.f64[0] = -INFINITY;
    } else {
        const float m = ((const float *)p->max)[r];
        st->max.f32[0] = m == m ? m + 0 : NAN;
        st->min.f32[0] = -INFINITY;
    }
    kernels->passes[p->op].reference(st);
}

static void sum_rows(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_parts *p = context;
    fsm_state st;
    (void)thread;
    for (ptrdiff_t r = begin; r < end; r++) {
        begin_row(p, &st, r);
        const fsm_tile part = {.n = p->n, .x = row_of(p, r, 0), .x_dtype = p->x_dtype};
        if (!st.special) kernels_of(p)->passes[p->op].sum(&st, &part);
        for (int j = 0; j < FSM_PARTS; j++) p->sums[r * FSM_PARTS + j] = st.sum.parts[j][0];
    }
}

static void map_rows(void *context, int thread, ptrdiff_t begin, ptrdiff_t end) {
    const fsm_parts *p = context;
    const fsm_kernels *kernels = kernels_of(p);
    const fsm_passes *pass = &kernels->passes[p->op];
    const ptrdiff_t size = float_size(p->out_dtype);
    fsm_state st;
    (void)thread;
    for (ptrdiff_t r = begin; r < end; r++) {
        begin_row(p, &st, r);
        for (int j = 0; j < FSM_PARTS; j++) st.sum.parts[j][0] = p->sums[r * FSM_PARTS + j];
        pass->finish(&st);
        if (!pass->map) {
            kernels->store((char *)p->out + r * size, size, p->out_dtype, &st.value[0], 1);
            continue;
        }
        double block[FSM_BLOCK]; /* of either type */
        for (ptrdiff_t i = 0; i < p->n; i += FSM_BLOCK) {
            const fsm_tile part = {.n = p->n - i < FSM_BLOCK ? p->n - i : FSM_BLOCK,
                                   .x = row_of(p, r, i),
                                   .x_dtype = p->x_dtype,
                                   .out = block,
                                   .out_dtype = p->compute};
            const fsm_run row = {0};
            if (st.special) kernels->load_special(block, &row, part.n, 0); /* NaN */
            else pass->map(&st, &part);
            kernels->store((char *)p->out + (r * p->n + i) * size, size, p->out_dtype, block,
                           part.n);
        }
    }
}

static void each_row(const fsm_parts *p, fsm_body body) {
    const int threads = fsm_is_small(p->rows * p->n) ? 1 : p->threads;
    const ptrdiff_t grain = p->rows / (threads * 8) + 1;
    fsm_parallel_for(threads, p->rows, grain, body, (void *)(uintptr_t)p);
}

void fsm_parts_sum(const fsm_parts *p) { each_row(p, sum_rows); }
void fsm_parts_map(const fsm_parts *p) { each_row(p, map_rows); }
