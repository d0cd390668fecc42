PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all check format bench bench-compare bench-history peers gpu clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

setup: $(VENV)/.dev  ## Build the environment in .venv; every target below does so first when needed

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## Train a VAE on the embedded digits, seconds on a CPU
	$(BIN)/accelerate launch --quiet --config_file launch/configs/one_process.yaml launch/train.py vae-mnist

# Several processes run side by side, a file in each, the longest files first (tests/conftest.py): two more than there
# are cores, since tests wait for commands that they start. One thread each keeps them from fighting for the cores.
# Python keeps what it has compiled of the sources, also where an image forbids it: each command would compile them again.
test test-all: export OMP_NUM_THREADS := 1
test test-all: export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 2)')
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: setup  ## Run the tests that take seconds
	$(PYTEST) -m 'not slow and not gpu'

test-all: setup  ## Run all tests that this machine can run
	$(PYTEST)

check: setup  ## Lint, check the format, the types and the import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup  ## Sort imports and format
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format

# Commit to compare to, and options such as --only step-vae-mnist.
BASE ?= HEAD
OPTIONS ?=

bench: setup  ## Run the benchmarks
	$(BIN)/python -m pytest bench/suite

bench-compare: setup  ## Compare the speed of this tree to a commit: make bench-compare BASE=main
	$(BIN)/python bench/gate/gate.py compare --base $(BASE) $(OPTIONS)

bench-history: setup  ## Run the benchmarks, add them to the history, plot it into bench/history/history.html
	@mkdir -p .benchmarks
	$(BIN)/python bench/history/history.py check
	$(BIN)/python -m pytest bench/suite --benchmark-json .benchmarks/last.json
	$(BIN)/python bench/history/history.py add .benchmarks/last.json
	$(BIN)/python bench/history/history.py page

DATA_ROOT ?= data

peers: setup  ## Compare speed with pythae, Lightning, the plain loop and diffusers, on images in DATA_ROOT
	$(BIN)/pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python bench/peers/compare.py --data-root $(DATA_ROOT)
	$(BIN)/python bench/peers/autoencoder_speed.py --data cifar10 --data-root $(DATA_ROOT)

gpu: setup  ## On a machine with a GPU: its tests and benchmarks, into gpu-report.md
	$(BIN)/python bench/gpu/report.py

clean:  ## Remove the environment and caches; runs and data stay
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
