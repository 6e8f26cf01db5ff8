/* The table of kernels that each ISA exports, one set for each compute type: what the layers above
 * may ask of the mathematics.
 *
 * Every operation is three passes over a row, and a row may come in any number of pieces (tiles),
 * in any order:
 *     max    the reference: the largest logit (for a backward pass the largest |term|)
 *     sum    an exact integer sum (exp.inc.h): no piece, order or width of vector can change a bit
 *     map    the result, element by element
 * Between them `reference` and `finish` turn what was gathered into the constants of the next pass.
 * fsm_state carries it.
 *
 * A state has lanes. lanes == 1: one row, its elements contiguous in the tile, vectors run along
 * the row. lanes > 1: that many rows side by side, element i of row l at [i * lanes + l], vectors
 * run across the rows. lanes is then a multiple of FSM_LANE_QUANTUM (columns.inc.h and
 * rows.inc.h: of VL). */
#ifndef FSM_KERNELS_H
#define FSM_KERNELS_H

#include "fastsoftmax.h"

enum {
    FSM_LANES = 64,        /* rows side by side at the most */
    FSM_LANE_QUANTUM = 16, /* the widest vector of any ISA, in float32 */
    FSM_BLOCK = 1024,    /* elements of a block of longer rows, which stays in the nearest cache */
    FSM_SHORT_ROW = 32,  /* rows up to this long are transposed, so that lanes are rows */
    FSM_LAG_MOST = 2048, /* elements of a row of which four are at work at a time (rows_long) */
    FSM_COLUMNS_AHEAD = 12, /* elements of a column between asking for one and reading it */
    FSM_ASK_MOST = 1 << 16, /* elements of a row that is asked for while another is done: as many
                             * results are to stay in the second-level cache beside it */
    FSM_ALIGN = 64
};

/* Rows between the one whose maximum is taken and the one whose results are written (rows_long). */
static inline int row_lag(ptrdiff_t n) { return n <= FSM_LAG_MOST ? 3 : 1; }

/* Rows whose exp lie in scratch at a time; past the caches one more, which is written from while
 * another is made (writes_in_sum). */
static inline int exps_kept(ptrdiff_t n, int nontemporal) {
    return 1 + row_lag(n) / 2 + (nontemporal && n <= FSM_ASK_MOST);
}

_Static_assert(FSM_LANES *FSM_SHORT_ROW <= 2 * FSM_BLOCK, "short rows, all lanes of them, fit");

/* Elements of z (fsm_fuse): of as many rows as any kernel has at work at a time. Of rows of up to 32
 * vectors these are two blocks, or as many as a vector has elements (rows_middle). */
static inline ptrdiff_t fused_kept(ptrdiff_t n) {
    const ptrdiff_t rows = n <= 32 * FSM_LANE_QUANTUM ? FSM_LANE_QUANTUM : row_lag(n) + 1;
    return rows * n > 2 * FSM_BLOCK ? rows * n : 2 * FSM_BLOCK;
}

static inline ptrdiff_t up_to_multiple(ptrdiff_t a, ptrdiff_t of) { return (a + of - 1) / of * of; }

/* Part of the scratch at `at`, of which `used` bytes are taken; `at` may be NULL, to learn the size. */
static inline void *part_of(char *at, ptrdiff_t *used, ptrdiff_t bytes) {
    void *part = (void *)((uintptr_t)at + (uintptr_t)*used);
    *used += up_to_multiple(bytes, FSM_ALIGN);
    return part;
}
#define FSM_TAKE(type, count) ((type *)part_of(at, &used, (ptrdiff_t)sizeof(type) * (count)))

/* Bytes of an element of a floating type. */
static inline ptrdiff_t float_size(fsm_dtype dtype) {
    return dtype == FSM_F64 ? 8 : dtype == FSM_F32 ? 4 : 2;
}

typedef union {
    float f32[FSM_LANES];
    double f64[FSM_LANES];
} fsm_lanes;

/* An exact sum: sum of parts[j] * 2^unit_j, see exp.inc.h. */
typedef struct {
    int64_t parts[FSM_PARTS][FSM_LANES];
} fsm_exact_sum;

typedef struct {
    int lanes;
    ptrdiff_t n;         /* length of the whole row: it decides how fine the sum is (exp.inc.h) */
    fsm_lanes max;       /* NaN: the row has a NaN */
    fsm_lanes min;       /* of logits: the smallest */
    fsm_lanes exponent;  /* weighted: the largest exponent of a term */
    fsm_lanes nonfinite; /* weighted, backward: the sum of the terms that are not finite, or 0 */
    fsm_lanes exp[5];    /* constants of exp (exp.inc.h); backward: of the scaling of the terms */
    fsm_exact_sum sum;
    fsm_lanes value[2]; /* constants of map; the results of a reduction */
    fsm_lanes label; /* cross entropy: the logit at the label; in the end, backward: its gradient */
    fsm_lanes grad;  /* cross entropy, backward: of the row's loss */
    int want_sign;   /* weighted: a negative sum is log|sum| and a sign of -1, else NaN */
    int normal;      /* as min: no exp is small, and |max| is moderate; or HOLES (exp.inc.h) */
    int holes;       /* min is of the finite logits, and there are others */
    int special;     /* of logits: lanes whose max is not finite; map leaves garbage there */
} fsm_state;

/* A piece of the rows of a state: n elements of each. x and out have a dtype of their own when
 * lanes == 1, else the compute type. */
typedef struct {
    ptrdiff_t n;
    const void *x;
    fsm_dtype x_dtype;
    const void *y; /* compute type, contiguous like x */
    void *e;       /* NULL, or out: where exp goes in sum and is read in map (compute type) */
    void *out;     /* may be x or y */
    fsm_dtype out_dtype;
    const void *scale; /* backward: 1/temperature per lane, compute type */
} fsm_tile;

typedef struct {
    void (*max)(fsm_state *, const fsm_tile *);
    void (*max2)(fsm_state *,
                 const fsm_tile *); /* NULL but for weighted sums: the largest exponent of a term */
    void (*reference)(fsm_state *);
    void (*sum)(fsm_state *, const fsm_tile *);
    void (*finish)(fsm_state *);
    void (*map)(const fsm_state *, const fsm_tile *); /* NULL for reductions */
} fsm_passes;

/* A strided run of elements with what is fused into reading them: z = fma(x, scale, bias), or
 * `excluded`. */
typedef struct {
    const char *x, *bias, *where, *scale; /* NULL = absent */
    ptrdiff_t x_stride, bias_stride, where_stride, scale_stride;
    fsm_dtype x_dtype, bias_dtype; /* scale has the compute type */
    double excluded;               /* what an entry becomes that takes no part */
} fsm_run;

/* What is fused into reading whole rows: z = fma(x, scale, additive), -inf where additive is. */
typedef struct {
    const char *scale; /* one a row, compute type; NULL = 1 */
    ptrdiff_t scale_stride;
    const char *additive; /* compute type; -0 where nothing is added */
    ptrdiff_t additive_stride;
    void *z; /* fused_kept elements of the compute type: the rows at work */
} fsm_fuse;

/* Whole rows, contiguous: x[r * x_stride + i], strides in bytes. */
typedef struct {
    const char *x;
    char *out;
    ptrdiff_t x_stride, out_stride, rows, n;
    fsm_dtype x_dtype, out_dtype;
    /* Where exp goes if out has another type, or is not to be read (nontemporal): exps_kept
     * rows of the compute type. May be NULL but for the latter, and exp is computed twice. */
    void *scratch;
    int from_memory; /* there are more of them than a last-level cache holds */
    /* The results are to go past the caches; they have the compute type, and its alignment. */
    int nontemporal;
    const fsm_fuse *fuse; /* NULL: nothing is */
} fsm_rows;

/* An operand of attention at one leading index and one KV head: its first element, NULL if it is
 * absent, and its strides in bytes from head to head of those that share the KV head, from row to
 * row (queries or keys) and from column to column. */
typedef struct {
    char *at;
    ptrdiff_t head, row, column;
} fsm_matrix;

/* Attention for one leading index and one KV head: `heads` times `queries` rows, row r being query
 * r % queries of head r / queries. */
typedef struct {
    const struct fsm_products *products; /* NULL: those of the kernels */
    fsm_dtype dtype, bias_dtype;         /* dtype: of q, k, v, out, weights and grad_out */
    fsm_matrix q, k, v, mask, bias, sinks, slopes, out, lse, weights;
    fsm_matrix grad_out, dq, dk, dv, dbias, dsinks; /* backward; all but the first are added to */
    ptrdiff_t heads, queries, keys, depth, v_depth;
    double scale, softcap;
    int causal;
    ptrdiff_t left, right, offset, length;
    ptrdiff_t begin, end;         /* the rows to do */
    ptrdiff_t key_begin, key_end; /* backward: and the keys; multiples of FSM_ATTEND_KEYS, or all */
    char *scratch; /* of attend_scratch, decode_scratch or gradient_scratch bytes, FSM_ALIGNed */
} fsm_attend;

enum {
    FSM_ATTEND_KEYS = 64,  /* keys of a block */
    FSM_PRODUCT_KEYS = 32, /* keys that a step of fsm_products adds up in an order of its own */
    FSM_ATTEND_GROUPS = 4, /* groups of rows that share the reading of a block, at the most */
    FSM_DECODE_KEYS = 128, /* keys of a block where there is one query */
    FSM_DECODE_AHEAD = 32, /* keys between asking for one and reading it */
    FSM_DECODE_HEADS = 16  /* heads that share the reading of it, at the most */
};

/* Up to FSM_LANES rows side by side, nothing fused: element i of row l is at x + i * x_step plus l
 * elements; logsumexp: the results are contiguous. */
typedef struct {
    const char *x;
    char *out;
    ptrdiff_t x_step, out_step, n;
    int rows;
    fsm_dtype x_dtype, out_dtype;
    void *
        tile; /* n elements of the compute type for each row, their number rounded up to a quantum */
} fsm_columns;

typedef struct {
    fsm_passes passes[FSM_OP_COUNT];
    /* softmax, log_softmax, logsumexp; returns the number of rows without a finite maximum */
    ptrdiff_t (*rows)(fsm_op, const fsm_rows *);
    void (*columns)(fsm_op, const fsm_columns *); /* the same operations */
    void (*begin)(fsm_state *, int lanes, ptrdiff_t n);
    void (*merge)(fsm_state *into, const fsm_state *from);
    void (*load)(void *z, const fsm_run *, ptrdiff_t n);
    void (*load_special)(void *z, const fsm_run *, ptrdiff_t n,
                         double excluded); /* NaN if it takes part, else `excluded` */
    void (*store)(char *out, ptrdiff_t stride, fsm_dtype dtype, const void *y, ptrdiff_t n);
    void (*exp)(void *out, const void *x, ptrdiff_t n); /* x <= 0; for tests */
    double (*fma)(ptrdiff_t count);                     /* for benchmarks */

    /* Attention. One row a lane, attend_rows of them a group. */
    int attend_rows;
    ptrdiff_t (*attend_scratch)(ptrdiff_t depth, ptrdiff_t v_depth);
    void (*attend)(const fsm_attend *);
    /* Its backward pass, of FSM_ATTEND_GROUPS groups at the most. */
    ptrdiff_t (*gradient_scratch)(ptrdiff_t depth, ptrdiff_t v_depth);
    void (*gradient)(const fsm_attend *);
    /* One query: all heads over the keys [first, last) into `part`, of decode_part elements; then
     * the parts, in order, into the results. */
    ptrdiff_t (*decode_scratch)(ptrdiff_t depth, ptrdiff_t v_depth, ptrdiff_t heads);
    ptrdiff_t (*decode_part)(ptrdiff_t v_depth, ptrdiff_t heads);
    void (*decode)(const fsm_attend *, ptrdiff_t first, ptrdiff_t last, void *part);
    void (*decode_end)(const fsm_attend *, void *parts, ptrdiff_t count);
    /* One row of merge_attention: out = the weighted mean of a and b, each at its lse. */
    void (*merge_row)(const fsm_matrix operand[FSM_MERGE_COUNT], const fsm_dtype dtype[],
                      ptrdiff_t columns);
} fsm_kernels;

/* The two matrix products of `attend` for bfloat16, where a CPU has instructions for them: of a unit,
 * block by block of keys. s, p and o lie as attention.inc.h says. */
typedef struct fsm_products {
    ptrdiff_t (*scratch)(ptrdiff_t depth, ptrdiff_t v_depth);
    void *(*begin)(char *scratch, const fsm_attend *);
    void (*queries)(void *, int group, int vectors, const void *q);
    void (*block)(void *, ptrdiff_t first, ptrdiff_t n);
    void (*scores)(void *, int group, int vectors, void *s);
    /* o = o alpha + V^T p, without the values that are not finite; whether there were any */
    int (*mix)(void *, int vectors, const void *p, const void *alpha, void *o);
    void (*end)(void *);
} fsm_products;

struct fsm_isa {
    const char *name;
    const fsm_kernels *f32, *f64;
    const fsm_products *bf16; /* NULL: those of f32 */
};

extern const fsm_isa fsm_isa_scalar, fsm_isa_avx2, fsm_isa_avx512, fsm_isa_amx, fsm_isa_neon;
extern const fsm_products fsm_products_amx; /* isa_amx.c */

#endif
