/* The gradients of attention, for FSM_TYPE: lanes are queries, in the groups and blocks of
 * attention.inc.h. With z the score (score.inc.h), dO the gradient of out, and what the forward pass
 * left, out and lse,
 *
 *     P  = exp(z - lse)                            the weights, computed again
 *     dP = V dO^T,  delta = sum(dO out)            delta: one number a query
 *     dz = P (dP - delta)                          the gradient of the score, and of bias
 *     dS = dz scale (1 - tanh^2)                   of q.k; tanh: of softcap, if there is one
 *     dQ^T += K^T dS,   dK += dS Q,   dV += P dO
 *
 * (FlashAttention's backward pass; Dao et al. 2022). Five matrix products, in tiles of registers:
 * those to scores and to dQ^T are those of the forward pass; dK and dV have vectors along a row and
 * sums along the lanes of a group.
 *
 * A unit is a few groups and a range of keys. It keeps dQ of its rows to its end and dK, dV of a block
 * to the end of the block, and adds them to the results then.
 *
 * A key that is not seen has P = dz = 0, exactly. Where it is not seen by all, what is not finite in
 * K, Q and dO is replaced by 0 in the products and added afterwards for those pairs that see each
 * other, as in the forward pass.
 *
 * Error, in units u of 2^-24 (2^-53): a dot product of n terms is off by n u, relative to the sum of
 * their absolute values, so P by (D |scale| |q|.|k| + 4 |lse| + 2 |other terms| + 8) u, relative; dP
 * and delta by Dv u; dz and dS have 4 roundings (that of 1 - tanh^2 is relative to 1); a sum over n
 * keys or queries goes through the additions in a block, or the lanes and groups of a unit, and then
 * one for each block or unit. reference.attention_backward_bound adds these up. */

#define gradient_group FSM_NAME(gradient_group)
#define gradient_state FSM_NAME(gradient_state)
#define gradient_layout FSM_NAME(gradient_layout)
#define gradient_bytes FSM_NAME(gradient_bytes)
#define gradient_rule FSM_NAME(gradient_rule)
#define gradient_begin FSM_NAME(gradient_begin)
#define gradient_sink FSM_NAME(gradient_sink)
#define gradient_scores FSM_NAME(gradient_scores)
#define gradient_scores_as FSM_NAME(gradient_scores_as)
#define gradient_rows FSM_NAME(gradient_rows)
#define gradient_rows_n FSM_NAME(gradient_rows_n)
#define gradient_to_keys FSM_NAME(gradient_to_keys)
#define gradient_to_queries FSM_NAME(gradient_to_queries)
#define gradient_to_bias FSM_NAME(gradient_to_bias)
#define gradient_block FSM_NAME(gradient_block)
#define gradient_end FSM_NAME(gradient_end)
#define gradient_unit FSM_NAME(gradient_unit)
#define add_row FSM_NAME(add_row)

typedef struct {
    group_state g;                   /* g.o: dQ^T */
    real lse[GROUP], delta[GROUP];   /* lanes that are no rows: inf, so that P = 0, and 0 */
    real *grad, *q_rows, *grad_rows; /* dO^T as g.q; both again, [GROUP][depth], [GROUP][v_depth] */
    int poisoned; /* q_rows or grad_rows have what is not finite; -1: not looked */
} gradient_group;

_Static_assert((int)KEYS >= (int)GROUP, "clean holds the rows of a block or of a group");

typedef struct {
    unit_scratch u;
    gradient_group *groups;
    real *d, *dz, *dk, *dv; /* d: dP, then dS; [key][width] of k_width and v_width elements */
    ptrdiff_t k_width, v_width;
} gradient_state;

static ptrdiff_t gradient_layout(char *at, ptrdiff_t depth, ptrdiff_t v_depth, gradient_state *s) {
    ptrdiff_t used = 0;
    const ptrdiff_t widest = depth > v_depth ? depth : v_depth;
    s->k_width = (depth + VL - 1) / VL * VL;
    s->v_width = (v_depth + VL - 1) / VL * VL;
    s->groups = FSM_TAKE(gradient_group, FSM_ATTEND_GROUPS);
    s->u.s = FSM_TAKE(real, KEYS * GROUP);
    s->d = FSM_TAKE(real, KEYS * GROUP);
    s->dz = FSM_TAKE(real, KEYS * GROUP);
    s->u.additive = FSM_TAKE(real, KEYS * GROUP);
    s->u.along = FSM_TAKE(real, KEYS);
    s->u.rows = FSM_TAKE(real, GROUP * (widest > KEYS ? widest : KEYS));
    s->u.k = FSM_TAKE(real, KEYS * depth);
    s->u.v = FSM_TAKE(real, KEYS * v_depth);
    s->u.clean = FSM_TAKE(real, KEYS * widest + VL);
    s->dk = FSM_TAKE(real, KEYS * s->k_width);
    s->dv = FSM_TAKE(real, KEYS * s->v_width);
    for (int i = 0; i < FSM_ATTEND_GROUPS; i++) {
        real *q = FSM_TAKE(real, depth * GROUP);
        real *dq = FSM_TAKE(real, up_to_multiple(widest, FSM_LANE_QUANTUM) * GROUP);
        real *grad = FSM_TAKE(real, v_depth * GROUP);
        /* a vector more: the last one of a row is read whole */
        real *q_rows = FSM_TAKE(real, depth * GROUP + VL);
        real *grad_rows = FSM_TAKE(real, v_depth * GROUP + VL);
        if (at) {
            gradient_group *g = &s->groups[i];
            g->g.q = q;
            g->g.o = dq;
            g->grad = grad;
            g->q_rows = q_rows;
            g->grad_rows = grad_rows;
        }
    }
    return used;
}

static ptrdiff_t gradient_bytes(ptrdiff_t depth, ptrdiff_t v_depth) {
    gradient_state s;
    return gradient_layout(NULL, depth, v_depth, &s);
}

/* Scores as they are: lse is theirs. */
static score_rule gradient_rule(const fsm_attend *a) {
    score_rule rule = make_rule(a);
    rule.natural = 1;
    rule.negate = 0;
    rule.c = LOG2E;
    rule.unit = 1;
    return rule;
}

/* ---- a group ---- */

/* The sink is one more key, whose value is 0. */
static void gradient_sink(const fsm_attend *a, ptrdiff_t head, real lse, real delta) {
    const real sink = sink_of(a, head);
    double *sum = (double *)(void *)element(&a->dsinks, head, 0, 0);
    real weight[VL];
    if (sink == -INFINITY) return;
    v_store(weight, pow2(v_set1((sink - lse) * LOG2E)));
    *sum -= (double)weight[0] * (double)delta;
}

static void gradient_begin(const fsm_attend *a, gradient_group *own, ptrdiff_t first, ptrdiff_t end,
                           real *staging) {
    group_state *g = &own->g;
    group_begin(a, g, first, end);
    fetch_group(a, g, &a->q, a->depth, own->q_rows);
    fetch_group(a, g, &a->grad_out, a->v_depth, own->grad_rows);
    to_lanes(g->q, own->q_rows, a->depth);
    to_lanes(own->grad, own->grad_rows, a->v_depth);
    memset(g->o, 0, (size_t)(a->depth * GROUP) * sizeof(real));
    own->poisoned = -1;
    for (int l = 0; l < GROUP; l++) {
        g->alpha[l] = 1;
        own->lse[l] = INFINITY;
        own->delta[l] = 0;
        if (l >= g->rows) continue;
        const row_view *view = &g->view[l];
        const real *grad = own->grad_rows + l * a->v_depth;
        memcpy(&own->lse[l], at_row(&a->lse, view, 0), sizeof(real));
        fetch_rows(staging, at_row(&a->out, view, 0), 0, a->out.column, a->dtype, 1, a->v_depth);
        vec sum = v_set1(0);
        for (ptrdiff_t d = 0; d < a->v_depth; d += VL) {
            const ptrdiff_t k = a->v_depth - d < VL ? a->v_depth - d : VL;
            sum = v_fma(load_as(REAL_DTYPE, grad, d, k, v_set1(0)),
                        load_as(REAL_DTYPE, staging, d, k, v_set1(0)), sum);
        }
        real delta = v_hsum(sum);
        if (delta - delta != 0 && !sees_any(a, view)) delta = 0; /* out is 0 whatever dO is */
        own->delta[l] = delta;
        if (a->dsinks.at && a->key_begin == 0) gradient_sink(a, view->head, own->lse[l], delta);
    }
}

/* Dot products into P, dP into dS, in place; dz, too, if there is a place for it. */
FSM_INLINE void gradient_scores_as(const score_rule *rule, const gradient_group *own,
                                   const block_state *b, const block_view *seen, real *s, real *d,
                                   real *dz, int shaped, int partial, int biased) {
    const vec zero = v_set1(0), one = v_set1(1), least = v_set1(LEAST), scale = v_set1(rule->scale);
    for (int v = 0; v < own->g.vectors; v++) {
        const lane_view view = view_lanes(&own->g, b, v);
        const vec lse = v_load(own->lse + v * VL), delta = v_load(own->delta + v * VL),
                  minus_lse = v_sub(zero, lse);
        FSM_UNROLL(2)
        for (ptrdiff_t j = 0; j < b->n; j++) {
            const ptrdiff_t at = j * GROUP + v * VL;
            const vec x = v_load(s + at), key = v_set1((real)(b->first % KEYS + j));
            const vec add = seen->additive ? v_load(seen->additive + at)
                                           : v_set1(b->additive ? b->additive[j] : 0);
            vec factor = scale, t;
            if (!shaped) t = v_fma(x, scale, minus_lse);
            else {
                const vec distance = v_abs(v_sub(view.position, key));
                t = v_sub(rule_score(rule, x, biased ? add : zero, view.slope, distance), lse);
                if (rule->cap != 0) {
                    const vec th = rule_tanh(rule, x);
                    factor = v_mul(scale, v_fnma(th, th, one));
                }
            }
            /* lse is rounded, and so t may be above 0; infinity is a score */
            t = v_mul(t, v_set1(LOG2E));
            vec p = pow2(v_if_less(t, v_set1(INFINITY), v_min(zero, t), t));
            vec grad = v_mul(p, v_sub(v_load(d + at), delta)), ds = v_mul(grad, factor);
            if (partial) {
                vec sees = v_if_less(add, least, zero, one);
                sees = v_if_less(key, view.lo, zero, sees);
                sees = v_if_less(view.hi, key, zero, sees);
                p = v_unless(sees, zero, p);
                grad = v_unless(sees, zero, grad);
                ds = v_unless(sees, zero, ds); /* the factor may be NaN where nobody looks */
            }
            v_store(s + at, p);
            if (dz) v_store(dz + at, grad);
            v_store(d + at, ds);
        }
    }
}

static void gradient_scores(const fsm_attend *a, const score_rule *rule, const gradient_group *own,
                            const block_state *b, const block_view *seen, real *s, real *d,
                            real *dz) {
    const int shaped = rule->cap != 0 || a->bias.at || a->slopes.at;
    if (shaped) gradient_scores_as(rule, own, b, seen, s, d, dz, 1, 1, a->bias.at != NULL);
    else if (seen->hides || seen->ranged) gradient_scores_as(rule, own, b, seen, s, d, dz, 0, 1, 0);
    else gradient_scores_as(rule, own, b, seen, s, d, NULL, 0, 0, 0);
}

/* ---- products ---- */

/* to[j] += sum over the first `lanes` l of w[j][l] rows[l], vectors along the rows, which have
 * `columns` elements; those of `to` have `width`, whole vectors, and what lies beyond a row goes to
 * where nobody looks. */
FSM_INLINE void gradient_rows_n(int vectors, real *to, ptrdiff_t width, const real *w,
                                ptrdiff_t keys, const real *rows, ptrdiff_t columns,
                                ptrdiff_t lanes) {
    ptrdiff_t j = 0;
#define TILE(ROWS)                                                                       \
    {                                                                                    \
        vec acc[8][3];                                                                   \
        tile_product(ROWS, vectors, w + j * GROUP, GROUP, 1, rows, columns, lanes, acc); \
        FSM_UNROLL(8)                                                                    \
        for (int i = 0; i < ROWS; i++) FSM_UNROLL(3)                                     \
        for (int v = 0; v < vectors; v++) {                                              \
            real *at = to + (j + i) * width + v * VL;                                    \
            v_store(at, v_add(v_load(at), acc[i][v]));                                   \
        }                                                                                \
    }
    IN_TILES(j, keys, ACC_ROWS, TILE)
#undef TILE
}

static void gradient_rows(real *to, ptrdiff_t width, const real *w, ptrdiff_t keys,
                          const real *rows, ptrdiff_t columns, ptrdiff_t lanes) {
    for (ptrdiff_t d = 0, vectors; d < width; d += vectors * VL) {
        const ptrdiff_t left = (width - d) / VL;
        vectors = left == 4 ? 2 : left > 3 ? 3 : left; /* 4 are 2 and 2, not 3 and 1 */
        if (vectors == 3) gradient_rows_n(3, to + d, width, w, keys, rows + d, columns, lanes);
        else if (vectors == 2) gradient_rows_n(2, to + d, width, w, keys, rows + d, columns, lanes);
        else gradient_rows_n(1, to + d, width, w, keys, rows + d, columns, lanes);
    }
}

/* dK or dV of a block from dS or P and the group's rows of q or dO; poisoned: what is not finite in
 * them goes to the keys that see the row, and to no other. */
static void gradient_to_keys(const fsm_attend *a, const gradient_group *own, const block_state *b,
                             real *to, ptrdiff_t width, const real *w, const real *rows,
                             ptrdiff_t columns, int poisoned, real *clean) {
    const ptrdiff_t lanes = own->g.rows;
    if (poisoned) without_poison((rows_of){rows, columns}, lanes, columns, clean);
    gradient_rows(to, width, w, b->n, poisoned ? clean : rows, columns, lanes);
    for (ptrdiff_t i = 0; poisoned && i < lanes * columns; i++) {
        const ptrdiff_t l = i / columns, d = i % columns;
        if (rows[i] - rows[i] == 0) continue;
        for (ptrdiff_t j = 0; j < b->n; j++)
            if (sees(a, &own->g.view[l], b->first + j))
                to[j * width + d] += w[j * GROUP + l] * rows[i];
    }
}

static void gradient_to_queries(const fsm_attend *a, gradient_group *own, const block_state *b,
                                const real *w, int poisoned, real *clean) {
    group_state *g = &own->g;
    const rows_of k = poisoned ? without_poison(b->k, b->n, a->depth, clean) : b->k;
    group_values(g->vectors, g->o, g->alpha, &k, b->n, w, a->depth);
    if (poisoned) add_poison(a, g, b, b->k, a->depth, w);
}

/* In float64, for the sum may be over all queries of all heads of a batch. */
static void gradient_to_bias(const fsm_attend *a, const group_state *g, const block_state *b,
                             const real *dz, real *staging) {
    const fsm_matrix *to = &a->dbias;
    from_lanes(staging, dz, b->n);
    for (int l = 0; l < g->rows; l++) {
        const real *row = staging + l * b->n;
        char *at = at_row(to, &g->view[l], b->first);
        for (ptrdiff_t j = 0; j < b->n; j++, at += to->column) {
            double *sum = (double *)(void *)at;
            *sum += (double)row[j];
            if (*sum != *sum) *sum = NAN; /* the canonical one */
        }
    }
}

/* ---- a unit ---- */

static void add_row(char *to, const real *from, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        const vec before = load_as(REAL_DTYPE, to, i, k, v_set1(0)),
                  more = load_as(REAL_DTYPE, from, i, k, v_set1(0));
        store_as(REAL_DTYPE, to, i, k, v_canon(v_add(before, more)));
    }
}

/* A block for one group; returns 0 if it sees nothing of it. */
static int gradient_block(const fsm_attend *a, const score_rule *rule, gradient_state *s,
                          gradient_group *own, block_state *b) {
    group_state *g = &own->g;
    unit_scratch *u = &s->u;
    block_view seen;
    if (!view_block(a, g, b, u, &seen)) return 0;
    if (!b->k.at) {
        b->k = fetch(&a->k, a->dtype, b->first, b->n, a->depth, u->k);
        b->v = fetch(&a->v, a->dtype, b->first, b->n, a->v_depth, u->v);
    }
    group_scores(g->vectors, u->s, &b->k, b->n, g->q, a->depth);
    group_scores(g->vectors, s->d, &b->v, b->n, own->grad, a->v_depth);
    real *dz = a->dbias.at ? s->dz : NULL;
    gradient_scores(a, rule, own, b, &seen, u->s, s->d, dz);
    if (dz) gradient_to_bias(a, g, b, dz, u->rows);

    const int partial = seen.hides || seen.ranged;
    if (partial && b->poisoned < 0) b->poisoned = !all_finite(b->k, b->n, a->depth);
    if (partial && own->poisoned < 0)
        own->poisoned = !all_finite((rows_of){own->q_rows, a->depth}, g->rows, a->depth) ||
                        !all_finite((rows_of){own->grad_rows, a->v_depth}, g->rows, a->v_depth);
    const int poisoned = partial && own->poisoned;
    gradient_to_queries(a, own, b, s->d, partial && b->poisoned, u->clean);
    gradient_to_keys(a, own, b, s->dk, s->k_width, s->d, own->q_rows, a->depth, poisoned, u->clean);
    gradient_to_keys(a, own, b, s->dv, s->v_width, u->s, own->grad_rows, a->v_depth, poisoned,
                     u->clean);
    return 1;
}

static void gradient_end(const fsm_attend *a, const group_state *g, real *staging) {
    from_lanes(staging, g->o, a->depth);
    for (int l = 0; l < g->rows; l++)
        add_row(at_row(&a->dq, &g->view[l], 0), staging + l * a->depth, a->depth);
}

static void gradient_unit(const fsm_attend *a) {
    gradient_state s;
    gradient_layout(a->scratch, a->depth, a->v_depth, &s);
    const score_rule rule = gradient_rule(a);
    ptrdiff_t from = a->key_end, to = a->key_begin; /* the keys that some row sees */
    int groups = 0;
    for (ptrdiff_t r = a->begin; r < a->end; r += s.groups[groups++].g.rows) {
        gradient_group *own = &s.groups[groups];
        gradient_begin(a, own, r, a->end, s.u.rows);
        if (own->g.lo_least < from) from = own->g.lo_least;
        if (own->g.hi_most + 1 > to) to = own->g.hi_most + 1;
    }
    if (from < a->key_begin) from = a->key_begin;
    if (to > a->key_end) to = a->key_end;
    for (ptrdiff_t first = from / KEYS * KEYS; first < to; first += KEYS) {
        block_state b;
        begin_block(a, &s.groups[0].g.view[0], &b, first, to, &s.u);
        if (b.n == 0) continue;
        memset(s.dk, 0, (size_t)(b.n * s.k_width) * sizeof(real));
        memset(s.dv, 0, (size_t)(b.n * s.v_width) * sizeof(real));
        int any = 0;
        for (int i = 0; i < groups; i++) any |= gradient_block(a, &rule, &s, &s.groups[i], &b);
        for (ptrdiff_t j = 0; any && j < b.n; j++) {
            add_row(element(&a->dk, 0, b.first + j, 0), s.dk + j * s.k_width, a->depth);
            add_row(element(&a->dv, 0, b.first + j, 0), s.dv + j * s.v_width, a->v_depth);
        }
    }
    for (int i = 0; i < groups; i++) gradient_end(a, &s.groups[i].g, s.u.rows);
}
