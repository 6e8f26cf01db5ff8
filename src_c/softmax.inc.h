/* The passes of the softmax family (kernels.h), written once, for FSM_TYPE and the vectors of one
 * ISA.
 *
 * Two shapes of each pass: row_*, vectors along one row, and lane_*, vectors across rows. What an
 * element becomes is the same inline function in both, and the sums are exact, so both give the
 * same bits. */

#define max_pass FSM_NAME(max_pass)
#define lane_span FSM_NAME(lane_span)
#define lane_suspects FSM_NAME(lane_suspects)
#define running_max FSM_NAME(running_max)
#define max_begin FSM_NAME(max_begin)
#define max_add FSM_NAME(max_add)
#define max_tail FSM_NAME(max_tail)
#define max_end FSM_NAME(max_end)
#define span FSM_NAME(span)
#define has_nan FSM_NAME(has_nan)
#define has_nan_as FSM_NAME(has_nan_as)
#define finite_min FSM_NAME(finite_min)
#define finite_min_as FSM_NAME(finite_min_as)
#define row_span FSM_NAME(row_span)
#define row_span_as FSM_NAME(row_span_as)
#define exp_step FSM_NAME(exp_step)
#define exp_steps FSM_NAME(exp_steps)
#define exp_run FSM_NAME(exp_run)
#define exp_run_as FSM_NAME(exp_run_as)
#define run_sum FSM_NAME(run_sum)
#define run_fold FSM_NAME(run_fold)
#define run_vsum FSM_NAME(run_vsum)
#define row_sum FSM_NAME(row_sum)
#define row_vsum FSM_NAME(row_vsum)
#define row_map FSM_NAME(row_map)
#define row_map_as FSM_NAME(row_map_as)
#define row_map_to FSM_NAME(row_map_to)
#define exp_map FSM_NAME(exp_map)
#define lane_sum FSM_NAME(lane_sum)
#define exp_ahead FSM_NAME(exp_ahead)
#define exp_look FSM_NAME(exp_look)
#define exp_sum FSM_NAME(exp_sum)
#define ready FSM_NAME(ready)
#define write_as FSM_NAME(write_as)
#define write_ready FSM_NAME(write_ready)
#define exp_sum_as FSM_NAME(exp_sum_as)
#define lane_sum_as FSM_NAME(lane_sum_as)
#define lane_map FSM_NAME(lane_map)
#define map_ref FSM_NAME(map_ref)
#define map_vref FSM_NAME(map_vref)
#define map_vec FSM_NAME(map_vec)
#define normaliser FSM_NAME(normaliser)
#define lane_fold FSM_NAME(lane_fold)
#define lanes_of FSM_NAME(lanes_of)
#define row_ref FSM_NAME(row_ref)
#define span_reference FSM_NAME(span_reference)
#define row_constants FSM_NAME(row_constants)
#define is_special FSM_NAME(is_special)
#define set_ref FSM_NAME(set_ref)
#define exp_references FSM_NAME(exp_references)
#define reference_pass FSM_NAME(reference_pass)
#define sum_pass FSM_NAME(sum_pass)
#define finish_softmax FSM_NAME(finish_softmax)
#define finish_log_softmax FSM_NAME(finish_log_softmax)
#define finish_logsumexp FSM_NAME(finish_logsumexp)
#define map_e FSM_NAME(map_e)
#define map_softmax FSM_NAME(map_softmax)
#define map_loss FSM_NAME(map_loss)
#define map_far FSM_NAME(map_far)
#define far_run FSM_NAME(far_run)
#define far_row FSM_NAME(far_row)
#define far_lanes FSM_NAME(far_lanes)
#define lane_exp FSM_NAME(lane_exp)
#define map_log_softmax FSM_NAME(map_log_softmax)
#define begin_state FSM_NAME(begin_state)
#define merge_state FSM_NAME(merge_state)

/* ---- max ---- */

/* The largest and the smallest element, of a row with a finite maximum the smallest finite one; holes:
 * it has others, -inf. Only max is NaN where one is NaN. */
typedef struct {
    real max, min;
    int holes;
} span;

/* Whether a row has no finite maximum. */
FSM_INLINE int is_special(real max) { return max - max != 0; }

/* A running sum carries NaN past v_max; done by the multipliers, which are idle here, it costs no
 * time. It is a suspicion only (inf - inf is NaN too), so the row is then looked at again. The maximum is never
 * -0, so that rows that differ in the sign of a zero maximum agree. */
typedef struct {
    vec max[2], min[2], sum[4];
} running_max;

FSM_INLINE running_max max_begin(void) {
    const vec least = v_set1(-INFINITY), most = v_set1(INFINITY), zero = v_set1(0);
    return (running_max){{least, least}, {most, most}, {zero, zero, zero, zero}};
}

FSM_INLINE void max_add(running_max *r, int j, vec a) {
    r->max[j & 1] = v_max(a, r->max[j & 1]);
    r->min[j & 1] = v_min(a, r->min[j & 1]);
    r->sum[j] = v_add_m(a, r->sum[j]);
}

/* Elements of a row from i on, fewer than VL: where there are VL in front of the end they are taken,
 * some of them a second time, which changes no extremum. */
FSM_INLINE void max_tail(running_max *r, fsm_dtype dtype, const void *x, ptrdiff_t i, ptrdiff_t n) {
    if (i == n) return;
    if (n >= VL) max_add(r, 0, load_as(dtype, x, n - VL, VL, v_set1(0)));
    else {
        const vec a = load_as(dtype, x, 0, n, v_set1(0)); /* repeats the first one past the end */
        real first[VL];
        v_store(first, a);
        max_add(r, 0, load_as(dtype, x, 0, n, v_set1(first[0])));
    }
}

/* The smallest finite element of some rows: a + a * 0 is NaN of an infinite a, which v_min passes
 * over. */
FSM_INLINE real finite_min_as(fsm_dtype dtype, const char *x, ptrdiff_t stride, ptrdiff_t rows,
                              ptrdiff_t n) {
    const vec zero = v_set1(0), most = v_set1(INFINITY);
    vec least = most, other = most;
    for (ptrdiff_t r = 0; r < rows; r++, x += stride) {
        ptrdiff_t i = 0;
        for (; i + 2 * VL <= n; i += 2 * VL) {
            const vec a = load_as(dtype, x, i, VL, most), b = load_as(dtype, x, i + VL, VL, most);
            least = v_min(v_fma(a, zero, a), least);
            other = v_min(v_fma(b, zero, b), other);
        }
        for (; i < n; i += VL) {
            const vec a = load_as(dtype, x, i, n - i < VL ? n - i : VL, most);
            least = v_min(v_fma(a, zero, a), least);
        }
    }
    return -v_hmax(v_sub(zero, v_min(least, other)));
}

FSM_APART real finite_min(fsm_dtype dtype, const void *x, ptrdiff_t stride, ptrdiff_t rows,
                          ptrdiff_t n) {
#define CALL(DTYPE) return finite_min_as(DTYPE, x, stride, rows, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_INLINE int has_nan_as(fsm_dtype dtype, const void *x, ptrdiff_t n) {
    const vec zero = v_set1(0), one = v_set1(1);
    vec any = zero;
    for (ptrdiff_t i = 0; i < n; i += VL) {
        const vec a = load_as(dtype, x, i, n - i < VL ? n - i : VL, zero);
        any = v_max(v_unless(a, a, one), any);
    }
    return v_hmax(any) > 0;
}

FSM_APART int has_nan(fsm_dtype dtype, const void *x, ptrdiff_t n) {
#define CALL(DTYPE) return has_nan_as(DTYPE, x, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_INLINE span max_end(const running_max *r, fsm_dtype dtype, const void *x, ptrdiff_t n) {
    const vec zero = v_set1(0), least = v_min(r->min[0], r->min[1]);
    const real total = v_hsum(v_add(v_add(r->sum[0], r->sum[1]), v_add(r->sum[2], r->sum[3])));
    span s = {v_hmax(v_max(r->max[0], r->max[1])) + 0, -v_hmax(v_sub(zero, least)), 0};
    if (total != total && has_nan(dtype, x, n)) s.max = NAN;
    s.holes = s.min == -INFINITY && !is_special(s.max);
    if (s.holes) s.min = finite_min(dtype, x, 0, 1, n);
    return s;
}

FSM_INLINE span row_span_as(fsm_dtype dtype, const void *x, ptrdiff_t n) {
    running_max m = max_begin();
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) max_add(&m, j, load_as(dtype, x, i + j * VL, VL, v_set1(0)));
    for (; i + VL <= n; i += VL) max_add(&m, 0, load_as(dtype, x, i, VL, v_set1(0)));
    max_tail(&m, dtype, x, i, n);
    return max_end(&m, dtype, x, n);
}

FSM_APART span row_span(fsm_dtype dtype, const void *x, ptrdiff_t n) {
#define CALL(DTYPE) return row_span_as(DTYPE, x, n)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* The suspects of VL lanes, looked at again. */
static void lane_suspects(real *max, int lanes, const real *x, ptrdiff_t n, vec s) {
    real suspect[VL];
    v_store(suspect, s);
    for (int l = 0; l < VL; l++)
        if (suspect[l] != suspect[l])
            for (ptrdiff_t i = 0; i < n; i++)
                if (x[i * lanes + l] != x[i * lanes + l]) max[l] = NAN;
}

static void lane_span(real *max, real *min, int lanes, const real *x, ptrdiff_t n) {
    for (int g = 0; g < lanes; g += VL) {
        vec m = v_load(max + g), low = v_load(min + g), s = v_set1(0);
        for (ptrdiff_t i = 0; i < n; i++) {
            const vec a = v_load(x + i * lanes + g);
            m = v_max(a, m);
            low = v_min(a, low);
            s = v_add_m(a, s);
        }
        v_store(max + g, v_add(m, v_set1(0)));
        v_store(min + g, low);
        lane_suspects(max + g, lanes, x + g, n, s);
    }
}

/* The constants of exp of a lane. */
FSM_INLINE exp_ref row_ref(const fsm_state *st, int l) {
    return (exp_ref){LANE(st->exp[0])[l], LANE(st->exp[1])[l], LANE(st->exp[2])[l],
                     LANE(st->exp[3])[l], LANE(st->exp[4])[l]};
}

/* ---- the map of an element ---- */

/* softmax: y = e (a + b), a + b = 1/sum: one rounding more than ideal. log_softmax: y = (x - a) -
 * b, a = max, b = log(sum exp(x - max)). */
typedef struct {
    real a, b;
} map_ref;
typedef struct {
    vec a, b;
} map_vref;

FSM_INLINE vec map_vec(int log, vec x_or_e, map_vref r) {
    if (log) return v_sub(v_sub(x_or_e, r.a), r.b);
    return v_fma(x_or_e, r.a, v_mul(x_or_e, r.b));
}

/* ---- sum of exp ----
 *
 * In two loops, exp and sum, over a block in the nearest cache: together they would need more
 * constants than there are registers, and reading these again for each vector is what such a loop is
 * then bound by (AVX2: 3.2 ns for 8 elements, apart 2.6). In one where registers abound (exp_sum).
 *
 * Meanwhile the next row can be asked for, into the second-level cache: exp leaves the memory idle. */

/* exp of one vector of a normal row, whose power of two is known already; returns that of the next.
 * That takes 7 cycles out of a chain of 39, and with it some of the wait for a place in the
 * scheduler (Zen 3: 2.1 -> 1.95 ns). To hand on more than one number wants registers that AVX2 does
 * not have. */
FSM_INLINE vec exp_step(real *to, const real *from, const real *next, vec power, exp_vref ref) {
    const vec next_power = exp_power(v_load(next), ref);
    v_store(to, exp_end(exp_split(v_load(from), power, ref), 1));
    return next_power;
}

/* exp of `count` vectors of a row (or of VL of them), `step` and `to_step` elements apart; to == from
 * is fine. As many bytes from `ask` on, if it is not NULL, are asked for; the row is then normal and
 * the steps are VL. */
FSM_INLINE void exp_steps(real *to, ptrdiff_t to_step, const real *from, ptrdiff_t step,
                          ptrdiff_t count, exp_vref ref, int shift, int normal, const char *ask) {
    if (REGISTERS >= 32 || !normal) {
        FSM_UNROLL(2)
        for (ptrdiff_t i = 0; i < count; i++)
            v_store(to + i * to_step, exp_vec(v_load(from + i * step), ref, shift, normal));
        return;
    }
    if (count < 1) return;
    vec power = exp_power(v_load(from), ref);
    ptrdiff_t i = 0;
    for (; ask && i + LINE / VL < count; i += LINE / VL) {
        FSM_PREFETCH(ask + i * VL * (ptrdiff_t)sizeof(real));
        FSM_UNROLL(8)
        for (ptrdiff_t j = i; j < i + LINE / VL; j++)
            power = exp_step(to + j * to_step, from + j * step, from + (j + 1) * step, power, ref);
    }
    if (ask) FSM_PREFETCH(ask + i * VL * (ptrdiff_t)sizeof(real));
    FSM_UNROLL(2)
    for (; i < count - 1; i++)
        power = exp_step(to + i * to_step, from + i * step, from + (i + 1) * step, power, ref);
    v_store(to + i * to_step, exp_end(exp_split(v_load(from + i * step), power, ref), 1));
}

/* e = exp of a run; e == x is fine. As many bytes from `ask` on, if it is not NULL, are asked for.
 * Where registers abound (REGISTERS) one vector is begun while the one before is ended, in its
 * shadow. */
FSM_INLINE void exp_run_as(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref,
                           int shift, int normal, const char *ask) {
    const exp_vref r = exp_broadcast(ref);
    ptrdiff_t i = 0;
    if (REGISTERS >= 32 && n >= VL && normal) {
        exp_mid mid = exp_begin(load_as(dtype, x, 0, VL, v_set1(0)), r, shift, normal);
        FSM_UNROLL(4)
        for (i = VL; i + VL <= n; i += VL) {
            const exp_mid next = exp_begin(load_as(dtype, x, i, VL, v_set1(0)), r, shift, normal);
            if (ask) FSM_PREFETCH(ask + (i - VL) * (ptrdiff_t)sizeof(real));
            v_store(e + i - VL, exp_end(mid, normal));
            mid = next;
        }
        if (ask) FSM_PREFETCH(ask + (i - VL) * (ptrdiff_t)sizeof(real));
        v_store(e + i - VL, exp_end(mid, normal));
    }
    if (REGISTERS < 32 && dtype == REAL_DTYPE && !shift && normal == 1) {
        exp_steps(e, VL, x, VL, n / VL, r, 0, 1, ask);
        i = n / VL * VL;
    }
    FSM_UNROLL(2)
    for (; i + VL <= n; i += VL)
        v_store(e + i, exp_vec(load_as(dtype, x, i, VL, v_set1(0)), r, shift, normal));
    if (i < n)
        store_as(REAL_DTYPE, e, i, n - i,
                 exp_vec(load_as(dtype, x, i, n - i, v_set1(0)), r, shift, normal));
}

FSM_APART void exp_run(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref,
                       int normal, const char *ask) {
    /* Loops of their own would be worth less than their size. */
    if (normal != 1 && dtype != REAL_DTYPE) {
        widen(e, x, float_size(dtype), dtype, n);
        dtype = REAL_DTYPE;
        x = e;
    }
#define CALL(DTYPE)                                                                               \
    if (REGISTERS < 32 && ask && DTYPE == REAL_DTYPE) exp_run_as(DTYPE, e, x, n, ref, 0, 1, ask); \
    else exp_run_as(DTYPE, e, x, n, ref, 0, 1, NULL)
    if (!normal) exp_run_as(REAL_DTYPE, e, x, n, ref, 1, 0, NULL);
    else if (normal == HOLES) exp_run_as(REAL_DTYPE, e, x, n, ref, 0, HOLES, NULL);
    else SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* The vsum of a run of at most FOLD_EVERY vectors; lanes past the end add 0. */
FSM_INLINE vsum run_sum(const real *e, ptrdiff_t n, int normal, int fine) {
    vsum s = vsum_zero();
    ptrdiff_t i = 0;
    FSM_UNROLL(4)
    for (; i + VL <= n; i += VL) vsum_add(&s, v_load(e + i), 2, normal, fine);
    if (i < n) vsum_add(&s, v_load_n(e + i, n - i, v_set1(0)), 2, normal, fine);
    return s;
}

/* The same for those who need not have it in a loop of theirs. */
FSM_APART vsum run_vsum(const real *e, ptrdiff_t n, int normal) {
    return normal ? run_sum(e, n, 1, 0) : run_sum(e, n, 0, 0);
}

/* The vsum of a run of n elements into the sum of a row. */
FSM_INLINE void run_fold(fsm_exact_sum *sum, int lane, const vsum *s, ptrdiff_t n, int fine) {
    for (int j = 0; j < (fine ? 3 : 2); j++)
        sum_fold(sum, lane, j, v_sum_int(vsum_int(s, j, (n + VL - 1) / VL, 2)));
}

/* Both in one loop, of a normal row, where the registers hold the constants of both: the sum takes
 * the places of the processor that exp leaves free. It follows BEHIND vectors after it, through
 * memory, and the powers of two are computed AHEAD of it, because what waits for the end of a long
 * chain takes the places in the scheduler from those that are ready (exp_step). e == x is fine. */
#undef TOGETHER
#define TOGETHER (REGISTERS >= 32)

typedef struct {
    vec x, n;
} exp_ahead;

FSM_INLINE exp_ahead exp_look(fsm_dtype dtype, const void *x, ptrdiff_t i, exp_vref ref) {
    const vec a = load_as(dtype, x, i, VL, v_set1(0));
    return (exp_ahead){a, exp_power(a, ref)};
}

/* Results to be written past the caches in the meantime: n of them, which are whole lines, to `out`,
 * from e or with log from logits. Not to be copied: a vector read from where single numbers have
 * just been stored waits until all is. */
typedef struct {
    real *out;
    const real *from;
    ptrdiff_t n;
    map_ref map;
    int log;
} ready;

FSM_INLINE void write_as(int log, const ready *w, map_vref map, ptrdiff_t begin, ptrdiff_t end) {
    FSM_UNROLL(8)
    for (ptrdiff_t i = begin; i < end; i += VL)
        v_store_nt(w->out + i, map_vec(log, v_load(w->from + i), map));
}

FSM_INLINE void write_ready(const ready *w, map_vref map, ptrdiff_t begin, ptrdiff_t end) {
    if (w->log) write_as(1, w, map, begin, end);
    else write_as(0, w, map, begin, end);
}

/* Of `w`, if it is not NULL, as many as x has are written, from `at` on, GROUP vectors at a time:
 * alternating with stores of e they are slower (12.4 cycles a vector of a row in cache) than all at
 * once at the end (11.2); in groups (9.7) the memory takes them while exp goes on. `ask` is
 * then not NULL: to look would be a second copy of the loop. */
FSM_INLINE vsum exp_sum_as(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_vref r,
                           const char *ask, const ready *w, ptrdiff_t at) {
    enum { AHEAD = 3, BEHIND = 12, GROUP = 8 };
    const map_vref map = {v_set1(w ? w->map.a : 0), v_set1(w ? w->map.b : 0)};
    const ptrdiff_t count = n / VL, size = (ptrdiff_t)sizeof(real);
    const ptrdiff_t last = !w ? at : w->n - at < n ? w->n : at + n;
    vsum s = vsum_zero();
    ptrdiff_t i = 0, done = 0;
    if (count > AHEAD) {
        exp_ahead a = exp_look(dtype, x, 0, r), b = exp_look(dtype, x, VL, r),
                  c = exp_look(dtype, x, 2 * VL, r);
/* A macro, for in a structure (of a function of its own) they would not stay in registers. */
#define STEP()                                                                          \
    do {                                                                                \
        const exp_ahead d = exp_look(dtype, x, (i + AHEAD) * VL, r);                    \
        if (w || ask) FSM_PREFETCH(ask + i * VL * size);                                \
        const vec again = dtype == REAL_DTYPE ? v_load((const real *)x + i * VL) : a.x; \
        v_store(e + i * VL, exp_end(exp_split(again, a.n, r), 1));                      \
        if (i >= BEHIND) vsum_add(&s, v_load(e + (i - BEHIND) * VL), 2, 1, 0);          \
        a = b, b = c, c = d;                                                            \
    } while (0)
        for (; w && i + GROUP <= count - AHEAD && at + GROUP * VL <= last; at += GROUP * VL) {
            FSM_UNROLL(GROUP)
            for (const ptrdiff_t end = i + GROUP; i < end; i++) STEP();
            write_ready(w, map, at, at + GROUP * VL);
        }
        FSM_UNROLL(4)
        for (; i < count - AHEAD; i++) STEP();
#undef STEP
        done = i > BEHIND ? i - BEHIND : 0;
    }
    for (; i * VL < n; i++) {
        const ptrdiff_t k = n - i * VL < VL ? n - i * VL : VL;
        if (ask) FSM_PREFETCH(ask + i * VL * size);
        store_as(REAL_DTYPE, e, i * VL, k,
                 exp_vec(load_as(dtype, x, i * VL, k, v_set1(0)), r, 0, 1));
    }
    const vsum rest = run_vsum(e + done * VL, n - done * VL, 1);
    for (int j = 0; j < 2; j++) s.part[j] = v_add_int(s.part[j], rest.part[j]);
    if (w) write_ready(w, map, at, last);
    return s;
}

FSM_APART vsum exp_sum(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, const exp_vref *r,
                       const char *ask, const ready *w, ptrdiff_t at) {
    if (w && dtype == REAL_DTYPE) return exp_sum_as(REAL_DTYPE, e, x, n, *r, ask ? ask : x, w, at);
#define CALL(DTYPE) return exp_sum_as(DTYPE, e, x, n, *r, DTYPE == REAL_DTYPE ? ask : NULL, NULL, 0)
    SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

/* exp of a run of at most FOLD_EVERY vectors, to e, which may be x, or NULL for a block of its own;
 * returns the sum. `ask`, if it is not NULL, is the next row, asked for in the meantime; of `w`, if it
 * is not NULL, as many are written, from `at` on: of a normal row and with TOGETHER only. */
static vsum row_vsum(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref, int fine,
                     int normal, const char *ask, const ready *w, ptrdiff_t at) {
    real own[FSM_LAG_MOST];
    _Static_assert(FSM_BLOCK <= FSM_LAG_MOST, "own holds a step of row_sum, too");
    const exp_vref r = exp_broadcast(ref);
    if (!e) e = own;
    if (TOGETHER && normal == 1 && !fine) return exp_sum(dtype, e, x, n, &r, ask, w, at);
    exp_run(dtype, e, x, n, ref, normal, ask);
    return FSM_BITS == 32 && fine ? run_sum(e, n, 0, 1) : run_vsum(e, n, normal);
}

/* The same of a row of any length, the sum into that lane: in pieces that stay in the nearest cache
 * between exp and sum, if they are two loops. */
static void row_sum(fsm_dtype dtype, real *e, const void *x, ptrdiff_t n, exp_ref ref,
                    fsm_exact_sum *sum, int lane, int fine, int normal, const char *ask,
                    const ready *w) {
    const ptrdiff_t size = float_size(dtype), most = FOLD_EVERY * VL;
    const ptrdiff_t step = (TOGETHER && e) || most < FSM_BLOCK ? most : FSM_BLOCK;
    for (ptrdiff_t i = 0; i < n; i += step) {
        const ptrdiff_t k = n - i < step ? n - i : step;
        const vsum s = row_vsum(dtype, e ? e + i : NULL, (const char *)x + i * size, k, ref, fine,
                                normal, ask ? ask + i * size : NULL, w, i);
        run_fold(sum, lane, &s, k, fine);
    }
}

/* The integer lanes of a vsum into the sums of VL rows. */
FSM_INLINE void lane_fold(fsm_exact_sum *sum, int g, const vsum *s, ptrdiff_t adds, real base,
                          int fine) {
    for (int j = 0; j < (fine ? 3 : 2); j++) {
        bits_t count[VL];
        v_store_int(count, vsum_int(s, j, adds, base));
        for (int l = 0; l < VL; l++) sum_fold(sum, g + l, j, count[l]);
    }
}

/* `row_ref` of VL lanes. */
FSM_INLINE exp_vref lanes_of(const fsm_state *st, int g) {
    return (exp_vref){v_load(LANE(st->exp[0]) + g), v_load(LANE(st->exp[1]) + g),
                      v_load(LANE(st->exp[2]) + g), v_load(LANE(st->exp[3]) + g),
                      v_load(LANE(st->exp[4]) + g)};
}

/* Vectors of lanes are `group` elements apart, the elements of one `step`. Of a normal state with
 * TOGETHER the step is VL. */
FSM_INLINE void lane_sum_as(fsm_state *st, real *e, const real *x, ptrdiff_t n, int fine, int shift,
                            int normal, ptrdiff_t group, ptrdiff_t step) {
    real block[FOLD_EVERY * VL]; /* where exp goes without e */
    const ptrdiff_t to_step = e ? step : VL;
    for (int g = 0; g < st->lanes; g += VL) {
        const exp_vref r = lanes_of(st, g);
        for (ptrdiff_t i = 0, k; i < n; i += k) {
            k = n - i < FOLD_EVERY ? n - i : FOLD_EVERY;
            const ptrdiff_t at = g / VL * group + i * step;
            real *to = e ? e + at : block;
            vsum s = vsum_zero();
            if (TOGETHER && normal) s = exp_sum(REAL_DTYPE, to, x + at, k * VL, &r, NULL, NULL, 0);
            else {
                exp_steps(to, to_step, x + at, step, k, r, shift, normal, NULL);
                FSM_UNROLL(4)
                for (ptrdiff_t j = 0; j < k; j++)
                    vsum_add(&s, v_load(to + j * to_step), 2, normal, fine);
            }
            lane_fold(&st->sum, g, &s, k, 2, fine);
        }
    }
}

FSM_APART void lane_sum(fsm_state *st, real *e, const real *x, ptrdiff_t n, int fine,
                        ptrdiff_t group, ptrdiff_t step) {
    if (FSM_BITS == 32 && fine) lane_sum_as(st, e, x, n, 1, 1, 0, group, step);
    else if (st->normal && (!TOGETHER || step == VL))
        lane_sum_as(st, e, x, n, 0, 0, 1, group, step);
    else lane_sum_as(st, e, x, n, 0, 1, 0, group, step);
}

/* ---- map ---- */

/* 1/sum, to 2^-33 (2^-65), relative, or better: a smaller b is left out, for e b would be subnormal
 * (map_far). */
FSM_INLINE map_ref normaliser(const fsm_exact_sum *sum, int lane) {
    const pair s = sum_value(sum, lane);
    const double r = 1 / s.hi;
#if FSM_BITS == 32
    const float a = (float)r;
    const double b = r - a;
#else
    const double a = r, b = r * (fma(-r, s.hi, 1) - r * s.lo);
#endif
    return (map_ref){a, fabs(b) < r * LEAST_REST ? 0 : (real)b};
}

/* x -> out; x is e, of the compute type, or with log a logit. */
FSM_INLINE void row_map_as(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x,
                           ptrdiff_t n, int log, map_ref map) {
    const map_vref mr = {v_set1(map.a), v_set1(map.b)};
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int j = 0; j < 4; j++) {
            const vec a = load_as(dtype, x, i + j * VL, VL, v_set1(0));
            store_as(out_dtype, out, i + j * VL, VL, map_vec(log, a, mr));
        }
    for (; i < n; i += VL) {
        const ptrdiff_t k = n - i < VL ? n - i : VL;
        store_as(out_dtype, out, i, k, map_vec(log, load_as(dtype, x, i, k, v_set1(0)), mr));
    }
}

FSM_INLINE void row_map_to(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x,
                           ptrdiff_t n, int log, map_ref map) {
#define CALL(DTYPE) row_map_as(out_dtype, out, DTYPE, x, n, 1, map)
    if (!log) row_map_as(out_dtype, out, REAL_DTYPE, x, n, 0, map);
    else SWITCH_DTYPE(dtype, CALL);
#undef CALL
}

FSM_APART void row_map(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x, ptrdiff_t n,
                       int log, map_ref map) {
#define CALL(DTYPE) row_map_to(DTYPE, out, dtype, x, n, log, map)
    SWITCH_DTYPE(out_dtype, CALL);
#undef CALL
}

/* The map of e in a row that is not normal. Where e is so small that e b may be subnormal it is that of
 * e LIFT (exp_end); of other e it is the same, so rows that are not known to be normal may be done by
 * it, too. */
FSM_INLINE vec map_far(vec e, map_vref r) {
    const vec zero = v_set1(0), far = v_set1(FAR_BELOW), least = v_set1(LEAST_NORMAL),
              limit = v_set1(LEAST_NORMAL * LIFT), unit = v_set1(LIFTED_UNIT);
    const vec near = v_if_less(e, far, zero, e), y = v_fma(near, r.a, v_mul(near, r.b));
    if (!v_any_less(zero, v_if_less(e, far, e, zero))) return y;
    const vec units = to_units(v_if_less(e, least, e, zero)), some = v_if_less(e, least, zero, e);
    const vec lifted = v_fma(some, v_set1(LIFT), v_mul(units, unit));
    const vec high = v_fma(lifted, r.a, v_mul(lifted, r.b));
    const vec normal = v_mul(v_if_less(high, limit, zero, high), v_set1(1 / LIFT));
    const vec small = v_mul(v_if_less(high, limit, high, zero), v_set1(1 / LIFTED_UNIT));
    return v_if_less(e, far, v_if_less(high, limit, from_units(small), normal), y);
}

/* In place, n elements in vectors that are `step` elements apart. */
FSM_APART void far_run(real *e, ptrdiff_t step, ptrdiff_t n, map_vref map) {
    for (; n >= VL; n -= VL, e += step) v_store(e, map_far(v_load(e), map));
    if (n > 0) v_store_n(e, map_far(v_load_n(e, n, v_set1(0)), map), n);
}

/* Of a row, to out, which may be e. */
static void far_row(fsm_dtype out_dtype, void *out, real *e, ptrdiff_t n, map_ref map) {
    far_run(e, VL, n, (map_vref){v_set1(map.a), v_set1(map.b)});
    if (out != e) row_map(out_dtype, out, REAL_DTYPE, e, n, 1, (map_ref){0, 0});
}

/* The map of softmax where exp was not kept: it is computed again, in blocks. */
static void exp_map(fsm_dtype out_dtype, void *out, fsm_dtype dtype, const void *x, ptrdiff_t n,
                    exp_ref ref, int normal, int far, map_ref map) {
    real e[FSM_BLOCK];
    for (ptrdiff_t i = 0; i < n; i += FSM_BLOCK) {
        const ptrdiff_t k = n - i < FSM_BLOCK ? n - i : FSM_BLOCK;
        char *to = (char *)out + i * float_size(out_dtype);
        exp_run(dtype, e, (const char *)x + i * float_size(dtype), k, ref, normal, NULL);
        if (far) far_row(out_dtype, to, e, k, map);
        else row_map(out_dtype, to, REAL_DTYPE, e, k, 0, map);
    }
}

/* exp of lanes, where it was not kept. */
FSM_APART void lane_exp(const fsm_state *st, real *e, const real *x, ptrdiff_t n) {
    for (int g = 0; g < st->lanes; g += VL)
        exp_steps(e + g, st->lanes, x + g, st->lanes, n, lanes_of(st, g), 1, 0, NULL);
}

FSM_INLINE void lane_map(const fsm_state *st, real *out, const real *x, ptrdiff_t n, int log) {
    const int lanes = st->lanes;
    for (int g = 0; g < lanes; g += VL) {
        const map_vref map = {v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)};
        for (ptrdiff_t i = 0; i < n; i++)
            v_store(out + i * lanes + g, map_vec(log, v_load(x + i * lanes + g), map));
    }
}

/* In place; vectors of lanes are `group` elements apart, the elements of one `step`. */
static void far_lanes(const fsm_state *st, real *e, ptrdiff_t n, ptrdiff_t group, ptrdiff_t step) {
    for (int g = 0; g < st->lanes; g += VL)
        far_run(e + g / VL * group, step, n * VL,
                (map_vref){v_load(LANE(st->value[0]) + g), v_load(LANE(st->value[1]) + g)});
}

/* ---- the passes of the table ---- */

static void begin_state(fsm_state *st, int lanes, ptrdiff_t n) {
    st->lanes = lanes;
    st->n = n;
    st->holes = 0;
    for (int l = 0; l < lanes; l++) {
        LANE(st->max)[l] = -INFINITY;
        LANE(st->min)[l] = INFINITY;
        LANE(st->exponent)[l] = -INFINITY;
        LANE(st->nonfinite)[l] = 0;
    }
    for (int j = 0; j < 5; j++)
        for (int l = 0; l < lanes; l++) st->sum.parts[j][l] = 0;
}

static void merge_state(fsm_state *into, const fsm_state *from) {
    for (int l = 0; l < into->lanes; l++) {
        real a = LANE(into->max)[l], b = LANE(from->max)[l];
        LANE(into->max)[l] = a != a || b != b ? NAN : a > b ? a : b;
        if (LANE(from->min)[l] < LANE(into->min)[l]) LANE(into->min)[l] = LANE(from->min)[l];
        if (LANE(from->exponent)[l] > LANE(into->exponent)[l])
            LANE(into->exponent)[l] = LANE(from->exponent)[l];
        LANE(into->nonfinite)[l] += LANE(from->nonfinite)[l];
        for (int j = 0; j < 5; j++) into->sum.parts[j][l] += from->sum.parts[j][l];
    }
}

static void max_pass(fsm_state *st, const fsm_tile *t) {
    if (st->lanes == 1) {
        const span s = row_span(t->x_dtype, t->x, t->n);
        real *max = LANE(st->max), *min = LANE(st->min);
        *max = *max != *max || s.max != s.max ? NAN : *max > s.max ? *max : s.max;
        *min = s.holes ? -INFINITY : s.min < *min ? s.min : *min;
    } else lane_span(LANE(st->max), LANE(st->min), st->lanes, t->x, t->n);
}

FSM_INLINE void set_ref(fsm_state *st, int lane, exp_ref r) {
    LANE(st->exp[0])[lane] = r.c;
    LANE(st->exp[1])[lane] = r.lo;
    LANE(st->exp[2])[lane] = r.ml;
    LANE(st->exp[3])[lane] = r.q;
    LANE(st->exp[4])[lane] = r.rest;
}

/* exp_reference of VL maxima. */
FSM_INLINE exp_vref exp_references(vec m) {
    const vec c = v_if_less(v_abs(m), v_set1(EXP_BIG), v_set1(0), m), d = v_sub(m, c);
    const vec ml = v_mul(d, v_set1(LOG2E)), magic = v_set1(GRID_MAGIC);
    const vec q = v_sub(v_add(ml, magic), magic);
    return (exp_vref){c, v_sub(d, v_set1(EXP_RANGE)), ml, q, v_fms(q, v_set1(LN2_HI), d)};
}

/* Of one row; *normal as in fsm_state. A row without a finite maximum gets constants that do no
 * harm; what map writes there is replaced afterwards. */
FSM_INLINE exp_ref span_reference(span s, int *normal) {
    exp_ref r = exp_reference(is_special(s.max) ? 0 : s.max, EXP_RANGE);
    *normal = r.c == 0 && s.max - s.min < EXP_NORMAL;
    if (*normal && s.holes) {
        *normal = HOLES;
        r.lo = s.max - HOLE_RANGE;
    }
    return r;
}

static void reference_pass(fsm_state *st) {
    if (st->lanes == 1) {
        const span s = {LANE(st->max)[0], LANE(st->min)[0], st->holes};
        set_ref(st, 0, span_reference(s, &st->normal));
        st->special = is_special(s.max);
        return;
    }
    const vec zero = v_set1(0), one = v_set1(1);
    vec special = zero, far = zero;
    for (int l = 0; l < st->lanes; l += VL) {
        const vec m = v_load(LANE(st->max) + l), min = v_load(LANE(st->min) + l);
        const exp_vref r = exp_references(v_if_less(v_abs(m), v_set1(INFINITY), m, zero));
        v_store(LANE(st->exp[0]) + l, r.c);
        v_store(LANE(st->exp[1]) + l, r.lo);
        v_store(LANE(st->exp[2]) + l, r.ml);
        v_store(LANE(st->exp[3]) + l, r.q);
        v_store(LANE(st->exp[4]) + l, r.rest);
        special = v_add(special, v_if_less(v_abs(m), v_set1(INFINITY), zero, one));
        far = v_add(far, v_unless(r.c, zero, one));
        far = v_add(far, v_if_less(v_sub(m, min), v_set1(EXP_NORMAL), zero, one));
    }
    st->special = (int)v_hsum(special);
    st->normal = v_hsum(far) == 0;
    if (!st->normal || !st->holes) return;
    st->normal = HOLES;
    for (int l = 0; l < st->lanes; l += VL)
        v_store(LANE(st->exp[1]) + l, v_sub(v_load(LANE(st->max) + l), v_set1(HOLE_RANGE)));
}

static void sum_pass(fsm_state *st, const fsm_tile *t) {
    const int fine = st->n > EXACT_COARSE;
    if (st->lanes == 1)
        row_sum(t->x_dtype, t->e, t->x, t->n, row_ref(st, 0), &st->sum, 0, fine, st->normal, NULL,
                NULL);
    else lane_sum(st, t->e, t->x, t->n, fine, VL, st->lanes);
}

#if FSM_BITS == 32
/* `normaliser` of f64_VL sums. */
FSM_INLINE void store_normalisers(float *a, float *b, f64_vec sum) {
    const f64_vec r = f64_div(f64_set1(1), sum);
    f64_store_f32(a, r);
    const f64_vec rest = f64_sub(r, f64_load_f32(a)), least = f64_mul(r, f64_set1(f32_LEAST_REST));
    f64_store_f32(b, f64_if_less(f64_abs(rest), least, f64_set1(0), rest));
}
#endif

static void finish_softmax(fsm_state *st) {
    int l = 0;
#if FSM_BITS == 32 /* lanes at a time; the counts are below 2^51 */
    for (; st->n < (ptrdiff_t)1 << 28 && l + f64_VL <= st->lanes; l += f64_VL) {
        const f64_vec hi = f64_load_int(st->sum.parts[0] + l),
                      lo = f64_load_int(st->sum.parts[2] + l),
                      least = f64_load_int(st->sum.parts[4] + l);
        const f64_vec s =
            f64_fma(hi, f64_set1(0x1p-22),
                    f64_fma(lo, f64_set1(0x1p-44), f64_mul(least, f64_set1(0x1p-66))));
        store_normalisers(st->value[0].f32 + l, st->value[1].f32 + l, s);
    }
#endif
    for (; l < st->lanes; l++) {
        map_ref r = normaliser(&st->sum, l);
        LANE(st->value[0])[l] = r.a;
        LANE(st->value[1])[l] = r.b;
    }
}

/* What finish leaves in value[0] and value[1] of one row: softmax: of the normaliser. log_softmax:
 * max and log(sum exp(x - max)). logsumexp: their sum; a maximum that is not finite is the result. */
FSM_INLINE map_ref row_constants(fsm_op op, real max, fsm_exact_sum *sum, int lane) {
    if (op == FSM_SOFTMAX) return normaliser(sum, lane);
    const double log = log1p_ratio(sum_less_one(sum, lane));
    if (op == FSM_LOG_SOFTMAX) return (map_ref){max, (real)log};
    return (map_ref){is_special(max) ? max : (real)((double)max + log), 0};
}

static void finish_log_softmax(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++) {
        const map_ref r = row_constants(FSM_LOG_SOFTMAX, LANE(st->max)[l], &st->sum, l);
        LANE(st->value[0])[l] = r.a;
        LANE(st->value[1])[l] = r.b;
    }
}

static void finish_logsumexp(fsm_state *st) {
    for (int l = 0; l < st->lanes; l++)
        LANE(st->value[0])[l] = row_constants(FSM_LOGSUMEXP, LANE(st->max)[l], &st->sum, l).a;
}

static void map_e(const fsm_state *st, const fsm_tile *t, int far) {
    real *e = t->e, *out = t->out;
    if (st->lanes == 1) {
        exp_ref r = row_ref(st, 0);
        map_ref m = {LANE(st->value[0])[0], LANE(st->value[1])[0]};
        if (!e) exp_map(t->out_dtype, out, t->x_dtype, t->x, t->n, r, st->normal, far, m);
        else if (far) far_row(t->out_dtype, out, e, t->n, m);
        else row_map(t->out_dtype, out, REAL_DTYPE, e, t->n, 0, m);
        return;
    }
    if (!e) lane_exp(st, out, t->x, t->n);
    if (far) far_lanes(st, out, t->n, VL, st->lanes);
    else lane_map(st, out, out, t->n, 0);
}

static void map_softmax(const fsm_state *st, const fsm_tile *t) { map_e(st, t, !st->normal); }

/* Of e (a + b), which may be negative or large: they are g / sum (loss.inc.h). 0 times an infinite one is
 * a NaN with a sign. */
static void map_loss(const fsm_state *st, const fsm_tile *t) {
    const ptrdiff_t n = t->n * st->lanes;
    int odd = 0;
    map_e(st, t, 0);
    for (int l = 0; l < st->lanes; l++) odd |= is_special(LANE(st->value[0])[l]);
#define CANON(DTYPE)                                                                     \
    for (ptrdiff_t i = 0; odd && i < n; i += VL) {                                       \
        const ptrdiff_t k = n - i < VL ? n - i : VL;                                     \
        store_as(DTYPE, t->out, i, k, v_canon(load_as(DTYPE, t->out, i, k, v_set1(0)))); \
    }
    SWITCH_DTYPE(t->out_dtype, CANON);
#undef CANON
}

static void map_log_softmax(const fsm_state *st, const fsm_tile *t) {
    if (st->lanes == 1)
        row_map(t->out_dtype, t->out, t->x_dtype, t->x, t->n, 1,
                (map_ref){LANE(st->value[0])[0], LANE(st->value[1])[0]});
    else lane_map(st, t->out, t->x, t->n, 1);
}
