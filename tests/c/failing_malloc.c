/* Preloaded by tests/test_no_memory.py: from the k-th allocation of a Python call on, or for the
 * k-th alone, there is no memory. glibc's own functions do the work. */
#include <errno.h>
#include <stddef.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *p, size_t size);
__attribute__((weak)) void *PyObject_CallNoArgs(void *callable);
void *call_without_memory(void *callable, long k, int once);
long allocations(void);

static _Thread_local long countdown, counted;
static _Thread_local int armed, only_one;

/* What Python's C function of that name does: a new reference, or NULL with an exception set. */
void *call_without_memory(void *callable, long k, int once) {
    countdown = k;
    counted = 0;
    only_one = once;
    armed = 1;
    void *result = PyObject_CallNoArgs(callable);
    armed = 0;
    return result;
}

long allocations(void) { return counted; } /* of that call */

static int fails(void) {
    if (!armed) return 0;
    counted++;
    if (countdown > 1) return countdown--, 0;
    if (only_one) armed = 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return fails() ? NULL : __libc_calloc(count, size); }
void *realloc(void *p, size_t size) { return fails() ? NULL : __libc_realloc(p, size); }
