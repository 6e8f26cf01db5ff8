/* Threads: how many, how work is cut, fork. The only file that knows OpenMP. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <ctype.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#endif

#include "parallel.h"

#include <limits.h>
#include <stdatomic.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <fenv.h>
#endif

/* Flags that were raised stay raised, and whatever the kernels raise is gone. */
uint64_t fsm_fp_enter(void) {
#if defined(__x86_64__) || defined(_M_X64)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* all exceptions masked, round to nearest, no FTZ, no DAZ */
    return before;
#elif defined(__aarch64__)
    uint64_t mode, flags; /* of 32 bits each */
    __asm__ __volatile__("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(mode), "=r"(flags));
    __asm__ __volatile__("msr fpcr, xzr");
    return mode | flags << 32;
#else
    const int mode = fegetround(), flags = fetestexcept(FE_ALL_EXCEPT);
    fesetround(FE_TONEAREST);
    return (uint32_t)mode | (uint64_t)(uint32_t)flags << 32;
#endif
}

void fsm_fp_leave(uint64_t before) {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_setcsr((unsigned)before);
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpsr, %0\n\tmsr fpcr, %1"
                         :
                         : "r"(before >> 32), "r"(before & UINT32_MAX));
#else
    feclearexcept(FE_ALL_EXCEPT & ~(int)(before >> 32));
    fesetround((int)(uint32_t)before);
#endif
}

/* ---- how many CPUs ---- */

#if defined(__linux__)
/* CPUs that a quota of `quota` us in every `period` us allows, rounded up; INT_MAX without one. */
static int quota_cpus(long long quota, long long period) {
    if (quota <= 0 || period <= 0) return INT_MAX;
    const long long cpus = (quota + period - 1) / period;
    return cpus < INT_MAX ? (int)cpus : INT_MAX;
}

/* The numbers in the first line of a file; "max" reads as -1. Returns how many were read. */
static int read_numbers(const char *dir, const char *file, long long *a, long long *b) {
    char path[4352], line[64];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    const char *got = fgets(line, sizeof line, f);
    fclose(f);
    if (!got) return 0;
    if (strncmp(line, "max", 3) == 0) {
        *a = -1;
        return 1;
    }
    return sscanf(line, "%lld %lld", a, b);
}

/* The quota of a group, v2 (cpu.max: "quota period") or v1 (a file for each). */
static int group_cpus(const char *dir) {
    long long quota = -1, period = 0, none;
    if (read_numbers(dir, "cpu.max", &quota, &period) == 2) return quota_cpus(quota, period);
    if (read_numbers(dir, "cpu.cfs_quota_us", &quota, &none) == 1 &&
        read_numbers(dir, "cpu.cfs_period_us", &period, &none) == 1)
        return quota_cpus(quota, period);
    return INT_MAX;
}

/* The smallest quota of this process's group and of those above it. /proc/self/cgroup has lines
 * "id:controllers:path"; inside a container the path may not exist under the mount, and the mount's
 * root is then the group. */
static int cgroup_cpus(void) {
    static const char *const mounts[] = {"/sys/fs/cgroup", "/sys/fs/cgroup/cpu",
                                         "/sys/fs/cgroup/cpu,cpuacct"};
    char line[4096], dir[4224];
    int least = INT_MAX;
    for (int m = 0; m < 3; m++) {
        const int root = group_cpus(mounts[m]);
        least = root < least ? root : least;
    }
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        if (controllers[1] && !strstr(controllers, "cpu")) continue; /* v1, another controller */
        for (char *end = path + strlen(path); end > path; *end = 0) {
            for (int m = 0; m < 3; m++) {
                snprintf(dir, sizeof dir, "%s%s", mounts[m], path);
                const int cpus = group_cpus(dir);
                least = cpus < least ? cpus : least;
            }
            while (end > path && *--end != '/') {}
        }
    }
    if (f) fclose(f);
    return least;
}
#endif

int fsm_usable_cpus(void) {
    int cpus = 1;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#ifdef _OPENMP
    else cpus = omp_get_num_procs(); /* more CPUs than a cpu_set_t holds */
#endif
    const int quota = cgroup_cpus();
    if (quota < cpus) cpus = quota;
#elif defined(_OPENMP)
    cpus = omp_get_num_procs();
#endif
    return cpus > 1 ? cpus : 1;
}

ptrdiff_t fsm_last_cache(void) {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    return sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    return 0;
#endif
}

int fsm_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* ---- OpenMP's own limit, and fork ---- */

#ifdef _OPENMP
/* This process was forked by a thread whose team could not be let go: libgomp would wait for it for
 * ever, so calls are serial. */
static atomic_int orphaned;
/* Threads that run besides those that called. A call gets what is left, down to none: so there are
 * never more running than callers and CPUs. */
static atomic_int helping;
static atomic_int first_limit = -1; /* what OpenMP allowed when it was first asked */

#if defined(__linux__)
/* The team that libgomp keeps for this thread; it lets go of those that a smaller one leaves. */
static _Thread_local int team = 1;
static size_t stack_size; /* of its threads; 0: the usual one */

/* fork copies the thread that calls it and no other. libgomp would go on to count on the threads of
 * its team in the child, where they do not exist; so the team is let go of before, and parent and
 * child form new ones when they need them. That fails inside a parallel region. */
static _Thread_local int let_go;

static void before_fork(void) {
    let_go = 0;
#if __GNUC__ >= 9 || _OPENMP >= 201811
    let_go = !atomic_load(&orphaned) && omp_pause_resource_all(omp_pause_soft) == 0;
    if (let_go) team = 1;
#endif
}

static void in_child(void) {
    atomic_store(&helping, 0);
    if (!let_go) atomic_store(&orphaned, 1);
}

/* As libgomp reads it: KiB if there is no unit. */
static size_t stack_size_in(const char *variable) {
    static const char units[] = "bkmg";
    const char *value = getenv(variable);
    char *end;
    if (!value) return 0;
    const unsigned long long number = strtoull(value, &end, 10);
    while (*end == ' ') end++;
    const char *unit = strchr(units, *end ? tolower((unsigned char)*end) : 'k');
    return unit ? (size_t)number << 10 * (unit - units) : 0;
}

static void at_first(void) {
    stack_size = stack_size_in("OMP_STACKSIZE");
    if (!stack_size) stack_size = stack_size_in("GOMP_STACKSIZE");
    pthread_atfork(before_fork, NULL, in_child);
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
#endif
#endif

int fsm_openmp_limit(void) {
#ifdef _OPENMP
    int now = omp_get_max_threads(), unset = -1;
    atomic_compare_exchange_strong(&first_limit, &unset, now);
#if defined(__linux__)
    pthread_once(&once, at_first); /* while the environment is that which libgomp saw */
#endif
    if (atomic_load(&orphaned)) return 1;
    return now < atomic_load(&first_limit) ? now : INT_MAX;
#else
    return 1;
#endif
}

/* ---- teams ---- */

#ifdef _OPENMP
static int reserve(int wanted) {
    int busy = atomic_load(&helping), got;
    do got = wanted > busy ? wanted - busy : 0;
    while (!atomic_compare_exchange_weak(&helping, &busy, busy + got));
    return got;
}

#if defined(__linux__)
static void *pass_through(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* Whether so many threads can be started, of the stack that libgomp's have. They are let go at
 * once. */
static int can_start(int count) {
    enum { MOST = 1024 };
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t thread[MOST];
    pthread_attr_t attributes;
    int started = 0;
    if (count > MOST || pthread_attr_init(&attributes)) return 0;
    if (stack_size) pthread_attr_setstacksize(&attributes, stack_size); /* too small: the usual */
    pthread_mutex_lock(&gate);
    while (started < count &&
           pthread_create(&thread[started], &attributes, pass_through, &gate) == 0)
        started++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < started; i++) pthread_join(thread[i], NULL);
    pthread_attr_destroy(&attributes);
    return started == count;
}

/* Whether there is the memory that libgomp needs for a team: 3 KB and 0.2 KB a thread (GCC 12), here
 * with room to spare. */
static int has_memory(int threads) {
    void *room = malloc(((size_t)threads << 10) + (1 << 14));
    free(room);
    return room != NULL;
}

/* libgomp ends the process if it cannot start a thread (RLIMIT_NPROC, RLIMIT_AS) or has no memory.
 * So what it is going to take is tried before. */
static int form_team(int threads) {
    pthread_once(&once, at_first);
    if (threads != team && !has_memory(threads)) return 1;
    if (threads > team && !can_start(threads - team)) return 1;
    return team = threads;
}
#else
static int form_team(int threads) { return threads; }
#endif
#endif

/* ---- the loop ---- */

enum { SHARES = 64 }; /* at the most: more threads than these have one in common */

typedef struct {
    atomic_ptrdiff_t taken;
    char apart[128 - sizeof(atomic_ptrdiff_t)]; /* a line of its own, and the one fetched with it */
} share;

/* The units are cut into shares. A thread takes a share of its own piece by piece, and then what is
 * left of the others': one that was held up does less. */
static void in_shares(int threads, int shares, ptrdiff_t n, ptrdiff_t grain, int backward,
                      fsm_body body, void *context) {
#ifdef _OPENMP
    if (threads > 1 && n > grain && !omp_in_parallel() && !atomic_load(&orphaned)) {
        const int helpers = reserve(threads - 1);
        threads = helpers ? form_team(1 + helpers) : 1;
        if (threads > 1) {
            share cut[SHARES];
            shares = (int)least(least(threads, shares), SHARES);
            for (int s = 0; s < shares; s++) atomic_init(&cut[s].taken, 0);
#pragma omp parallel num_threads(threads)
            {
                const uint64_t before = fsm_fp_enter();
                const int thread = omp_get_thread_num();
                for (int k = 0; k < shares; k++) {
                    const int s = (thread + k) % shares;
                    const ptrdiff_t first = n / shares * s + least(s, n % shares);
                    const ptrdiff_t size = n / shares + (s < n % shares);
                    ptrdiff_t i;
                    /* relaxed: units are independent, and ThreadSanitizer is to see if not */
                    while ((i = atomic_fetch_add_explicit(&cut[s].taken, grain,
                                                          memory_order_relaxed)) < size) {
                        const ptrdiff_t count = least(grain, size - i);
                        const ptrdiff_t begin = first + (backward ? size - i - count : i);
                        body(context, thread, begin, begin + count);
                    }
                }
                fsm_fp_leave(before);
            }
        }
        atomic_fetch_sub(&helping, helpers);
        if (threads > 1) return;
    }
#endif
    (void)threads, (void)shares, (void)grain, (void)backward;
    const uint64_t before = fsm_fp_enter();
    body(context, 0, 0, n);
    fsm_fp_leave(before);
}

void fsm_parallel_for(int threads, ptrdiff_t n, ptrdiff_t grain, fsm_body body, void *context) {
    in_shares(threads, 1, n, grain, 0, body, context);
}

void fsm_parallel_shares(int threads, ptrdiff_t n, ptrdiff_t grain, int backward, fsm_body body,
                         void *context) {
    in_shares(threads, threads, n, grain, backward, body, context);
}
