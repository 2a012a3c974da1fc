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
.PHONY: help demo test test-suite test-emulated test-interpreted test-interpreter test-emulation kernels test-capabilities test-big sanitize gpu-check lint format build wheel doctor clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILT)  ## train seven methods on the digits over several seeds; table, runs/demo/report.html
	$(PY) -m introkernels train --out $(DEMO_OUT) --resume

EMULATED := OMP_WAIT_POLICY=PASSIVE INTROKERNELS_TEST_BACKENDS=cuda
# In which threads of a block run; see csrc/emulation/emulation.h.
ORDERS := ascending descending shuffled
INTERPRETED := OMP_WAIT_POLICY=PASSIVE TRITON_INTERPRET=1 INTROKERNELS_TEST_BACKENDS=triton

# Each keeps one core busy, and prints what it has to say when it is done.
test: $(BUILT)  ## run the tests on every backend; CUDA under an emulation, Triton in its interpreter
	@echo "Six runs of the tests, two at a time: a quarter of an hour, the first word after half of it"
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=target \
	  test-interpreted test-suite $(EMULATED_RUNS)

# Idle OpenMP threads sleep rather than spin: on a shared machine spinning multiplies the time.
test-suite: $(BUILT)  ## the part of `make test` that needs neither emulation nor interpreter
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest

EMULATED_RUNS := $(ORDERS:%=test-emulated-%) test-emulated-kernels

test-emulated: $(BUILT)  ## the part of `make test` that runs CUDA under its emulation, in three orders
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(EMULATED_RUNS)

# All cases in the first order, a few of each test in the others: not the same ones in both.
test-emulated-descending test-emulated-shuffled: CASES := --at-most 4

$(ORDERS:%=test-emulated-%): test-emulated-%: $(BUILT)
	INTROKERNELS_EMULATION_ORDER=$* $(EMULATED) $(PY) -m pytest $(CASES) tests/losses

# The kernels' own tests, in one order, and without half of their planted faults.
test-emulated-kernels: $(BUILT)
	$(EMULATED) $(PY) -m pytest -m 'not slow' tests/cuda

test-interpreted: $(BUILT)  ## the part of `make test` that runs Triton in its interpreter
	$(INTERPRETED) $(PY) -m pytest --all-kernel-lines --at-most 2 tests/losses tests/triton

test-interpreter: $(BUILT)  ## run every case of the tests on Triton in its interpreter (long)
	$(INTERPRETED) $(PY) -m pytest --all-kernel-lines tests/losses tests/triton

test-emulation: $(BUILT)  ## run every case on the emulation of CUDA in every order, and all planted faults
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=target CASES= $(EMULATED_RUNS)
	$(EMULATED) $(PY) -m pytest -m slow tests/cuda

kernels: $(INSTALLED)  ## compile the kernels for A100, H100, B200 (Triton's: MI300) and check what came out
	$(PY) tests/compile_kernels.py $(KERNELS)
	$(PY) tests/compile_cuda_kernels.py $(CUDA_KERNELS)

CAPABILITIES := avx2 baseline

test-capabilities: $(BUILT)  ## run the tests of the losses again with AVX2 and with baseline kernels
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(CAPABILITIES:%=test-capability-%)

# Chosen when the library is loaded: a process for each.
$(CAPABILITIES:%=test-capability-%): test-capability-%: $(BUILT)
	OMP_WAIT_POLICY=PASSIVE INTROKERNELS_TEST_BACKENDS=cpu \
	  INTROKERNELS_CPU_CAPABILITY=$* $(PY) -m pytest tests/losses

test-big: $(BUILT)  ## run the tests of tensors of more than 2^31 elements (13 GiB of memory)
	INTROKERNELS_REQUIRE_BIG=1 INTROKERNELS_TEST_BACKENDS=cpu $(PY) -m pytest -m big tests/losses

sanitize: $(INSTALLED)  ## run the tests on C++ built with Address- and UndefinedBehaviourSanitizer
	$(PY) tests/run_sanitized.py $(SANITIZE)

# With the Python at hand and what it finds: such a machine may have no network to install from.
gpu-check:  ## on a machine with a GPU: its tests and benchmarks, into OUT=folder, in 9 minutes
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

$(BUILT): $(INSTALLED) setup_cuda.py $(CXX_SOURCES)
	@echo "Building the libraries of csrc"
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace > build/build.log 2>&1 \
	  || { cat build/build.log; exit 1; }
	@cat introkernels/_build_status.json
	@rm -f $(VENV)/.built-*
	@touch $@
