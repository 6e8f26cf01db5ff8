/* Reading any strided run of any dtype into contiguous FSM_TYPE, with scale, bias and where fused,
 * and writing one back. Plain C: the compiler vectorises the contiguous cases, and the strided ones
 * are bound by the loads. */

#define load_as FSM_NAME(load_as)
#define store_as FSM_NAME(store_as)
#define put FSM_NAME(put)
#define widen FSM_NAME(widen)
#define widen_f16 FSM_NAME(widen_f16)
#define load_run FSM_NAME(load_run)
#define special_run FSM_NAME(special_run)
#define store_run FSM_NAME(store_run)
#define LEAST FSM_NAME(LEAST)
#define LOAD_BLOCK 256

#undef LINE
#define LINE (FSM_ALIGN / (int)sizeof(real)) /* elements of a line of a cache */

#undef LANE
#undef REAL_DTYPE
#undef SWITCH_DTYPE
#if FSM_BITS == 32
#define LANE(member) member.f32
#define REAL_DTYPE FSM_F32
/* Makes the dtype a constant of what is inlined behind it. */
#define SWITCH_DTYPE(dtype, call)         \
    switch (dtype) {                      \
    case FSM_F16: call(FSM_F16); break;   \
    case FSM_BF16: call(FSM_BF16); break; \
    default: call(FSM_F32); break;        \
    }
#else
#define LANE(member) member.f64
#define REAL_DTYPE FSM_F64
#define SWITCH_DTYPE(dtype, call) \
    {                             \
        (void)(dtype);            \
        call(FSM_F64);            \
    }
#endif

/* Element i of an array of that dtype, VL of them, or the first n < VL. */
FSM_INLINE vec load_as(fsm_dtype dtype, const void *p, ptrdiff_t i, ptrdiff_t n, vec fill) {
#if FSM_BITS == 32
    if (dtype == FSM_F16)
        return n < VL ? f16_load_n((const uint16_t *)p + i, n, fill)
                      : f16_load((const uint16_t *)p + i);
    if (dtype == FSM_BF16)
        return n < VL ? bf16_load_n((const uint16_t *)p + i, n, fill)
                      : bf16_load((const uint16_t *)p + i);
#else
    (void)dtype;
#endif
    return n < VL ? v_load_n((const real *)p + i, n, fill) : v_load((const real *)p + i);
}

FSM_INLINE void store_as(fsm_dtype dtype, void *p, ptrdiff_t i, ptrdiff_t n, vec a) {
#if FSM_BITS == 32
    if (dtype == FSM_F16) {
        if (n < VL) f16_store_n((uint16_t *)p + i, a, n);
        else f16_store((uint16_t *)p + i, a);
        return;
    }
    if (dtype == FSM_BF16) {
        if (n < VL) bf16_store_n((uint16_t *)p + i, a, n);
        else bf16_store((uint16_t *)p + i, a);
        return;
    }
#else
    (void)dtype;
#endif
    if (n < VL) v_store_n((real *)p + i, a, n);
    else v_store((real *)p + i, a);
}

/* to[i] = a. The copy through memcpy, as the one below, is plain; it is there because x and to (of
 * exp_run) may have any alignment. */
FSM_INLINE void put(void *to, ptrdiff_t i, real a) {
    memcpy((char *)to + i * (ptrdiff_t)sizeof a, &a, sizeof a);
}

/* to[i] = (real)x[i]. */
#undef WIDEN_LOOP
#define WIDEN_LOOP(TYPE, CONVERT)             \
    for (ptrdiff_t i = 0; i < n; i++) {       \
        TYPE a;                               \
        memcpy(&a, x + i * stride, sizeof a); \
        put(to, i, (real)CONVERT(a));         \
    }
#undef WIDEN
#define WIDEN(DTYPE, TYPE, CONVERT)                \
    case DTYPE:                                    \
        if (stride == (ptrdiff_t)sizeof(TYPE)) {   \
            const ptrdiff_t stride = sizeof(TYPE); \
            WIDEN_LOOP(TYPE, CONVERT)              \
        } else WIDEN_LOOP(TYPE, CONVERT)           \
        break;

/* Elements [i, i + k): one conversion for a vector of them. */
FSM_INLINE void widen_f16(void *to, const char *x, ptrdiff_t stride, ptrdiff_t i, ptrdiff_t k) {
    uint16_t half[f32_VL] = {0};
    float lane[f32_VL];
    if (stride == 2) memcpy(half, x + 2 * i, 2 * (size_t)k);
    else
        for (ptrdiff_t l = 0; l < k; l++) memcpy(half + l, x + (i + l) * stride, 2);
    f32_store(lane, f16_load(half));
    for (ptrdiff_t l = 0; l < k; l++) put(to, i + l, lane[l]);
}

static void widen(void *to, const char *x, ptrdiff_t stride, fsm_dtype dtype, ptrdiff_t n) {
    switch ((int)dtype) { /* no enum: to float32 there are no integers */
    case FSM_F16: {
        ptrdiff_t i = 0;
        for (; i + f32_VL <= n; i += f32_VL) widen_f16(to, x, stride, i, f32_VL);
        widen_f16(to, x, stride, i, n - i);
        break;
    }
        WIDEN(FSM_BF16, uint16_t, bf16_to_f32)
        WIDEN(FSM_F32, float, )
        WIDEN(FSM_F64, double, )
#if FSM_BITS == 64 /* integers are float64 to us */
        WIDEN(FSM_I8, int8_t, )
        WIDEN(FSM_I16, int16_t, )
        WIDEN(FSM_I32, int32_t, )
        WIDEN(FSM_I64, int64_t, )
        WIDEN(FSM_U8, uint8_t, )
        WIDEN(FSM_U16, uint16_t, )
        WIDEN(FSM_U32, uint32_t, )
        WIDEN(FSM_U64, uint64_t, )
#endif
    }
}

/* excluded where the entry takes no part, else z. An entry whose bias is -inf takes no part,
 * whatever x is: inf - inf must not get in. */
static void load_run(void *out, const fsm_run *run, ptrdiff_t n) {
    const real excluded = (real)run->excluded;
    for (ptrdiff_t start = 0; start < n;
         start += LOAD_BLOCK) { /* blocks, so that the steps meet in the nearest cache */
        const ptrdiff_t k = n - start < LOAD_BLOCK ? n - start : LOAD_BLOCK;
        real *z = (real *)out + start, bias[LOAD_BLOCK], scale[LOAD_BLOCK];
        widen(z, run->x + start * run->x_stride, run->x_stride, run->x_dtype,
              run->x_stride ? k : 1);
        for (ptrdiff_t i = 1; i < k && !run->x_stride; i++) z[i] = z[0];
        if (run->scale || run->bias) {
            if (run->scale)
                widen(scale, run->scale + start * run->scale_stride, run->scale_stride, REAL_DTYPE,
                      k);
            else
                for (ptrdiff_t i = 0; i < k; i++) scale[i] = 1;
            if (run->bias) {
                widen(bias, run->bias + start * run->bias_stride, run->bias_stride, run->bias_dtype,
                      k);
                ptrdiff_t i = 0;
                for (; i + VL <= k; i += VL)
                    v_store(z + i, v_fma(v_load(z + i), v_load(scale + i), v_load(bias + i)));
                if (i < k) {
                    vec zero = v_set1(0), a = v_load_n(z + i, k - i, zero),
                        s = v_load_n(scale + i, k - i, zero);
                    v_store_n(z + i, v_fma(a, s, v_load_n(bias + i, k - i, zero)), k - i);
                }
                for (i = 0; i < k; i++) z[i] = bias[i] == -INFINITY ? excluded : z[i];
            } else
                for (ptrdiff_t i = 0; i < k; i++) z[i] *= scale[i];
        }
        if (run->where) {
            const char *where = run->where + start * run->where_stride;
            const ptrdiff_t stride = run->where_stride;
            if (stride == 1)
                for (ptrdiff_t i = 0; i < k; i++) z[i] = where[i] ? z[i] : excluded;
            else
                for (ptrdiff_t i = 0; i < k; i++) z[i] = where[i * stride] ? z[i] : excluded;
        }
    }
}

/* A row without a finite maximum: NaN where it takes part, else excluded. */
static void special_run(void *out, const fsm_run *run, ptrdiff_t n, double excluded) {
    real *z = out;
    for (ptrdiff_t i = 0; i < n; i++) {
        real bias = 0;
        if (run->bias) widen(&bias, run->bias + i * run->bias_stride, 0, run->bias_dtype, 1);
        int takes_part = bias != -INFINITY && (!run->where || run->where[i * run->where_stride]);
        z[i] = takes_part ? (real)NAN : (real)excluded;
    }
}

/* The one rounding to the result's type. */
static void store_run(char *out, ptrdiff_t stride, fsm_dtype dtype, const void *y, ptrdiff_t n) {
    const real *a = y;
#if FSM_BITS == 32
    const ptrdiff_t size = float_size(dtype);
    if (stride == size && dtype != FSM_F64) {
        for (ptrdiff_t i = 0; i < n; i += VL) {
            const ptrdiff_t k = n - i < VL ? n - i : VL;
            store_as(dtype, out, i, k, load_as(FSM_F32, a, i, k, v_set1(0)));
        }
        return;
    }
#endif
    for (ptrdiff_t i = 0; i < n; i++, out += stride) {
        if (dtype == FSM_F64) {
            double d = (double)a[i];
            memcpy(out, &d, sizeof d);
        } else if (dtype == FSM_F32) {
            float f = (float)a[i];
            memcpy(out, &f, sizeof f);
        } else {
#if FSM_BITS == 32
            const float f = a[i];
#else
            const float f = f64_to_f32_odd(a[i]);
#endif
            if (dtype == FSM_F16) f16_store_n(out, f32_set1(f), 1);
            else bf16_store_n(out, f32_set1(f), 1);
        }
    }
}
