/* Whole contiguous rows: the three passes back to back while the row is in the nearest cache. What is
 * fused is a pass in front of them, of the rows at work, so that they stay there, too. */

#define map_and_span_rest FSM_NAME(map_and_span_rest)
#define map_and_span_as FSM_NAME(map_and_span_as)
#define map_and_span FSM_NAME(map_and_span)
#define map_and_span_nt FSM_NAME(map_and_span_nt)
#define map_and_span_nt_as FSM_NAME(map_and_span_nt_as)
#define pending FSM_NAME(pending)
#define flush FSM_NAME(flush)
#define nt_begin FSM_NAME(nt_begin)
#define map_of FSM_NAME(map_of)
#define writes_in_sum FSM_NAME(writes_in_sum)
#define ready_of FSM_NAME(ready_of)
#define row_state FSM_NAME(row_state)
#define rows_middle FSM_NAME(rows_middle)
#define middle_spans FSM_NAME(middle_spans)
#define middle_spans_as FSM_NAME(middle_spans_as)
#define middle_sums FSM_NAME(middle_sums)
#define middle_maps_as FSM_NAME(middle_maps_as)
#define middle_maps_to FSM_NAME(middle_maps_to)
#define middle_maps FSM_NAME(middle_maps)
#define lines FSM_NAME(lines)
#define whole_lines FSM_NAME(whole_lines)
#define write_lines FSM_NAME(write_lines)
#define exp_rows FSM_NAME(exp_rows)
#define to_line FSM_NAME(to_line)
#define middle_fold FSM_NAME(middle_fold)
#define row_exp FSM_NAME(row_exp)
#define rows_long FSM_NAME(rows_long)
#define rows_all FSM_NAME(rows_all)
#define row_of FSM_NAME(row_of)
#define fused_row FSM_NAME(fused_row)
#define exp_array FSM_NAME(exp_array)

/* The end of map_and_span: elements from i on, the results to `at`. */
FSM_INLINE span map_and_span_rest(int log, fsm_dtype out_dtype, void *at, fsm_dtype dtype,
                                  const void *x, fsm_dtype next_dtype, const void *next,
                                  ptrdiff_t i, ptrdiff_t n, map_vref map, running_max *m) {
    for (ptrdiff_t j = 0; i < n; i += VL, j += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        if (k == VL) max_add(m, 0, load_as(next_dtype, next, i, VL, v_set1(0)));
        else max_tail(m, next_dtype, next, i, n);
        store_as(out_dtype, at, j, k, map_vec(log, load_as(dtype, x, i, k, v_set1(0)), map));
    }
    return max_end(m, next_dtype, next, n);
}

/* The map of a row, from x or e, bound by its stores, and the extrema of another, bound by its loads,
 * in one loop: they run at once. */
FSM_INLINE span map_and_span_as(int log, fsm_dtype out_dtype, void *out, fsm_dtype dtype,
                                const void *x, fsm_dtype next_dtype, const void *next, ptrdiff_t n,
                                map_ref map) {
    const map_vref mr = {v_set1(map.a), v_set1(map.b)};
    running_max m = max_begin();
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            const vec a = load_as(dtype, x, i + j * VL, VL, v_set1(0));
            max_add(&m, j, load_as(next_dtype, next, i + j * VL, VL, v_set1(0)));
            store_as(out_dtype, out, i + j * VL, VL, map_vec(log, a, mr));
        }
    char *at = (char *)out + i * float_size(out_dtype);
    return map_and_span_rest(log, out_dtype, at, dtype, x, next_dtype, next, i, n, mr, &m);
}

/* x is e, or with log a logit and of the next row's dtype; out has that dtype too, or the compute
 * type: for other pairs of types a loop of their own is not worth its size. */
FSM_APART span map_and_span(int log, fsm_dtype out_dtype, void *out, const void *x,
                            fsm_dtype next_dtype, const void *next, ptrdiff_t n, map_ref map) {
#define LOOP(OUT_DTYPE, DTYPE)                                                         \
    if (log) return map_and_span_as(1, OUT_DTYPE, out, DTYPE, x, DTYPE, next, n, map); \
    return map_and_span_as(0, OUT_DTYPE, out, REAL_DTYPE, x, DTYPE, next, n, map)
#define CALL(DTYPE)                                                        \
    if (DTYPE != REAL_DTYPE && out_dtype == DTYPE) { LOOP(DTYPE, DTYPE); } \
    LOOP(REAL_DTYPE, DTYPE)
    SWITCH_DTYPE(next_dtype, CALL);
#undef CALL
#undef LOOP
}

/* The beginning of a line of out, at `at`, not stored yet: one that is written partly past the
 * caches, partly not, costs more than it saves. So the line in which a row ends waits for the next
 * row to complete it. */
typedef struct {
    real line[LINE], *at;
    ptrdiff_t count;
} pending;

static void flush(pending *p) {
    if (p->count) memcpy(p->at, p->line, (size_t)p->count * sizeof(real));
    p->count = 0;
}

/* Elements from `at` to where a line of memory begins. */
FSM_INLINE ptrdiff_t to_line(const real *at) {
    return (ptrdiff_t)(-(uintptr_t)at % FSM_ALIGN / sizeof(real));
}

/* The beginning of a row, up to where a line begins; returns how many elements. */
FSM_INLINE ptrdiff_t nt_begin(int log, real *out, fsm_dtype dtype, const void *x, map_vref map,
                              pending *p) {
    const ptrdiff_t head = to_line(out);
    const int completes = p->count + head == LINE && p->at + p->count == out;
    if (!completes) flush(p);
    for (ptrdiff_t i = 0; i < head; i += VL) {
        const ptrdiff_t k = head - i < VL ? head - i : VL;
        store_as(REAL_DTYPE, p->line + LINE - head, i, k,
                 map_vec(log, load_as(dtype, x, i, k, v_set1(0)), map));
    }
    if (completes)
        for (int j = 0; j < LINE; j += VL) v_store_nt(p->at + j, v_load(p->line + j));
    else memcpy(out, p->line + LINE - head, (size_t)head * sizeof(real));
    p->count = 0;
    return head;
}

/* map_and_span past the caches, a whole line at a time. */
FSM_INLINE span map_and_span_nt_as(int log, real *out, fsm_dtype dtype, const void *x,
                                   fsm_dtype next_dtype, const void *next, ptrdiff_t n, map_ref map,
                                   pending *p) {
    const map_vref mr = {v_set1(map.a), v_set1(map.b)};
    const ptrdiff_t head = nt_begin(log, out, dtype, x, mr, p);
    running_max m = max_begin();
    ptrdiff_t i = 0;
    for (; i < head; i += VL) /* some twice: no harm */
        max_add(&m, 0, load_as(next_dtype, next, i, VL, v_set1(0)));
    for (i = head; i + LINE <= n; i += LINE) FSM_UNROLL(8)
    for (int j = 0; j < LINE; j += VL) {
        const vec a = load_as(dtype, x, i + j, VL, v_set1(0));
        max_add(&m, j / VL & 3, load_as(next_dtype, next, i + j, VL, v_set1(0)));
        v_store_nt(out + i + j, map_vec(log, a, mr));
    }
    p->at = out + i;
    p->count = n - i;
    return map_and_span_rest(log, REAL_DTYPE, p->line, dtype, x, next_dtype, next, i, n, mr, &m);
}

FSM_APART span map_and_span_nt(int log, real *out, const void *x, fsm_dtype next_dtype,
                               const void *next, ptrdiff_t n, map_ref map, pending *p) {
#define CALL(DTYPE)                                                               \
    if (log) return map_and_span_nt_as(1, out, DTYPE, x, DTYPE, next, n, map, p); \
    return map_and_span_nt_as(0, out, REAL_DTYPE, x, DTYPE, next, n, map, p)
    SWITCH_DTYPE(next_dtype, CALL);
#undef CALL
}

/* Where the exp of a row goes; NULL: nowhere. */
FSM_INLINE real *row_exp(fsm_op op, const fsm_rows *w, ptrdiff_t row) {
    if (op != FSM_SOFTMAX) return NULL;
    if (w->out_dtype == REAL_DTYPE && !w->nontemporal)
        return (real *)(w->out + row * w->out_stride);
    return w->scratch ? (real *)w->scratch + row % exps_kept(w->n, w->nontemporal) * w->n : NULL;
}

/* A row at work in rows_long. The numbers of an fsm_state are 512 bytes apart: those of four of them
 * would share a few sets of the nearest cache. */
typedef struct {
    real max; /* not finite: special */
    int normal;
    exp_ref exp;
    map_ref map;
    vsum sum;
} row_state;

/* Where a row lies once it is fused, until row_lag others are. */
FSM_INLINE real *fused_row(const fsm_rows *w, ptrdiff_t r) {
    return (real *)w->fuse->z + (r & row_lag(w->n)) * w->n;
}

/* A row as the passes read it. */
FSM_INLINE const char *row_of(const fsm_rows *w, ptrdiff_t r) {
    return w->fuse ? (const char *)fused_row(w, r) : w->x + r * w->x_stride;
}

/* The map of row `done` with the extrema of the row at `next`, or either alone if the other is not
 * (NULL, no row). */
static span map_of(fsm_op op, const fsm_rows *w, ptrdiff_t done, const row_state *st,
                   const char *next, pending *rest) {
    const int log = op == FSM_LOG_SOFTMAX;
    const ptrdiff_t n = w->n;
    const map_ref map = st->map;
    const fsm_dtype dtype = dtype_of(w);
    const char *x = row_of(w, done);
    char *out = w->out + done * w->out_stride;
    real *e = row_exp(op, w, done);
    const void *from = e ? (const void *)e : x;
    if (op == FSM_LOGSUMEXP) store_run(out, 0, w->out_dtype, &map.a, 1);
    else if (e && !st->normal) {
        flush(rest);
        far_row(w->out_dtype, out, e, n, map);
    } else if (w->nontemporal) /* without a next row the extrema are those of any */
        return map_and_span_nt(log, (real *)out, from, dtype, next ? next : x, n, map, rest);
    else if (next && (log || e) && (w->out_dtype == dtype || w->out_dtype == REAL_DTYPE))
        return map_and_span(log, w->out_dtype, out, from, dtype, next, n, map);
    else if (e || log) row_map(w->out_dtype, out, dtype, from, n, log, map);
    else exp_map(w->out_dtype, out, dtype, x, n, st->exp, st->normal, !st->normal, map);
    return next ? row_span(dtype, next, n) : (span){0, 0, 0};
}

/* Whether the results of a row are written while the exp of another is taken: past the caches, where
 * exp and its sum are one loop (TOGETHER) and both rows in the second-level cache. */
FSM_INLINE int writes_in_sum(fsm_op op, const fsm_rows *w) {
    return TOGETHER && w->nontemporal && op != FSM_LOGSUMEXP && dtype_of(w) == REAL_DTYPE &&
           w->n <= FSM_ASK_MOST && w->n <= EXACT_COARSE;
}

/* What row_sum is to write of row `done`: whole lines; the rest is dealt with here. */
static ready ready_of(fsm_op op, const fsm_rows *w, ptrdiff_t done, const row_state *st,
                      pending *rest) {
    const int log = op == FSM_LOG_SOFTMAX;
    const real *e = row_exp(op, w, done);
    ready to = {.out = (real *)(w->out + done * w->out_stride),
                .from = e ? e : (const real *)row_of(w, done),
                .n = w->n,
                .map = st->map,
                .log = log};
    const map_vref map = {v_set1(to.map.a), v_set1(to.map.b)};
    const ptrdiff_t head = nt_begin(log, to.out, REAL_DTYPE, to.from, map, rest);
    to.out += head, to.from += head;
    to.n = (w->n - head) / LINE * LINE;
    rest->at = to.out + to.n;
    rest->count = w->n - head - to.n;
    row_map_as(REAL_DTYPE, rest->line, REAL_DTYPE, to.from + to.n, rest->count, log, to.map);
    return to;
}

/* Long rows, one at a time: while the results of one are stored the next one comes from memory.
 *
 * The end of each step is a chain of some 100 cycles, which reduces a vector to a number and makes
 * constants of it. In rows that are not much longer it is hidden: the next step is then of another
 * row, and only the one after goes on with what this one has found. Returns how many rows have no
 * finite maximum; softmax and log_softmax have filled them with NaN. */
static ptrdiff_t rows_long(fsm_op op, const fsm_rows *w) {
    const int fine = w->n > EXACT_COARSE, in_sum = writes_in_sum(op, w), lag = row_lag(w->n);
    const int once =
        lag == 3 && w->n <= FOLD_EVERY * VL; /* sums are one vsum, folded a step later */
    const fsm_dtype x_dtype = dtype_of(w);
    const ptrdiff_t n = w->n;
    pending rest = {.count = 0};
    ptrdiff_t special = 0;
    row_state state[4];
    fsm_exact_sum sum;
    for (ptrdiff_t r = 0; r < w->rows + lag; r++) {
        const char *next = r < w->rows ? row_of(w, r) : NULL;
        const ptrdiff_t done = r - lag, begun = r - lag / 2;
        const row_state *end = &state[done & 3];
        const int sums = begun >= 0 && begun < w->rows;
        span next_span = {0, 0, 0};
        if (w->fuse && next) fuse_rows(fused_row(w, r), w, r, 1);
        if (done >= 0 && !in_sum) next_span = map_of(op, w, done, end, next, &rest);
        else if (next) next_span = row_span(x_dtype, next, n);
        if (next) {
            row_state *st = &state[r & 3];
            st->max = next_span.max;
            st->exp = span_reference(next_span, &st->normal);
            special += is_special(st->max);
        }
        const int writes = in_sum && done >= 0, with = writes && sums &&
                                                       state[begun & 3].normal == 1 &&
                                                       (end->normal || op != FSM_SOFTMAX);
        if (writes && !with) map_of(op, w, done, end, NULL, &rest);
        for (int j = 0; j < FSM_PARTS; j++) sum.parts[j][0] = 0;
        if (sums) {
            row_state *st = &state[begun & 3];
            const char *x = row_of(w, begun), *ask = w->x + (r + 1) * w->x_stride;
            real *e = row_exp(op, w, begun);
            ready to, *write = NULL;
            if (with) to = ready_of(op, w, done, end, &rest), write = &to;
            if (r + 1 >= w->rows || w->x_dtype != REAL_DTYPE || n > FSM_ASK_MOST) ask = NULL;
            if (once) st->sum = row_vsum(x_dtype, e, x, n, st->exp, 0, st->normal, ask, write, 0);
            else row_sum(x_dtype, e, x, n, st->exp, &sum, 0, fine, st->normal, ask, write);
        }
        const ptrdiff_t summed = once ? begun - 1 : begun;
        if (summed >= 0 && summed < w->rows) {
            row_state *st = &state[summed & 3];
            if (once) run_fold(&sum, 0, &st->sum, n, 0);
            st->map = row_constants(op, st->max, &sum, 0);
        }
        if (done >= 0 && op != FSM_LOGSUMEXP && is_special(end->max)) {
            flush(&rest); /* of this row or of the one before */
            fill_row(w->out_dtype, w->out + done * w->out_stride, n, NAN);
        }
    }
    flush(&rest);
    if (w->nontemporal) store_fence();
    return special;
}

/* ---- rows whose reductions would cost as much as they do ---- */

/* Up to this long they are. A row of equal elements of as many, all of them 1, counts to 512 * 2^22 in
 * float32: what 32 bits hold without a sign (middle_fold). Of vectors of one element there is nothing to
 * reduce: that is the length up to which blocks are of use all the same. */
#undef MIDDLE_ROW
#define MIDDLE_ROW (VL >= 4 ? 32 * VL : 128)

/* From memory, where exp and sum are one loop, a row at a time leaves it fewer waits (a Xeon with AVX-512,
 * 16384 x 512 on two threads 2689 us -> 2114, on one 7528 -> 6871; of 256 elements even, with AVX2 4 to
 * 8 % slower). */
#undef MIDDLE_FROM_MEMORY
#define MIDDLE_FROM_MEMORY (TOGETHER ? MIDDLE_ROW / 2 : MIDDLE_ROW)

/* The maximum of each of `rows` rows, and for all of them the smallest element. The reductions of VL
 * rows are one transposition. */
FSM_INLINE void middle_spans_as(fsm_dtype dtype, fsm_state *st, const char *x, ptrdiff_t stride,
                                int rows, ptrdiff_t n) {
    vec most[FSM_LANES], least = v_set1(INFINITY), sum = v_set1(0);
    for (int l = 0; l < rows; l++) {
        running_max m = max_begin();
        ptrdiff_t i = 0;
        for (; i + 2 * VL <= n; i += 2 * VL)
            for (int j = 0; j < 2; j++)
                max_add(&m, j, load_as(dtype, x + l * stride, i + j * VL, VL, v_set1(0)));
        if (i + VL <= n) {
            max_add(&m, 0, load_as(dtype, x + l * stride, i, VL, v_set1(0)));
            i += VL;
        }
        max_tail(&m, dtype, x + l * stride, i, n);
        most[l] = v_max(m.max[0], m.max[1]);
        least = v_min(v_min(m.min[0], m.min[1]), least);
        sum = v_add(v_add(m.sum[0], m.sum[1]), sum);
    }
    for (int l = rows; l % VL; l++) most[l] = v_set1(0);
    real min = -v_hmax(v_sub(v_set1(0), least));
    st->holes = min == -INFINITY;
    if (st->holes) min = finite_min(dtype, x, stride, rows, n);
    for (int g = 0; g < rows; g += VL) {
        v_transpose(most + g);
        vec m = most[g];
        for (int l = 1; l < VL; l++) m = v_max(m, most[g + l]);
        v_store(LANE(st->max) + g, v_add(m, v_set1(0)));
        v_store(LANE(st->min) + g, v_set1(min));
    }
    const real total = v_hsum(sum);
    for (int l = 0; l < rows && total != total; l++)
        LANE(st->max)[l] = row_span(dtype, x + l * stride, n).max;
}

FSM_APART void middle_spans(fsm_dtype dtype, fsm_state *st, const char *x, ptrdiff_t stride,
                            int rows, ptrdiff_t n) {
#define CALL(DTYPE) middle_spans_as(DTYPE, st, x, stride, rows, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* Results that are still to be written past the caches, whole lines of memory, n elements. */
typedef struct {
    real *to;
    const real *from;
    ptrdiff_t n;
} lines;

/* The lines of n results that are to go to `at`. If it is within a line, what belongs to that is
 * written, in the ordinary way; the last ones may be less than a line, and are left. */
FSM_INLINE lines whole_lines(real *at, const real *from, ptrdiff_t n) {
    const ptrdiff_t begun = to_line(at);
    memcpy(at, from, (size_t)begun * sizeof(real));
    return (lines){at + begun, from + begun, (n - begun) / LINE * LINE};
}

/* Write as many lines of them as hold n elements. */
FSM_INLINE void write_lines(lines *w, ptrdiff_t n) {
    const ptrdiff_t end = n < w->n ? n : w->n;
    ptrdiff_t i = 0;
    for (; i < end; i += LINE)
        for (int j = 0; j < LINE; j += VL) v_store_nt(w->to + i + j, v_load(w->from + i + j));
    *w = (lines){w->to + i, w->from + i, w->n - i};
}

/* exp_run for rows of one state, which is normal; the rows `ask` are asked for as those of x are read,
 * and after each row as many elements of w are written. */
FSM_NONNULL FSM_APART void exp_rows(fsm_dtype dtype, real *const *e, rows_at x, int rows,
                                    ptrdiff_t n, const fsm_state *st, rows_at ask, lines *w) {
#define CALL(DTYPE)                                                           \
    for (int l = 0; l < rows; l++) {                                          \
        exp_run_as(DTYPE, e[l], x.at + l * x.stride, n, row_ref(st, l), 0, 1, \
                   DTYPE == REAL_DTYPE ? ask.at + l * ask.stride : NULL);     \
        write_lines(w, n);                                                    \
    }
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* The sums of the rows whose exp lies at e[l], each in two vectors of counts. */
FSM_APART void middle_sums(vec *hi, vec *lo, real *const *e, int rows, ptrdiff_t n, int normal) {
    for (int l = 0; l < rows; l++) {
        const vsum s = normal ? run_sum(e[l], n, 1, 0) : run_vsum(e[l], n, 0);
        hi[l] = v_from_bits(s.part[0]);
        lo[l] = v_from_bits(s.part[1]);
    }
    for (int l = rows; l % VL; l++) hi[l] = lo[l] = v_set1(0);
}

_Static_assert((int64_t)MIDDLE_ROW << 22 <= UINT32_MAX, "middle_fold: counts of a row");

/* The vsums of VL rows, `adds` additions to each, into the sums of lanes from g on. Part 0 has no
 * counts below 0. */
FSM_INLINE void middle_fold(fsm_exact_sum *sum, int g, vec counts[VL], int part, ptrdiff_t adds) {
    v_transpose(counts);
    vsum all = vsum_zero();
    for (int l = 0; l < VL; l++) all.part[part] = v_add_int(all.part[part], v_bits(counts[l]));
    bits_t count[VL];
    v_store_int(count, vsum_int(&all, part, adds * VL, 2));
    for (int l = 0; l < VL; l++)
        sum_fold(sum, g + l, part,
                 FSM_BITS == 32 && part == 0 ? (int64_t)(uint32_t)count[l] : count[l]);
}

/* The maps of rows, from[l] being e, or with log a row of logits. */
FSM_INLINE void middle_maps_as(int log, fsm_dtype out_dtype, char *out, ptrdiff_t out_stride,
                               fsm_dtype dtype, const void *const *from, int rows, ptrdiff_t n,
                               const fsm_state *st) {
    for (int l = 0; l < rows; l++) {
        const map_ref map = {LANE(st->value[0])[l], LANE(st->value[1])[l]};
        row_map_as(out_dtype, out + l * out_stride, dtype, from[l], n, log, map);
    }
}

FSM_INLINE void middle_maps_to(int log, fsm_dtype out_dtype, char *out, ptrdiff_t out_stride,
                               fsm_dtype dtype, const void *const *from, int rows, ptrdiff_t n,
                               const fsm_state *st) {
#define CALL(DTYPE) middle_maps_as(1, out_dtype, out, out_stride, DTYPE, from, rows, n, st)
    if (!log) middle_maps_as(0, out_dtype, out, out_stride, REAL_DTYPE, from, rows, n, st);
    else SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_APART void middle_maps(int log, fsm_dtype out_dtype, char *out, ptrdiff_t out_stride,
                           fsm_dtype dtype, const void *const *from, int rows, ptrdiff_t n,
                           const fsm_state *st) {
#define CALL(DTYPE) middle_maps_to(log, DTYPE, out, out_stride, dtype, from, rows, n, st)
    SWITCH_DTYPE(out_dtype, CALL);
#undef CALL
}

/* Rows whose reductions would cost as much as they do: as many at a time as make a block, with the
 * constants of them all computed as vectors. Results that go past the caches are made in `own`, as
 * rows need not begin with a line, and written during exp of the next block. Returns what rows_long
 * does. */
static ptrdiff_t rows_middle(fsm_op op, const fsm_rows *w) {
    const fsm_dtype x_dtype = dtype_of(w), out_dtype = w->out_dtype;
    const ptrdiff_t n = w->n, fitting = 2 * FSM_BLOCK / n / VL * VL, size = sizeof(real);
    const int block = fitting > FSM_LANES ? FSM_LANES : fitting > VL ? (int)fitting : VL;
    const int log = op == FSM_LOG_SOFTMAX, past = w->nontemporal && w->out_stride == n * size;
    const int in_out = op == FSM_SOFTMAX && out_dtype == REAL_DTYPE && !past;
    ptrdiff_t special = 0, left = 0; /* of the last block, in front of own */
    real both[2][LINE + 2 * FSM_BLOCK + VL * MIDDLE_ROW], *own = both[0];
    lines waiting = {0};
    fsm_state st;
    for (ptrdiff_t r = 0; r < w->rows; r += block) {
        const int rows = w->rows - r < block ? (int)(w->rows - r) : block;
        const rows_at in = rows_from(w, r, rows);
        char *out = past ? (char *)(own + left) : w->out + r * w->out_stride;
        real *e[FSM_LANES];
        vec hi[FSM_LANES], lo[FSM_LANES];
        begin_state(&st, (rows + VL - 1) / VL * VL, n);
        middle_spans(x_dtype, &st, in.at, in.stride, rows, n);
        reference_pass(&st);
        special += st.special;
        for (int l = 0; l < rows; l++)
            e[l] = in_out ? (real *)(out + l * w->out_stride) : own + left + l * n;
        rows_at ask = in; /* as good as nothing */
        if (r + 2 * (ptrdiff_t)block <= w->rows && (!w->fuse || w->x_dtype == REAL_DTYPE))
            ask = (rows_at){w->x + (r + block) * w->x_stride, w->x_stride}; /* whole, too */
        if (st.normal == 1) exp_rows(x_dtype, e, in, rows, n, &st, ask, &waiting);
        for (int l = 0; l < rows && st.normal != 1; l++)
            exp_run(x_dtype, e[l], in.at + l * in.stride, n, row_ref(&st, l), st.normal, NULL);
        middle_sums(hi, lo, e, rows, n, st.normal);
        for (int g = 0; g < rows; g += VL) {
            middle_fold(&st.sum, g, hi + g, 0, (n + VL - 1) / VL);
            middle_fold(&st.sum, g, lo + g, 1, (n + VL - 1) / VL);
        }
        finish_pass(op, &st);
        if (op == FSM_LOGSUMEXP) {
            store_run(out, w->out_stride, out_dtype, LANE(st.value[0]), rows);
            continue;
        }
        const void *from[FSM_LANES];
        for (int l = 0; l < rows; l++) from[l] = log ? (const void *)(in.at + l * in.stride) : e[l];
        if (log || st.normal)
            middle_maps(log, out_dtype, out, w->out_stride, x_dtype, from, rows, n, &st);
        for (int l = 0; l < rows && !log && !st.normal; l++)
            far_row(out_dtype, out + l * w->out_stride, e[l], n,
                    (map_ref){LANE(st.value[0])[l], LANE(st.value[1])[l]});
        for (int l = 0; l < rows && st.special; l++)
            if (is_special(LANE(st.max)[l])) fill_row(out_dtype, out + l * w->out_stride, n, NAN);
        if (past) {
            real *const end = own + left + rows * n;
            write_lines(&waiting, waiting.n);
            waiting = whole_lines((real *)(w->out + r * w->out_stride) - left, own, end - own);
            const real *const rest = waiting.from + waiting.n;
            own = own == both[0] ? both[1] : both[0];
            left = end - rest;
            memcpy(own, rest, (size_t)(left * size));
        }
    }
    if (past) {
        write_lines(&waiting, waiting.n);
        memcpy((real *)(w->out + w->rows * w->out_stride) - left, own, (size_t)(left * size));
        store_fence();
    }
    return special;
}

static ptrdiff_t rows_all(fsm_op op, const fsm_rows *w) {
    if (w->rows >= 4 && w->n <= FSM_SHORT_ROW)
        return op == FSM_SOFTMAX ? rows_few(w) : rows_short(op, w);
    if (w->rows >= 4 && w->n <= (w->from_memory ? MIDDLE_FROM_MEMORY : MIDDLE_ROW))
        return rows_middle(op, w);
    return rows_long(op, w);
}

static void exp_array(void *out, const void *x, ptrdiff_t n) {
    const exp_vref r = exp_broadcast(exp_reference(0, EXP_RANGE));
    for (ptrdiff_t i = 0; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        store_as(REAL_DTYPE, out, i, k, exp_vec(load_as(REAL_DTYPE, x, i, k, v_set1(0)), r, 0, 0));
    }
}
