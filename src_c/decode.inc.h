/* Attention of one query, the step of a decoder, for FSM_TYPE: bound by reading K and V, once, for
 * all heads that share them. Vectors run along the depth; the heads of a KV head share each load.
 *
 * Keys come in blocks of BLOCK: dot products (each a vector of partial sums, VL of which are then
 * transposed and added together), scores (score.inc.h), weights along the keys, and V times weights
 * in registers. The blocks of a part, a range of keys that depends on their number alone, form an
 * online softmax as in attention.inc.h, and decode_finish merges the parts in order: who computed them
 * does not matter. The error is that of attention.inc.h with BLOCK for KEYS. */

#define decode_state FSM_NAME(decode_state)
#define decode_layout FSM_NAME(decode_layout)
#define decode_bytes FSM_NAME(decode_bytes)
#define part_elements FSM_NAME(part_elements)
#define decode_begin FSM_NAME(decode_begin)
#define decode_run FSM_NAME(decode_run)
#define decode_finish FSM_NAME(decode_finish)
#define decode_weights FSM_NAME(decode_weights)
#define stream FSM_NAME(stream)
#define stream_of FSM_NAME(stream_of)
#define ask_for FSM_NAME(ask_for)
#define dots FSM_NAME(dots)
#define dots_of_heads FSM_NAME(dots_of_heads)
#define block_scores FSM_NAME(block_scores)
#define block_rule FSM_NAME(block_rule)
#define block_weights FSM_NAME(block_weights)
#define block_values FSM_NAME(block_values)
#define values_of_heads FSM_NAME(values_of_heads)
#define values FSM_NAME(values)
#define decode_poison FSM_NAME(decode_poison)
#define merge_one FSM_NAME(merge_one)
#define BLOCK FSM_DECODE_KEYS

/* The scratch of a thread. */
typedef struct {
    real *q, *s, *additive, *k, *v, *clean; /* q: [head][depth], s: [head][BLOCK] */
} decode_state;

static ptrdiff_t decode_layout(char *at, ptrdiff_t depth, ptrdiff_t v_depth, ptrdiff_t heads,
                               decode_state *u) {
    ptrdiff_t used = 0;
    u->q = FSM_TAKE(real, heads * depth);
    u->s = FSM_TAKE(real, heads * BLOCK);
    u->additive = FSM_TAKE(real, BLOCK);
    u->k = FSM_TAKE(real, BLOCK * depth);
    u->v = FSM_TAKE(real, BLOCK * v_depth);
    u->clean = FSM_TAKE(real, BLOCK * v_depth);
    return used;
}

static ptrdiff_t decode_bytes(ptrdiff_t depth, ptrdiff_t v_depth, ptrdiff_t heads) {
    decode_state u;
    return decode_layout(NULL, depth, v_depth, heads, &u);
}

/* The result of a part, for each head: maximum, sum, and v_depth sums of values. */
static ptrdiff_t part_elements(ptrdiff_t v_depth, ptrdiff_t heads) { return heads * (v_depth + 2); }

/* Rows that load_as can read, at any alignment. */
typedef struct {
    const char *at;
    ptrdiff_t row; /* in bytes */
    fsm_dtype dtype;
} stream;

static stream stream_of(const fsm_matrix *m, fsm_dtype dtype, ptrdiff_t row, ptrdiff_t rows,
                        ptrdiff_t columns, real *scratch) {
    const char *from = element(m, 0, row, 0);
    const ptrdiff_t size = float_size(dtype);
    if (m->column == size) return (stream){from, m->row, dtype};
    fetch_rows(scratch, from, m->row, m->column, dtype, rows, columns);
    return (stream){(const char *)scratch, columns * (ptrdiff_t)sizeof(real), REAL_DTYPE};
}

/* ---- dot products ---- */

/* VL of them: VL / heads keys, the last of `count` again where there are fewer, by `heads` heads. */
FSM_INLINE void dots(fsm_dtype dtype, int heads, real *s, const real *q, const char *k,
                     ptrdiff_t row, ptrdiff_t depth, ptrdiff_t count) {
    const int keys = VL / heads;
    const char *at[VL];
    vec acc[VL];
    for (int i = 0; i < keys; i++) at[i] = k + (i < count ? i : count - 1) * row;
    FSM_UNROLL(16)
    for (int i = 0; i < VL; i++) acc[i] = v_set1(0);
    for (ptrdiff_t d = 0; d < depth; d += VL) {
        vec query[4];
        if (d + VL <= depth) {
            FSM_UNROLL(4)
            for (int h = 0; h < heads; h++) query[h] = v_load(q + h * depth + d);
            FSM_UNROLL(16)
            for (int i = 0; i < keys; i++) {
                const vec x = load_as(dtype, at[i], d, VL, v_set1(0));
                FSM_UNROLL(4)
                for (int h = 0; h < heads; h++)
                    acc[h * keys + i] = v_fma(x, query[h], acc[h * keys + i]);
            }
        } else {
            const ptrdiff_t n = depth - d;
            for (int h = 0; h < heads; h++)
                query[h] = load_as(REAL_DTYPE, q + h * depth, d, n, v_set1(0));
            FSM_UNROLL(16)
            for (int i = 0; i < keys; i++) {
                const vec x = load_as(dtype, at[i], d, n, v_set1(0));
                FSM_UNROLL(4)
                for (int h = 0; h < heads; h++)
                    acc[h * keys + i] = v_fma(x, query[h], acc[h * keys + i]);
            }
        }
    }
    v_transpose(acc);
    FSM_UNROLL(4)
    for (int step = VL / 2; step > 0; step /= 2) FSM_UNROLL(8)
    for (int i = 0; i < step; i++) acc[i] = v_add(acc[i], acc[i + step]);
    real sum[VL];
    v_store(sum, acc[0]);
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < keys && i < count; i++) s[h * BLOCK + i] = sum[h * keys + i];
}

/* Asks for rows [row, row + rows) of m, as far as there are `limit`: the hardware follows one
 * stream, but hardly the two that K and V are. K is asked for FSM_DECODE_AHEAD keys before its turn, V while the
 * same keys of K are read. From memory, one thread: 3.2 ms without, 1.7 with (33 MB). */
FSM_INLINE void ask_for(const fsm_matrix *m, ptrdiff_t bytes, ptrdiff_t row, ptrdiff_t rows,
                        ptrdiff_t limit) {
    for (ptrdiff_t i = row; i < row + rows && i < limit; i++)
        for (ptrdiff_t b = 0; b < bytes; b += 64) FSM_PREFETCH(m->at + i * m->row + b);
}

FSM_INLINE void dots_of_heads(int heads, real *s, const real *q, const stream *k, ptrdiff_t depth,
                              ptrdiff_t n, const fsm_attend *ask, ptrdiff_t first) {
    const ptrdiff_t size = float_size(k->dtype);
    for (ptrdiff_t j = 0; j < n; j += VL / heads) {
        const char *at = k->at + j * k->row;
        if (ask) {
            ask_for(&ask->k, ask->depth * size, first + j + FSM_DECODE_AHEAD, VL / heads,
                    ask->length);
            ask_for(&ask->v, ask->v_depth * size, first + j, VL / heads, ask->length);
        }
#define CALL(DTYPE) dots(DTYPE, heads, s + j, q, at, k->row, depth, n - j)
        SWITCH_DTYPE(k->dtype, CALL);
#undef CALL
    }
}

/* s[h][j], the lanes past n being -inf. */
static void block_scores(const fsm_attend *a, ptrdiff_t first, ptrdiff_t n, const decode_state *u) {
    const stream k = stream_of(&a->k, a->dtype, first, n, a->depth, u->k);
    ptrdiff_t h = 0;
    for (; VL >= 4 && h + 4 <= a->heads; h += 4)
        dots_of_heads(VL >= 4 ? 4 : 1, u->s + h * BLOCK, u->q + h * a->depth, &k, a->depth, n,
                      h ? NULL : a, first);
    for (; VL >= 2 && h + 2 <= a->heads; h += 2)
        dots_of_heads(VL >= 2 ? 2 : 1, u->s + h * BLOCK, u->q + h * a->depth, &k, a->depth, n,
                      h ? NULL : a, first);
    for (; h < a->heads; h++)
        dots_of_heads(1, u->s + h * BLOCK, u->q + h * a->depth, &k, a->depth, n, h ? NULL : a,
                      first);
    for (h = 0; h < a->heads; h++)
        for (ptrdiff_t j = n; j % VL; j++) u->s[h * BLOCK + j] = -INFINITY;
}

/* ---- scores and weights of one head ---- */

/* In place; returns the largest. *hides: a key is not seen. */
static real block_rule(const fsm_attend *a, const score_rule *rule, ptrdiff_t head, ptrdiff_t first,
                       ptrdiff_t n, const decode_state *u, int *hides) {
    const row_view view = view_of(a, head);
    const int has = view.mask || view.bias;
    real iota[VL], slope = 0;
    for (int l = 0; l < VL; l++) iota[l] = (real)l;
    if (has) load_additive(a, &view, first, n, u->additive);
    if (a->slopes.at) memcpy(&slope, element(&a->slopes, head, 0, 0), sizeof slope);
    vec top = v_set1(-INFINITY), hidden = v_set1(0);
    for (ptrdiff_t j = 0; j < n; j += VL) {
        const ptrdiff_t k = n - j < VL ? n - j : VL;
        real *at = u->s + head * BLOCK + j;
        vec x = v_load(at), add = v_set1(0);
        if (has) add = load_as(REAL_DTYPE, u->additive, j, k, v_set1(0));
        if (rule->natural) {
            const vec key = v_add(v_set1((real)j), v_load(iota));
            const vec distance = v_abs(v_sub(v_set1((real)(view.position - first)), key));
            x = rule_score(rule, x, view.bias ? add : v_set1(0), v_set1(slope), distance);
            if (k < VL) x = v_if_less(key, v_set1((real)n), x, v_set1(-INFINITY));
        }
        if (has) {
            x = v_if_less(add, v_set1(LEAST), v_set1(-INFINITY), x);
            hidden = v_max(hidden, v_if_less(add, v_set1(LEAST), v_set1(1), v_set1(0)));
        }
        v_store(at, x);
        top = v_max(x, top);
    }
    *hides += has && v_hmax(hidden) > 0;
    return v_hmax(top);
}

/* In place; the state of the head, (max, sum), takes them in. Returns the factor for what it had. */
static real block_weights(const score_rule *rule, real *state, ptrdiff_t n, real *s, real top) {
    const real max = top > state[0] ? top : state[0], ref = max == -INFINITY ? 0 : max;
    const vec c = v_set1(rule->c);
    vec sum = v_set1(0);
    for (ptrdiff_t j = 0; j < n; j += VL) {
        const vec p = pow2(v_mul(v_sub(v_load(s + j), v_set1(ref)), c));
        v_store(s + j, p);
        sum = v_add(sum, p);
    }
    real alpha[VL];
    v_store(alpha, pow2(v_mul(v_set1(state[0] - ref), c)));
    state[0] = max;
    state[1] = real_fma(state[1], alpha[0], v_hsum(sum));
    return alpha[0];
}

/* ---- weights times values ---- */

/* o[h] = o[h] alpha[h] + sum over keys of p[h] v, for columns [d, d + vectors * VL), or the first n
 * of VL. */
FSM_INLINE void values(fsm_dtype dtype, int heads, int vectors, real *o, ptrdiff_t o_head,
                       const real *alpha, const real *p, const stream *v, ptrdiff_t keys,
                       ptrdiff_t d, ptrdiff_t n) {
    vec acc[4][4];
    FSM_UNROLL(4)
    for (int h = 0; h < heads; h++) FSM_UNROLL(4)
    for (int x = 0; x < vectors; x++) acc[h][x] = v_set1(0);
    for (ptrdiff_t j = 0; j < keys; j++) {
        vec value[4];
        FSM_UNROLL(4)
        for (int x = 0; x < vectors; x++)
            value[x] = load_as(dtype, v->at + j * v->row, d + x * VL, n, v_set1(0));
        FSM_UNROLL(4)
        for (int h = 0; h < heads; h++) {
            const vec weight = v_set1(p[h * BLOCK + j]);
            FSM_UNROLL(4)
            for (int x = 0; x < vectors; x++) acc[h][x] = v_fma(value[x], weight, acc[h][x]);
        }
    }
    for (int h = 0; h < heads; h++)
        for (int x = 0; x < vectors; x++) {
            real *at = o + h * o_head + d + x * VL;
            const vec before = load_as(REAL_DTYPE, at, 0, n, v_set1(0));
            store_as(REAL_DTYPE, at, 0, n, v_fma(before, v_set1(alpha[h]), acc[h][x]));
        }
}

/* 4 vectors of columns at a time while there are so many, of 4 heads as many as the registers hold. */
FSM_INLINE void values_of_heads(int heads, real *o, ptrdiff_t o_head, const real *alpha,
                                const real *p, const stream *v, ptrdiff_t keys, ptrdiff_t columns) {
    ptrdiff_t d = 0;
#define WIDE(DTYPE) values(DTYPE, heads, wide, o, o_head, alpha, p, v, keys, d, VL)
#define ONE(DTYPE) values(DTYPE, heads, 1, o, o_head, alpha, p, v, keys, d, VL)
#define PART(DTYPE) values(DTYPE, heads, 1, o, o_head, alpha, p, v, keys, d, columns - d)
    const int wide = heads == 4 ? ACC_ROWS / 2 : 4;
    for (; d + wide * VL <= columns; d += wide * VL) SWITCH_DTYPE(v->dtype, WIDE);
    for (; d + VL <= columns; d += VL) SWITCH_DTYPE(v->dtype, ONE);
    if (d < columns) SWITCH_DTYPE(v->dtype, PART);
#undef WIDE
#undef ONE
#undef PART
}

static void block_values(const fsm_attend *a, real *part, const real *alpha, const stream *v,
                         ptrdiff_t n, const decode_state *u) {
    const ptrdiff_t size = a->v_depth + 2;
    ptrdiff_t h = 0;
    for (; h + 4 <= a->heads; h += 4)
        values_of_heads(4, part + h * size + 2, size, alpha + h, u->s + h * BLOCK, v, n,
                        a->v_depth);
    for (; h + 2 <= a->heads; h += 2)
        values_of_heads(2, part + h * size + 2, size, alpha + h, u->s + h * BLOCK, v, n,
                        a->v_depth);
    for (; h < a->heads; h++)
        values_of_heads(1, part + h * size + 2, size, alpha + h, u->s + h * BLOCK, v, n,
                        a->v_depth);
}

/* ---- a part, and the end ---- */

static decode_state decode_begin(const fsm_attend *a, const score_rule *rule) {
    decode_state u;
    decode_layout(a->scratch, a->depth, a->v_depth, a->heads, &u);
    fetch_rows(u.q, a->q.at, a->q.head, a->q.column, a->dtype, a->heads, a->depth);
    for (ptrdiff_t i = 0; rule->negate && i < a->heads * a->depth; i++) u.q[i] = -u.q[i];
    return u;
}

static void decode_poison(const fsm_attend *a, const rows_of *v, ptrdiff_t first, ptrdiff_t n,
                          real *part, const decode_state *u) {
    for (ptrdiff_t h = 0; h < a->heads; h++, part += a->v_depth + 2) {
        const row_view view = view_of(a, h);
        for (ptrdiff_t j = 0; j < n; j++)
            for (ptrdiff_t d = 0; d < a->v_depth; d++) {
                const real value = v->at[j * v->stride + d];
                if (value - value != 0 && sees(a, &view, first + j))
                    part[2 + d] += u->s[h * BLOCK + j] * value;
            }
    }
}

static void decode_run(const fsm_attend *a, ptrdiff_t first, ptrdiff_t last, void *into) {
    const score_rule rule = make_rule(a);
    const decode_state u = decode_begin(a, &rule);
    const row_view view = view_of(a, 0); /* lo and hi are those of all heads */
    const ptrdiff_t size = a->v_depth + 2;
    real *part = into;
    memset(part, 0, (size_t)part_elements(a->v_depth, a->heads) * sizeof(real));
    for (ptrdiff_t h = 0; h < a->heads; h++) part[h * size] = -INFINITY;
    for (ptrdiff_t block = first; block < last; block += BLOCK) {
        const ptrdiff_t from = view.lo > block ? view.lo : block;
        ptrdiff_t to = view.hi + 1 < block + BLOCK ? view.hi + 1 : block + BLOCK;
        if (to > last) to = last;
        const ptrdiff_t n = to - from;
        if (n <= 0) continue;
        real alpha[FSM_DECODE_HEADS];
        int hides = 0;
        block_scores(a, from, n, &u);
        for (ptrdiff_t h = 0; h < a->heads; h++) {
            const real top = block_rule(a, &rule, h, from, n, &u, &hides);
            alpha[h] = block_weights(&rule, part + h * size, n, u.s + h * BLOCK, top);
        }
        stream v = stream_of(&a->v, a->dtype, from, n, a->v_depth, u.v);
        rows_of raw = {NULL, 0};
        if (hides) {
            raw = fetch(&a->v, a->dtype, from, n, a->v_depth, u.v);
            if (all_finite(raw, n, a->v_depth)) raw.at = NULL;
            else {
                const rows_of clean = without_poison(raw, n, a->v_depth, u.clean);
                v = (stream){(const char *)clean.at, clean.stride * (ptrdiff_t)sizeof(real),
                             REAL_DTYPE};
            }
        }
        block_values(a, part, alpha, &v, n, &u);
        if (raw.at) decode_poison(a, &raw, from, n, part, &u);
    }
}

/* Once the state of the head is final: its weights, computed again. */
static void decode_weights(const fsm_attend *a, const score_rule *rule, const real *state) {
    const decode_state u = decode_begin(a, rule);
    for (ptrdiff_t first = 0; first < a->keys; first += BLOCK) {
        const ptrdiff_t n = a->keys - first < BLOCK ? a->keys - first : BLOCK;
        int hides = 0;
        block_scores(a, first, n, &u);
        for (ptrdiff_t h = 0; h < a->heads; h++) {
            const real max = state[2 * h], sum = state[2 * h + 1];
            const row_view view = view_of(a, h);
            real *s = u.s + h * BLOCK;
            block_rule(a, rule, h, first, n, &u, &hides);
            for (ptrdiff_t j = 0; j < n; j += VL) {
                const vec z = v_sub(v_load(s + j), v_set1(max == -INFINITY ? 0 : max));
                v_store(s + j, v_div(pow2(v_mul(z, v_set1(rule->c))), v_set1(sum)));
            }
            for (ptrdiff_t j = 0; j < n; j++)
                if (first + j < view.lo || first + j > view.hi) s[j] = 0;
                else if (sum != sum) s[j] = sees(a, &view, first + j) ? (real)NAN : 0;
            store_run(element(&a->weights, h, 0, first), a->weights.column, a->dtype, s, n);
        }
    }
}

static void decode_finish(const fsm_attend *a, void *parts, ptrdiff_t count) {
    const score_rule rule = make_rule(a);
    const ptrdiff_t size = a->v_depth + 2;
    real state[2 * FSM_DECODE_HEADS];
    for (ptrdiff_t h = 0; h < a->heads; h++) {
        real *first = (real *)parts + h * size, max = -INFINITY, sum = 0;
        const real sink = sink_of(a, h);
        if (sink > max) max = sink;
        for (ptrdiff_t i = 0; i < count; i++)
            if (first[i * a->heads * size] > max) max = first[i * a->heads * size];
        const real ref = max == -INFINITY ? 0 : max;
        real factor[VL];
        for (ptrdiff_t i = 0; i < count; i++) {
            real *part = first + i * a->heads * size;
            v_store(factor, pow2(v_mul(v_set1(part[0] - ref), v_set1(rule.c))));
            sum = real_fma(part[1], factor[0], sum);
            for (ptrdiff_t d = 0; d < a->v_depth; d++)
                first[2 + d] =
                    i ? real_fma(part[2 + d], factor[0], first[2 + d]) : part[2 + d] * factor[0];
        }
        if (a->sinks.at) {
            v_store(factor, pow2(v_mul(v_set1(sink - ref), v_set1(rule.c))));
            sum += factor[0];
        }
        const row_view view = view_of(a, h);
        const real lse = end_sum(a, &rule, &view, max, &sum);
        if (a->lse.at) memcpy(element(&a->lse, h, 0, 0), &lse, sizeof lse);
        for (ptrdiff_t d = 0; d < a->v_depth; d += VL) {
            const ptrdiff_t k = a->v_depth - d < VL ? a->v_depth - d : VL;
            const vec o = load_as(REAL_DTYPE, first + 2, d, k, v_set1(0));
            const vec mean = v_div(o, v_set1(sum));
            store_as(REAL_DTYPE, first + 2, d, k, v_canon(v_add(mean, v_set1(0)))); /* no -0 */
        }
        store_run(element(&a->out, h, 0, 0), a->out.column, a->dtype, first + 2, a->v_depth);
        state[2 * h] = max;
        state[2 * h + 1] = sum;
    }
    if (a->weights.at) decode_weights(a, &rule, state);
}

/* ---- merge_attention ---- */

/* out = (a exp(lse a) + b exp(lse b)) / exp(lse), the half with the smaller lse multiplied by
 * e / (1 + e), e = exp of the difference, which is rounded once. */
static void merge_one(const fsm_matrix operand[FSM_MERGE_COUNT], const fsm_dtype dtype[],
                      ptrdiff_t columns) {
    real lse[2], e[VL], factor[2], a[LOAD_BLOCK], b[LOAD_BLOCK];
    memcpy(&lse[0], operand[FSM_MERGE_LSE_A].at, sizeof(real));
    memcpy(&lse[1], operand[FSM_MERGE_LSE_B].at, sizeof(real));
    const int wins = lse[1] > lse[0]; /* which is the larger */
    const real high = lse[wins], low = lse[!wins];
    const vec difference = v_set1(low == -INFINITY ? low : low - high);
    v_store(e, exp_vec(difference, exp_broadcast(exp_reference(0, EXP_RANGE)), 0, 0));
    factor[wins] = (real)(1 / (1 + (double)e[0]));
    factor[!wins] = (real)(e[0] / (1 + (double)e[0]));
    real result = (real)((double)high + log1p_ratio(e[0]));
    if (lse[0] != lse[0] || lse[1] != lse[1] || high == INFINITY) {
        factor[0] = factor[1] = (real)NAN;
        result = high == INFINITY && low == low ? high : (real)NAN;
    }
    for (ptrdiff_t d = 0; d < columns; d += LOAD_BLOCK) {
        const ptrdiff_t n = columns - d < LOAD_BLOCK ? columns - d : LOAD_BLOCK;
        fetch_rows(a, element(&operand[FSM_MERGE_OUT_A], 0, 0, d), 0,
                   operand[FSM_MERGE_OUT_A].column, dtype[FSM_MERGE_OUT_A], 1, n);
        fetch_rows(b, element(&operand[FSM_MERGE_OUT_B], 0, 0, d), 0,
                   operand[FSM_MERGE_OUT_B].column, dtype[FSM_MERGE_OUT_B], 1, n);
        for (ptrdiff_t i = 0; i < n;
             i++) { /* a half that saw nothing does not count: 0, whatever */
            const real x = lse[0] == -INFINITY ? factor[0] - factor[0] : a[i];
            const real y = lse[1] == -INFINITY ? factor[1] - factor[1] : b[i];
            const real sum = real_fma(x, factor[0], y * factor[1]) + 0;
            a[i] = sum == sum ? sum : (real)NAN;
        }
        store_run(element(&operand[FSM_MERGE_OUT], 0, 0, d), operand[FSM_MERGE_OUT].column,
                  dtype[FSM_MERGE_OUT], a, n);
    }
    memcpy(operand[FSM_MERGE_LSE].at, &result, sizeof result);
}
