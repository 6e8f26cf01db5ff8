# `make help` lists the targets. PYTHON=... and CC=... choose the interpreter and the compiler.

PYTHON ?= python3
CLANG_FORMAT ?= clang-format
STUBS = fastsoftmax._core fastsoftmax.compat.scipy fastsoftmax.compat.torch
C_FILES = $(wildcard src_c/*.[ch] tests/c/*.[ch])

.PHONY: help build test full lint format docs plots wheel sanitize valgrind clean
.DEFAULT_GOAL = help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build:  ## build the package in place and install it, editable, with what the tests need
	$(PYTHON) -m pip install -e ".[test]"

test:  ## run the tests (after make build)
	$(PYTHON) -m pytest

full:  ## run the tests that take longer (after make build)
	$(PYTHON) -m pytest -m full

lint:  ## check style and types, change nothing (needs the package and ".[lint]")
	ruff check .
	ruff format --check .
	cython-lint fastsoftmax
	mypy
	$(PYTHON) -m mypy.stubtest --allowlist tests/typing/cython.txt $(STUBS)
	$(CLANG_FORMAT) --dry-run --Werror $(C_FILES)

format:  ## format the sources in place
	ruff check --fix --exit-zero .
	ruff format .
	$(CLANG_FORMAT) -i $(C_FILES)

docs:  ## build the site in build/docs; warnings are errors (needs ".[docs]")
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs build/docs

plots:  ## measure, and draw the pictures of the site anew (needs ".[bench]" and torch)
	$(PYTHON) -m fastsoftmax bench accuracy --plot docs/images/accuracy.svg
	$(PYTHON) -m fastsoftmax bench softmax --plot docs/images/softmax.svg
	$(PYTHON) -m fastsoftmax bench attention --plot docs/images/attention.svg

wheel:  ## build a wheel with libgomp inside, in wheelhouse (needs ".[wheel]", Linux)
	$(PYTHON) -m build --outdir dist
	auditwheel repair --strip --zip-compression-level 9 --wheel-dir wheelhouse dist/*.whl

# The C library without Python: the drivers in tests/c under the sanitizers, and, with fewer tests,
# valgrind, which watches the ends of arrays itself and has no AVX-512.
DRIVERS = driver attention_driver
ISAS = scalar $(if $(filter x86_64 amd64,$(shell uname -m)),avx2 avx512)
FLAGS_isa_avx2 = -mavx2 -mfma -mf16c
FLAGS_isa_avx512 = $(FLAGS_isa_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
DRIVER_FLAGS = -g -std=c11 -ffp-contract=off -fno-math-errno -Wall -Wextra -fopenmp -Isrc_c \
	$(if $(filter avx2,$(ISAS)),-DFSM_HAVE_AVX2 -DFSM_HAVE_AVX512)
FLAGS_sanitize = -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
FLAGS_valgrind = -O2 -DGUARD=0 -DONE_IN=17
LIBRARY = dispatch parallel softmax attention $(ISAS:%=isa_%)
VALGRIND = valgrind --quiet --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite \
	--show-leak-kinds=definite
vpath %.c src_c tests/c

define drivers_for
$(DRIVERS:%=build/$(1)/%): %: %.o $(LIBRARY:%=build/$(1)/%.o)
	$$(CC) $$(DRIVER_FLAGS) $$(FLAGS_$(1)) -o $$@ $$^ -lm

build/$(1)/%.o: %.c $(C_FILES) Makefile
	@mkdir -p $$(@D)
	$$(CC) $$(DRIVER_FLAGS) $$(FLAGS_$(1)) $$(FLAGS_$$*) -c -o $$@ $$<
endef
$(foreach tool,sanitize valgrind,$(eval $(call drivers_for,$(tool))))

sanitize: $(DRIVERS:%=build/sanitize/%)  ## run the C drivers under ASan and UBSan
	set -e; for driver in $^; do $$driver; done

valgrind: $(DRIVERS:%=build/valgrind/%)  ## run part of them under valgrind
	set -e; for driver in $^; do $(VALGRIND) $$driver $(filter-out avx512,$(ISAS)); done

clean:  ## remove what was built here
	rm -rf build dist wheelhouse *.egg-info fastsoftmax/*.so fastsoftmax/*.pyd
