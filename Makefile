# Every target sets up what it needs; `make` lists them.
PYTHON ?= python3
VENV := .venv
INTROKERNELS_CPP ?= auto
export INTROKERNELS_CPP

PY := $(VENV)/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed
# One stamp for each value of the switch, so that changing it builds again.
BUILT := $(VENV)/.built-$(INTROKERNELS_CPP)
CXX_SOURCES := $(sort $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp'))
DEMO_OUT ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test lint format build wheel doctor clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BUILT)  ## train every method on the digits over several seeds; table, runs/demo/report.html
	$(PY) -m introkernels train --out $(DEMO_OUT) --resume

# Idle OpenMP threads sleep rather than spin: on a shared machine spinning multiplies the time.
test: $(BUILT)  ## run every test
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest

lint: $(INSTALLED)  ## check formatting (ruff, clang-format), lints (ruff) and types (mypy)
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

format: $(INSTALLED)  ## reformat Python and C++ in place
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

build: $(BUILT)  ## compile the C++ libraries into introkernels/ (INTROKERNELS_CPP=1: or fail)

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
	@INTROKERNELS_CPP=0 $(PIP) install --constraint constraints.txt --no-build-isolation \
	  --editable '.[train,test,dev]'
	@rm -f $(VENV)/.built-*
	@touch $@

$(BUILT): $(INSTALLED) $(CXX_SOURCES)
	@echo "Building the C++ libraries"
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace > build/build.log 2>&1 \
	  || { cat build/build.log; exit 1; }
	@cat introkernels/_build_status.json
	@rm -f $(VENV)/.built-*
	@touch $@
