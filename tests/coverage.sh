#!/usr/bin/env bash
# Which lines and branches of src_c and of _core.pyx run in the tests: make coverage. In a copy of the
# tree, build/coverage, with a build of its own. Arguments are for pytest; by default all tests that
# are short. Reports: on the terminal, and the lines in build/coverage/html.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
copy=build/coverage
mkdir -p "$copy"
cp -r fastsoftmax src_c tests setup.py pyproject.toml Makefile README.md LICENSE "$copy"
cd "$copy"
rm -f fastsoftmax/*.so
find . -name '*.gcda' -delete

# The plugin must be named in a file, and the core be compiled without optimisation.
cat >.coveragerc <<'RC'
[run]
plugins = Cython.Coverage
source = fastsoftmax
omit = fastsoftmax/bench/*
RC
FASTSOFTMAX_COVERAGE=1 "$python" setup.py -q build_ext --inplace
"$python" -m coverage run -m pytest -q -p no:cacheprovider "$@"
make --no-print-directory build/coverage/driver build/coverage/attention_driver
for driver in driver attention_driver; do build/coverage/$driver; done

"$python" -m coverage report --show-missing --skip-covered
mkdir -p html
"$python" -m gcovr --root . --filter src_c/ --exclude '.*avx512.*' --exclude-throw-branches \
    --merge-mode-functions merge-use-line-0 --html-details html/c.html --txt-metric line \
    --print-summary
