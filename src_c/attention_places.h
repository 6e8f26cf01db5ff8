/* Where the operands of attention lie at one place, a leading index and a KV head: what forward
 * (attention.c) and backward (attention_backward.c) share. */
#ifndef FSM_ATTENTION_PLACES_H
#define FSM_ATTENTION_PLACES_H

#include "kernels.h"
#include "parallel.h"

#include <string.h>

static inline ptrdiff_t places_of(const fsm_attention *a) {
    ptrdiff_t places = a->kv_heads;
    for (int d = 0; d < a->ndim; d++) places *= a->shape[d];
    return places;
}

/* Whether the scratch is beyond any memory; if not, no sum of its sizes overflows. A column takes less
 * than 4 KB of it in each thread, and of the parts of one query 16 heads * 8 bytes * 80 slots. */
static inline int too_wide(const fsm_attention *a) {
    return 0x1p14 * ((double)a->depth + (double)a->v_depth) * a->threads > (double)PTRDIFF_MAX;
}

/* Beyond any array: sums of the window and of positions do not overflow. */
static inline void limit_window(fsm_attention *a) {
    a->left = least(a->left, PTRDIFF_MAX / 2);
    a->right = least(a->right, PTRDIFF_MAX / 2);
}

/* Where element `i` lies in an array, counted in C order over the dimensions of shape. */
static inline ptrdiff_t offset_of(const fsm_array *array, const ptrdiff_t *shape, int ndim,
                                  ptrdiff_t i) {
    ptrdiff_t offset = 0;
    for (int d = ndim - 1; d >= 0; i /= shape[d], d--) offset += i % shape[d] * array->strides[d];
    return offset;
}

/* The operand at a leading index, `place` counting these in C order, and a head. */
static inline fsm_matrix matrix_at(const fsm_attention *a, fsm_attention_operand o, ptrdiff_t place,
                                   ptrdiff_t head) {
    const fsm_array *array = &a->operand[o];
    const ptrdiff_t *last = &array->strides[a->ndim];
    fsm_matrix m = {array->data, last[0], last[1], last[2]};
    if (!m.at) return (fsm_matrix){0};
    m.at += head * m.head + offset_of(array, a->shape, a->ndim, place);
    return m;
}

static inline ptrdiff_t number_at(const fsm_attention *a, fsm_attention_operand o, ptrdiff_t place,
                                  ptrdiff_t absent) {
    const char *at = matrix_at(a, o, place, 0).at;
    int64_t number = absent;
    if (at) memcpy(&number, at, sizeof number);
    return (ptrdiff_t)number;
}

/* Heads [head, head + heads) at a place, of those that share its KV head; all but rows, keys and
 * scratch. */
static inline fsm_attend attend_place(const fsm_attention *a, ptrdiff_t place, ptrdiff_t head,
                                      ptrdiff_t heads) {
    const ptrdiff_t lead = place / a->kv_heads, kv = place % a->kv_heads,
                    h = kv * (a->heads / a->kv_heads) + head;
    return (fsm_attend){
        .dtype = a->operand[FSM_ATTN_Q].dtype,
        .bias_dtype = a->operand[FSM_ATTN_BIAS].dtype,
        .q = matrix_at(a, FSM_ATTN_Q, lead, h),
        .k = matrix_at(a, FSM_ATTN_K, lead, kv),
        .v = matrix_at(a, FSM_ATTN_V, lead, kv),
        .mask = matrix_at(a, FSM_ATTN_MASK, lead, h),
        .bias = matrix_at(a, FSM_ATTN_BIAS, lead, h),
        .sinks = matrix_at(a, FSM_ATTN_SINKS, lead, h),
        .slopes = matrix_at(a, FSM_ATTN_SLOPES, lead, h),
        .out = matrix_at(a, FSM_ATTN_OUT, lead, h),
        .lse = matrix_at(a, FSM_ATTN_LSE, lead, h),
        .weights = matrix_at(a, FSM_ATTN_WEIGHTS, lead, h),
        .grad_out = matrix_at(a, FSM_ATTN_GRAD_OUT, lead, h),
        .dq = matrix_at(a, FSM_ATTN_DQ, lead, h),
        .dk = matrix_at(a, FSM_ATTN_DK, lead, kv),
        .dv = matrix_at(a, FSM_ATTN_DV, lead, kv),
        .dbias = matrix_at(a, FSM_ATTN_DBIAS, lead, h),
        .dsinks = matrix_at(a, FSM_ATTN_DSINKS, lead, h),
        .heads = heads,
        .queries = a->queries,
        .keys = a->keys,
        .depth = a->depth,
        .v_depth = a->v_depth,
        .scale = a->scale,
        .softcap = a->softcap,
        .causal = a->causal,
        .left = a->left,
        .right = a->right,
        .offset = number_at(a, FSM_ATTN_OFFSET, lead, 0),
        .length = most(0, least(number_at(a, FSM_ATTN_LENGTHS, lead, a->keys), a->keys)),
    };
}

#endif
