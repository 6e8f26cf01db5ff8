# `make help` lists the targets. PYTHON=... and CC=... choose the interpreter and the compiler.

PYTHON ?= python3
CLANG_FORMAT ?= clang-format
C_FILES = $(wildcard src_c/*.[ch] tests/c/*.[ch])

.PHONY: help build test full lint format sanitize clean
.DEFAULT_GOAL = help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build:  ## build the package in place and install it, editable, with what the tests need
	$(PYTHON) -m pip install -e ".[test]"

test:  ## run the tests (after make build)
	$(PYTHON) -m pytest

full:  ## run the tests that take longer (after make build)
	$(PYTHON) -m pytest -m full

lint:  ## check style, change nothing
	ruff check .
	ruff format --check .
	cython-lint fastsoftmax
	$(CLANG_FORMAT) --dry-run --Werror $(C_FILES)

format:  ## format the sources in place
	ruff check --fix --exit-zero .
	ruff format .
	$(CLANG_FORMAT) -i $(C_FILES)

# The C library without Python, under AddressSanitizer and UndefinedBehaviorSanitizer.
SAN = build/sanitize
SAN_FLAGS = -g -O1 -std=c11 -ffp-contract=off -fno-math-errno -Wall -Wextra -fopenmp -Isrc_c \
	-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ISAS = scalar $(if $(filter x86_64 amd64,$(shell uname -m)),avx2 avx512)
FLAGS_isa_avx2 = -mavx2 -mfma -mf16c
FLAGS_isa_avx512 = $(FLAGS_isa_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
HAVE = $(if $(filter avx2,$(ISAS)),-DFSM_HAVE_AVX2 -DFSM_HAVE_AVX512)
SAN_OBJECTS = $(patsubst %,$(SAN)/%.o,dispatch parallel softmax $(ISAS:%=isa_%) driver)

sanitize: $(SAN)/driver  ## run the C driver under ASan and UBSan
	$(SAN)/driver

$(SAN)/driver: $(SAN_OBJECTS)
	$(CC) $(SAN_FLAGS) -o $@ $^ -lm

$(SAN)/%.o: src_c/%.c $(C_FILES) Makefile
	@mkdir -p $(SAN)
	$(CC) $(SAN_FLAGS) $(HAVE) $(FLAGS_$*) -c -o $@ $<

$(SAN)/%.o: tests/c/%.c $(C_FILES) Makefile
	@mkdir -p $(SAN)
	$(CC) $(SAN_FLAGS) $(HAVE) -c -o $@ $<

clean:  ## remove what was built here
	rm -rf build dist *.egg-info fastsoftmax/*.so fastsoftmax/*.pyd
