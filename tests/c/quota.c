/* How many CPUs a cgroup quota leaves: parallel.c over made-up files. Run by tests/test_teams.py. */
#define _GNU_SOURCE
#include <stdio.h>

static FILE *made_up(const char *path, const char *mode);
#define fopen made_up
#include "../../src_c/parallel.c"
#undef fopen

static char **files; /* path, content, path, content ... */

static FILE *made_up(const char *path, const char *mode) {
    for (char **f = files; *f; f += 2)
        if (strcmp(*f, path) == 0) return fmemopen(f[1], strlen(f[1]), mode);
    return NULL;
}

int main(int argc, char **argv) {
    (void)argc;
    files = argv + 1;
    printf("%d\n", cgroup_cpus());
    return 0;
}
