/* The floating-point modes and flags of the threads that OpenMP keeps for this one: MXCSR, by number.
 * Run by tests/test_environment.py; built with the compiler that built the library, it has the same
 * runtime, and so the same threads. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <omp.h>
#include <unistd.h>

void get_workers(int threads, unsigned *mxcsr, int *id);
void set_workers(int threads, unsigned mxcsr);

void get_workers(int threads, unsigned *mxcsr, int *id) {
#pragma omp parallel num_threads(threads)
    {
        mxcsr[omp_get_thread_num()] = _mm_getcsr();
        id[omp_get_thread_num()] = gettid();
    }
}

/* This thread, which calls, stays as it is. */
void set_workers(int threads, unsigned mxcsr) {
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num()) _mm_setcsr(mxcsr + ((unsigned)omp_get_thread_num() & 1));
}
