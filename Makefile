# Every target does its own set-up. PYTHON must be 3.12 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
PEERS_MAXTEXT := .peers-maxtext
PEERS_PYTHON ?= python3.11
GPU_COMPILER := .gpu-compiler
# Processes that share the tests. Each may take a few GiB.
TEST_WORKERS ?= 2
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup run test test-all lint format bench bench-kernels bench-moe bench-plan gpu-compiler peers peers-maxtext golden clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "olmax needs Python 3.12 or newer; '$(PYTHON)' is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: setup
	$(BIN)/python -m experiments.olmo2 all --preset tiny

test: setup $(GPU_COMPILER)/.installed
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-all: setup $(GPU_COMPILER)/.installed
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup peers
	$(BIN)/python -m experiments.olmo2.benchmark

# Compiles the TPU kernels with libtpu and reads their schedules; needs no TPU, and no GPU either.
bench-kernels: setup $(GPU_COMPILER)/.installed
	$(BIN)/python -m kernels_pallas.benchmark

bench-moe: setup peers
	$(BIN)/python -m experiments.olmoe.benchmark

# Compiled TPU programs beside MaxText's: cycles and bytes, so it may run beside anything.
bench-plan: setup peers-maxtext
	$(BIN)/python -m experiments.olmo2.benchmark_plan

# XLA's compiler for NVIDIA GPUs, to compile kernels where no GPU is (Linux; 143 MB to fetch, 400 MB on disk). It has a
# folder of its own: in the environment, jax would look for a GPU with it at every start and complain. Tests skip without.
gpu-compiler: $(GPU_COMPILER)/.installed
	@test -e $<

$(GPU_COMPILER)/.installed: gpu-compiler-requirements.txt $(VENV)/.installed
	@rm -rf $(GPU_COMPILER)
	@why=$$($(BIN)/python -m pip install -qq --retries 2 --no-deps --target $(GPU_COMPILER) -r gpu-compiler-requirements.txt 2>&1) \
	  && test -d $(GPU_COMPILER)/jax_cuda13_plugin && touch $@ \
	  || { rm -rf $(GPU_COMPILER); echo "no GPU compiler here, so what compiles for GPUs is skipped: $$(echo "$${why:-there is none for this system}" | tail -n 1)"; }

# MaxText in an environment of its own, of the same Python as ours.
peers-maxtext: $(PEERS_MAXTEXT)/.installed

$(PEERS_MAXTEXT)/.installed: peers-maxtext-requirements.txt
	$(PYTHON) -m venv $(PEERS_MAXTEXT)
	$(PEERS_MAXTEXT)/bin/python -m pip install --quiet -r peers-maxtext-requirements.txt
	@touch $@

# The reference implementations run in an environment of their own: Python 3.11, CPU torch, transformers.
peers: $(PEERS)/.installed

$(PEERS)/.installed: peers-requirements.txt
	@$(PEERS_PYTHON) -c 'import sys' || { echo "the peers environment needs Python 3.11 (make peers PEERS_PYTHON=...)"; exit 2; }
	$(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -r peers-requirements.txt
	@touch $@

golden: peers
	$(PEERS)/bin/python tests/interop/make_golden.py

clean:
	rm -rf $(VENV) $(PEERS) $(PEERS_MAXTEXT) $(GPU_COMPILER) build dist .pytest_cache .ruff_cache
