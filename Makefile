# Every target sets up what it needs; `make` lists them.
PYTHON ?= python3
VENV := .venv
INTROKERNELS_CPP ?= auto
INTROKERNELS_CUDA ?= auto
export INTROKERNELS_CPP INTROKERNELS_CUDA

PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# One stamp for each value of the switches, so that changing one builds again.
BUILT := $(VENV)/.built-$(INTROKERNELS_CPP)-$(INTROKERNELS_CUDA)
CXX_SOURCES := $(sort $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h'))
TEST_CXX_SOURCES := $(sort $(shell find tests -name '*.cu' -o -name '*.h'))
DEMO_OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo check test test-all test-rest test-suite test-emulated test-interpreted kernels test-capabilities test-big sanitize compilers gpu-check test-torch lint format build wheel doctor clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILT)  ## train seven methods on the digits over several seeds; table, runs/demo/report.html
	$(PY) -m introkernels train --out $(DEMO_OUT) --resume

# Idle OpenMP threads sleep rather than spin: on a shared machine spinning multiplies the time.
# Tests go to whichever of two processes is free, so that both cores are busy to the end.
RUN := OMP_WAIT_POLICY=PASSIVE
PYTEST := $(PY) -m pytest --numprocesses 2 --dist loadgroup
EMULATED := INTROKERNELS_TEST_BACKENDS=cuda
INTERPRETED := TRITON_INTERPRET=1 INTROKERNELS_TEST_BACKENDS=triton
QUICK := -m 'not slow and not big and not gpu'

# Builds, and trainings by the command line, are left to `make test`.
WHOLE_COMMANDS := tests/packaging tests/train/test_cli.py tests/train/test_distributed_training.py

check: $(BUILT)  ## two minutes: a case of each quick test, on C++ and plain PyTorch
	$(RUN) $(PYTEST) $(QUICK) --at-most 1 $(WHOLE_COMMANDS:%=--ignore=%)

test: $(BUILT)  ## eight minutes: every property on every backend; CUDA emulated, Triton interpreted
	$(RUN) $(PYTEST) $(QUICK) --at-most 4
	$(RUN) $(EMULATED) $(PYTEST) $(QUICK) --at-most 4 tests/losses tests/cuda
	$(RUN) $(INTERPRETED) $(PYTEST) $(QUICK) --all-kernel-lines --at-most 1 tests/losses tests/triton

# What `make test` leaves out: each of these is a run of its own.
test-all: test test-rest  ## everything: every case, order and instruction set, planted faults, sanitizers

test-rest: test-suite test-emulated test-interpreted kernels test-capabilities test-big sanitize compilers  ## what `make test-all` has beyond `make test`

test-suite: $(BUILT)  ## every case on C++ and plain PyTorch, slow tests too
	$(RUN) $(PYTEST)

test-emulated: test-order-descending test-order-shuffled  ## every case on emulated CUDA, a few in other orders of threads; planted faults
	$(RUN) $(EMULATED) $(PYTEST) tests/losses tests/cuda

test-order-%: $(BUILT)
	$(RUN) $(EMULATED) INTROKERNELS_EMULATION_ORDER=$* $(PYTEST) --at-most 4 tests/losses

test-interpreted: $(BUILT)  ## several cases of each test on Triton's interpreter, planted faults
	$(RUN) $(INTERPRETED) $(PYTEST) --at-most 2 tests/losses tests/triton

# Each kernel of Triton for one of its targets; `KERNELS=` for all of them. `WRITE=--write` keeps what
# is predicted of them in benchmarks.
KERNELS ?= --in-turn

kernels: $(INSTALLED)  ## compile the kernels for A100, H100, B200 (Triton's: MI300); check and predict from what came out
	$(PY) tests/compile_kernels.py $(KERNELS) $(WRITE)
	$(PY) tests/compile_cuda_kernels.py $(CUDA_KERNELS) $(WRITE)

test-capabilities: test-capability-avx2 test-capability-baseline  ## the losses with AVX2 and with baseline kernels

# Chosen when the library is loaded: a run for each.
test-capability-%: $(BUILT)
	$(RUN) INTROKERNELS_TEST_BACKENDS=cpu INTROKERNELS_CPU_CAPABILITY=$* $(PYTEST) tests/losses

test-big: $(BUILT)  ## run the tests of tensors of more than 2^31 elements (13 GiB of memory)
	INTROKERNELS_REQUIRE_BIG=1 INTROKERNELS_TEST_BACKENDS=cpu $(PY) -m pytest -m big tests/losses

# A few cases of each test; `SANITIZE=` for all of them, which takes hours.
SANITIZE ?= --sample

sanitize: $(INSTALLED)  ## run the tests on C++ built with Address- and UndefinedBehaviourSanitizer
	$(PY) tests/run_sanitized.py $(SANITIZE)

compilers: $(INSTALLED)  ## compile csrc/cpu by Clang and for aarch64, where those compilers are found
	$(PY) tests/compile_cpu_sources.py

test-torch:  ## build and test on releases of torch, TORCH="2.10.0 2.14.1" (6 GB each)
	$(PYTHON) tests/run_on_torch.py $(TORCH)

# With the Python at hand and what it finds: such a machine may have no network to install from.
gpu-check:  ## on a machine with a GPU: its tests and benchmarks, into OUT=folder, in 10 minutes
	@test -n "$(OUT)" || { echo "make gpu-check OUT=folder: where logs and results go"; exit 2; }
	$(PYTHON) benchmarks/gpu_check.py "$(OUT)" $(if $(PARTS),--only $(PARTS))

lint: $(INSTALLED)  ## check formatting (ruff, clang-format), lints (ruff) and types (mypy)
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES) $(TEST_CXX_SOURCES)
	$(PY) -m mypy

format: $(INSTALLED)  ## reformat Python and C++ in place
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES) $(TEST_CXX_SOURCES)

build: $(BUILT)  ## compile csrc/ into introkernels/ (INTROKERNELS_CPP=1, INTROKERNELS_CUDA=1: or fail)

wheel: $(INSTALLED)  ## build a wheel into dist/
	rm -rf dist
	$(PY) -m build --wheel --no-isolation --outdir dist

doctor: $(BUILT)  ## say what is installed, built and loaded, and whether it is healthy
	$(PY) -m introkernels doctor

clean:  ## remove what was built, installed and cached; results in runs/ stay
	rm -rf $(VENV) build dist introkernels.egg-info introkernels/*.so introkernels/_build_status.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by its exact version, so that nothing else chooses another one.
# The libraries are left to the build below, which compiles only what changed.
$(INSTALLED): constraints.txt pyproject.toml setup.py
	@echo "Setting up $(VENV): PyTorch and the tools of constraints.txt (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) needs its venv and ensurepip modules"; exit 1; }
	@$(PIP) install --constraint constraints.txt --upgrade pip setuptools
	@$(PIP) install --constraint constraints.txt torch numpy
	@INTROKERNELS_CPP=0 INTROKERNELS_CUDA=0 $(PIP) install --constraint constraints.txt --no-build-isolation \
	  --editable '.[train,bench,test,dev,triton]'
	@rm -f $(VENV)/.built-*
	@touch $@

$(BUILT): $(INSTALLED) setup_cuda.py csrc/flags.txt $(CXX_SOURCES) introkernels/_version.py introkernels/ops/schema.py
	@echo "Building the libraries of csrc"
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace > build/build.log 2>&1 \
	  || { cat build/build.log; exit 1; }
	@cat introkernels/_build_status.json
	@rm -f $(VENV)/.built-*
	@touch $@
