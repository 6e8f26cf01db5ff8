/* Whole problems in one call, for code that has pointers and numbers: the layer above plans.
 * fastsoftmax.h says what each function does. Here arguments are checked, since their callers are
 * other people's programs, where a wrong one must not become a wild pointer. */
#include "fastsoftmax.h"

#include <math.h>
#include <string.h>

/* The size of an element; 0 for a type that is no output. */
static ptrdiff_t float_size(fsm_dtype dtype) {
    switch (dtype) {
    case FSM_F16:
    case FSM_BF16: return 2;
    case FSM_F32: return 4;
    case FSM_F64: return 8;
    default: return 0;
    }
}

static fsm_dtype compute_type(fsm_dtype dtype) { return dtype == FSM_F64 ? FSM_F64 : FSM_F32; }

/* ---- softmax ---- */

void fsm_describe_rows(fsm_problem *p, fsm_op op, fsm_dtype dtype, const void *x, ptrdiff_t x_row,
                       ptrdiff_t x_step, void *out, ptrdiff_t out_row, ptrdiff_t out_step,
                       ptrdiff_t rows, ptrdiff_t n) {
    p->op = op;
    p->compute = compute_type(dtype);
    p->ndim = 2;
    p->shape[0] = rows;
    p->shape[1] = n;
    p->reduced[0] = 0;
    p->reduced[1] = 1;
    for (int o = 0; o < FSM_OPERAND_COUNT; o++) p->operand[o].data = NULL;
    fsm_array *from = &p->operand[FSM_X], *to = &p->operand[FSM_OUT];
    from->data = (char *)(uintptr_t)x;
    to->data = out;
    from->dtype = to->dtype = dtype;
    from->strides[0] = x_row;
    from->strides[1] = x_step;
    to->strides[0] = out_row;
    to->strides[1] = op == FSM_LOGSUMEXP ? 0 : out_step;
    if (op == FSM_LOGSUMEXP && n == 0) { /* a sum of nothing is that of one exp(-inf) */
        static const float nothing = -INFINITY;
        p->shape[1] = 1;
        from->data = (char *)(uintptr_t)&nothing;
        from->dtype = FSM_F32;
        from->strides[0] = from->strides[1] = 0;
    }
}

fsm_status fsm_compute_softmax(const fsm_problem *problem) {
    fsm_plan *plan;
    if (!problem->isa) {
        fsm_problem chosen = *problem;
        chosen.isa = fsm_isa_at(0);
        return fsm_compute_softmax(&chosen);
    }
    fsm_status status = fsm_plan_new(&plan, problem);
    while (status == FSM_AGAIN) status = fsm_plan_run(plan);
    fsm_plan_free(plan);
    return status;
}

fsm_status fsm_softmax_rows(const fsm_isa *isa, fsm_op op, fsm_dtype dtype, const void *x,
                            ptrdiff_t x_row, ptrdiff_t x_step, void *out, ptrdiff_t out_row,
                            ptrdiff_t out_step, ptrdiff_t rows, ptrdiff_t n, int threads) {
    const ptrdiff_t size = float_size(dtype);
    const int reduces = op == FSM_LOGSUMEXP;
    if (!size || (unsigned)op > FSM_LOGSUMEXP || rows < 0 || n < 0 || threads < 1)
        return FSM_INVALID;
    if (rows == 0 || (n == 0 && !reduces)) return FSM_DONE;
    if (!out || (!x && n)) return FSM_INVALID;
    if (!isa) isa = fsm_isa_at(0);
    if (!reduces && x_step == size && out_step == size &&
        (rows == 1 || (x_row == n * size && out_row == n * size)) && fsm_is_small(rows * n)) {
        fsm_softmax_small(isa, dtype, op == FSM_LOG_SOFTMAX, x, out, rows, n);
        return FSM_DONE;
    }
    fsm_problem problem;
    fsm_describe_rows(&problem, op, dtype, x, x_row, x_step, out, out_row, out_step, rows, n);
    problem.isa = isa;
    problem.threads = threads;
    return fsm_compute_softmax(&problem);
}

/* ---- attention ---- */

fsm_status fsm_compute_attention(const fsm_attention *problem) {
    fsm_attention_plan *plan;
    if (!problem->isa) {
        fsm_attention chosen = *problem;
        chosen.isa = fsm_isa_at(0);
        return fsm_compute_attention(&chosen);
    }
    fsm_status status = fsm_attention_new(&plan, problem);
    while (status == FSM_AGAIN) status = fsm_attention_run(plan);
    fsm_attention_free(plan);
    return status;
}

static fsm_array matrices(const void *data, fsm_dtype dtype, ptrdiff_t size, ptrdiff_t rows,
                          ptrdiff_t columns) {
    return (fsm_array){.data = (char *)(uintptr_t)data,
                       .dtype = dtype,
                       .strides = {rows * columns * size, columns * size, size}};
}

fsm_status fsm_attention_heads(const fsm_isa *isa, fsm_dtype dtype, const void *q, const void *k,
                               const void *v, void *out, void *lse, ptrdiff_t heads,
                               ptrdiff_t kv_heads, ptrdiff_t queries, ptrdiff_t keys,
                               ptrdiff_t depth, ptrdiff_t v_depth, double scale, int causal,
                               ptrdiff_t offset, int threads) {
    const ptrdiff_t size = float_size(dtype);
    if (!size || heads < 0 || kv_heads < 1 || heads % kv_heads || queries < 0 || keys < 0 ||
        depth < 1 || v_depth < 0 || threads < 1 || !isfinite(scale) ||
        (dtype != FSM_F64 && !isfinite((float)scale)))
        return FSM_INVALID;
    if (heads == 0 || queries == 0) return FSM_DONE;
    if (!q || (v_depth && !out) || (keys && (!k || (v_depth && !v)))) return FSM_INVALID;
    const fsm_dtype compute = compute_type(dtype);
    const ptrdiff_t real_size = float_size(compute);
    const ptrdiff_t far = (ptrdiff_t)1 << (sizeof far * 8 - 3); /* beyond it nothing changes */
    int64_t position = offset > far ? far : offset < -far ? -far : offset;
    fsm_attention problem = {.compute = compute,
                             .threads = threads,
                             .isa = isa,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .queries = queries,
                             .keys = keys,
                             .depth = depth,
                             .v_depth = v_depth,
                             .scale = scale,
                             .causal = causal,
                             .left = -1,
                             .right = -1};
    problem.operand[FSM_ATTN_Q] = matrices(q, dtype, size, queries, depth);
    problem.operand[FSM_ATTN_K] = matrices(k, dtype, size, keys, depth);
    problem.operand[FSM_ATTN_V] = matrices(v, dtype, size, keys, v_depth);
    problem.operand[FSM_ATTN_OUT] = matrices(out, dtype, size, queries, v_depth);
    problem.operand[FSM_ATTN_LSE] = matrices(lse, compute, real_size, queries, 1);
    problem.operand[FSM_ATTN_OFFSET].data = (char *)&position;
    return fsm_compute_attention(&problem);
}
