# `make help` lists the targets. PYTHON=... and CC=... choose the interpreter and the compiler.

PYTHON ?= python3
CLANG_FORMAT ?= clang-format
DIST = dist
WHEELHOUSE = wheelhouse
STUBS = fastsoftmax._core fastsoftmax.compat.scipy fastsoftmax.compat.torch
C_FILES = $(wildcard src_c/*.[ch] tests/c/*.[ch])
EXAMPLES = $(wildcard examples/*/*/*.c)

.PHONY: help build test full long fuzz mutate coverage lint format docs plots asm wheel sanitize half tsan \
	valgrind emulate emulate-amx cross clean
.DEFAULT_GOAL = help
SHELL = /bin/bash
.SHELLFLAGS = -e -o pipefail -c

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build:  ## build the package in place and install it, editable, with what the tests need
	$(PYTHON) -m pip install -e ".[test]"

test:  ## run the tests (after make build)
	$(PYTHON) -m pytest

full: long fuzz mutate  ## all that takes longer than make test (after make build): an hour

long:  ## the tests of pytest that take longer
	$(PYTHON) -m pytest -m full

fuzz:  ## a million random calls of the Python API: a quarter of an hour
	$(PYTHON) tests/fuzz.py --calls 1000000

mutate:  ## 150 small errors in the C sources, of which the tests should notice every one
	$(PYTHON) tests/mutate.py

coverage:  ## lines and branches that run in the tests; needs pip install ".[test,coverage]"
	PYTHON=$(PYTHON) bash tests/coverage.sh

lint:  ## check style and types, change nothing (needs the package and ".[lint]")
	ruff check .
	ruff format --check .
	cython-lint fastsoftmax examples
	mypy
	$(PYTHON) -m mypy.stubtest --allowlist tests/typing/cython.txt $(STUBS)
	$(CLANG_FORMAT) --dry-run --Werror $(C_FILES) $(EXAMPLES)

format:  ## format the sources in place
	ruff check --fix --exit-zero .
	ruff format .
	$(CLANG_FORMAT) -i $(C_FILES) $(EXAMPLES)

docs:  ## build the site in build/docs; warnings are errors (needs ".[docs]")
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs build/docs

plots:  ## measure, and draw the pictures of the site anew (needs ".[bench]" and torch)
	$(PYTHON) -m fastsoftmax bench overview --plot docs/images/overview.svg
	$(PYTHON) -m fastsoftmax bench accuracy --plot docs/images/accuracy.svg
	$(PYTHON) -m fastsoftmax bench softmax --plot docs/images/softmax.svg

wheel:  ## build a wheel with libgomp inside, in WHEELHOUSE (needs ".[wheel]", Linux)
	$(PYTHON) -m build --outdir $(DIST)
	$(PYTHON) -m auditwheel repair --strip --zip-compression-level 9 --wheel-dir $(WHEELHOUSE) $(DIST)/*.whl
	! find $(WHEELHOUSE) -name '*.whl' -size +999999c | grep .  # none has 1 MB or more

# The C library without Python: the drivers in tests/c, built once for each of the targets below.
# ISAS_x, FLAGS_x, CC_x, RUN_x are what target x builds, with which flags, and how it is run.
DRIVERS = driver attention_driver gradient_driver
IS_X86 = $(filter x86_64 amd64,$(shell uname -m))
IS_ARM = $(filter aarch64 arm64,$(shell uname -m))
HAS_AVX512 = $(shell grep -sw avx512vl /proc/cpuinfo)
HAS_AMX = $(shell grep -sw amx_bf16 /proc/cpuinfo)
ISAS = scalar $(if $(IS_X86),avx2 $(if $(HAS_AVX512),avx512 $(if $(HAS_AMX),amx))) $(if $(IS_ARM),neon)
FLAGS_isa_avx2 = -mavx2 -mfma -mf16c
FLAGS_isa_avx512 = $(FLAGS_isa_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl
FLAGS_isa_amx = $(FLAGS_isa_avx512) -mamx-tile -mamx-bf16
FLAGS_isa_avx512_emulated = $(FLAGS_isa_avx2) -Wno-psabi
FLAGS_isa_amx_emulated = $(FLAGS_isa_avx512_emulated)
HAVE_avx2 = -DFSM_HAVE_AVX2
HAVE_avx512 = -DFSM_HAVE_AVX512
HAVE_amx = -DFSM_HAVE_AMX
HAVE_avx512_emulated = -DFSM_EMULATED_AVX512
HAVE_neon = -DFSM_HAVE_NEON
DRIVER_FLAGS = -g -std=c11 -ffp-contract=off -fno-math-errno -Wall -Wextra -fopenmp -Isrc_c

FLAGS_sanitize = -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
ISAS_sanitize = $(ISAS)
FLAGS_half = $(FLAGS_sanitize) -DONE_IN=2
ISAS_half = $(ISAS)

# valgrind watches the ends of arrays itself, is slow, and has neither AVX-512 nor AMX.
FLAGS_valgrind = -O2 -DGUARD=0 -DONE_IN=17
ISAS_valgrind = $(filter-out avx512 amx,$(ISAS))
RUN_valgrind = valgrind --quiet --error-exitcode=1 --leak-check=full \
	--errors-for-leak-kinds=definite --show-leak-kinds=definite

# Many callers at once. libgomp does not tell ThreadSanitizer how its threads wait for each other;
# LLVM's runtime does, by its tool Archer (Debian: clang, libomp-dev).
CC_tsan = $(firstword $(shell command -v clang clang-14) clang)
FLAGS_tsan = -O1 -fsanitize=thread
ISAS_tsan = $(filter-out avx512 amx,$(ISAS))
RUN_tsan = OMP_TOOL_LIBRARIES=libarcher.so TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1

# AVX-512 and AMX on a CPU that has AVX2 only: SIMDe's headers (Debian: libsimde-dev).
FLAGS_emulate = -O1 -DONE_IN=3
ISAS_emulate = scalar avx512_emulated amx_emulated

# NEON on any machine: a cross compiler and QEMU (Debian: gcc-aarch64-linux-gnu, qemu-user). The
# scalar kernels of this machine, `plain`, then say which bits NEON must give.
ARM = aarch64-linux-gnu
CC_cross = $(ARM)-gcc
FLAGS_cross = -O1 -DONE_IN=17
ISAS_cross = scalar neon
RUN_cross = OMP_WAIT_POLICY=passive qemu-aarch64 -L /usr/$(ARM)
FLAGS_plain = $(FLAGS_cross)
ISAS_plain = scalar

# What tests/mutate.py and tests/coverage.sh build.
FLAGS_mutate = -O2 -g0 -fPIC -DONE_IN=4
ISAS_mutate = $(ISAS)
FLAGS_coverage = -O0 --coverage -fprofile-update=atomic -DONE_IN=3
ISAS_coverage = $(ISAS)

# What make asm shows, with the flags of setup.py.
ISA = avx2
LOOP = f32_(exp_run|exp_sum|run_vsum|map_and_span|fuse_rows|middle_|few_|group_scores|group_values|dots_of_heads)
FLAGS_asm = -O3 -fno-split-loops -fno-unswitch-loops -fno-align-jumps
ISAS_asm = $(ISA)

TARGETS = mutate coverage sanitize half tsan valgrind emulate cross plain asm
LIBRARY = dispatch parallel softmax attention attention_backward embed parts
vpath %.c src_c tests/c

define drivers_for
$(DRIVERS:%=build/$(1)/%) build/$(1)/threads_driver: %: %.o $(LIBRARY:%=build/$(1)/%.o) $(ISAS_$(1):%=build/$(1)/isa_%.o)
	$$(or $$(CC_$(1)),$$(CC)) $$(DRIVER_FLAGS) $$(FLAGS_$(1)) -o $$@ $$^ -lm

build/$(1)/%.o: %.c $(C_FILES) Makefile
	@mkdir -p $$(@D)
	$$(or $$(CC_$(1)),$$(CC)) $$(DRIVER_FLAGS) $$(FLAGS_$(1)) \
		$$(foreach isa,$$(ISAS_$(1)),$$(HAVE_$$(isa))) $$(FLAGS_$$*) -c -o $$@ $$<
endef
$(foreach target,$(TARGETS),$(eval $(call drivers_for,$(target))))

sanitize: $(DRIVERS:%=build/sanitize/%)  ## run the C drivers under ASan and UBSan
half: $(DRIVERS:%=build/half/%)  ## the same with every second test
sanitize half:
	for driver in $^; do $$driver; done

tsan: build/tsan/threads_driver  ## run many callers at once under ThreadSanitizer (needs clang)
	$(RUN_tsan) $< $(lastword $(ISAS_tsan))

valgrind: $(DRIVERS:%=build/valgrind/%)  ## run part of them under valgrind
	for driver in $^; do $(RUN_valgrind) $$driver; done

emulate: $(DRIVERS:%=build/emulate/%) emulate-amx  ## run part of them for AVX-512 and AMX on a CPU without
	for driver in $(filter build/%,$^); do $$driver avx512; done

emulate-amx: build/emulate/attention_driver
	$< amx

cross: build/plain/driver $(DRIVERS:%=build/cross/%)  ## run part of them for NEON, under QEMU
	$(RUN_cross) build/cross/attention_driver neon
	$(RUN_cross) build/cross/driver neon | tee build/cross/log
	build/plain/driver | tail -n 1 | diff - <(tail -n 1 build/cross/log)

asm: build/asm/isa_$(ISA).o  ## show the hot loops of ISA=avx2, or LOOP=f32_exp_run
	objdump --disassemble --no-show-raw-insn $< | awk '/^[0-9a-f]+ <$(LOOP)/, /^$$/'

clean:  ## remove what was built here
	rm -rf build dist wheelhouse *.egg-info fastsoftmax/*.so fastsoftmax/*.pyd
