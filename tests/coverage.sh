#!/usr/bin/env bash
# Which lines and branches of src_c and of _core.pyx run in the tests: make coverage. In a copy of the
# tree, build/coverage, with a build of its own. Arguments are for pytest. Reports: on the terminal, and
# the lines in build/coverage/html. What is left is explained in tests/coverage.md.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
copy=build/coverage
mkdir -p "$copy"
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
rm -f fastsoftmax/*.so
find . -name '*.gcda' -delete

# Functions in one copy: in a copy for each place where one is inlined, its constants decide branches.
sed -i 's/static inline __attribute__((always_inline))/static inline/' src_c/vec.h

# The plugin must be named in a file, and the core be compiled without optimisation.
cat >.coveragerc <<'RC'
[run]
plugins = Cython.Coverage
source = fastsoftmax
omit = fastsoftmax/bench/*
RC
export FASTSOFTMAX_COVERAGE=1
"$python" setup.py -q build_ext --inplace
# Left out: what asks for numbers again and again, or for none of the core; the scalar kernels, which the
# drivers run; and, since under line tracing the exception of a signal's handler may get lost, signals.
chosen='not scalar and not signal_handler and not ctrl_c and not index_counts and not interrupted'
without=(accuracy fuzz hypothesis attention_hypothesis attention_memory reference reference_attention cli
    reference_gradients compat dask doctests ecosystem examples packaging typing)
# The programs that tests compile leave their counts beside them, in --basetemp.
"$python" -m coverage run -m pytest -q -p no:cacheprovider --basetemp=tmp -k "$chosen" \
    $(printf -- "--ignore=tests/test_%s.py " "${without[@]}") "$@" || failed=1
drivers=(driver attention_driver gradient_driver)
make --no-print-directory "${drivers[@]/#/build/coverage/}"
for driver in "${drivers[@]}"; do build/coverage/"$driver"; done

"$python" -m coverage report --show-missing --skip-covered
mkdir -p html
"$python" -m gcovr --root . --filter src_c/ --exclude '.*avx512.*' --exclude-throw-branches \
    --merge-mode-functions merge-use-line-0 --merge-lines --gcov-suspicious-hits-threshold 0 \
    --html-details html/c.html --txt-metric line --print-summary
exit ${failed:-0}
