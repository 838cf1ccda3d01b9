# Every target does its own set-up. PYTHON must be 3.12 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
PEERS_MAXTEXT := .peers-maxtext
PEERS_PYTHON ?= python3.11
# Processes that share the tests. Each may take a few GiB.
TEST_WORKERS ?= 2
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup run test test-all lint format bench bench-kernels bench-moe bench-plan peers peers-maxtext golden clean

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

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-all: setup
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

# Compiles the TPU kernels with libtpu and reads their schedules; needs no TPU.
bench-kernels: setup
	$(BIN)/python -m kernels_pallas.benchmark

bench-moe: setup peers
	$(BIN)/python -m experiments.olmoe.benchmark

# Compiled TPU programs beside MaxText's: cycles and bytes, so it may run beside anything.
bench-plan: setup peers-maxtext
	$(BIN)/python -m experiments.olmo2.benchmark_plan

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
	rm -rf $(VENV) $(PEERS) $(PEERS_MAXTEXT) build dist .pytest_cache .ruff_cache
