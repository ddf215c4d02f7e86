# traitdose. `make demo` runs the whole quickstart, `make test` the tests; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := $(CURDIR)/$(VENV)/triton

.PHONY: help demo test test-slow test-kernels lint bench clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3,11) <= sys.version_info[:2] <= (3,12) else "traitdose needs Python 3.11 or 3.12, found " + sys.version.split()[0] + "; try: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "torch was installed but cannot be imported: pip took a CUDA build without its libraries. Point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL), remove $(VENV) and run make again."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)  ## Run the quickstart: warm start, reward model, two arms, evaluation, report
	@$(BIN)/traitdose run configs/experiments/quickstart.yaml

test: $(READY)  ## Run the tests (under 10 minutes on 2 cores)
	@$(BIN)/python -m pytest

test-slow: $(READY)  ## Run the tests marked slow: the embedded model, simulations
	@$(BIN)/python -m pytest -m slow --timeout=1800

test-kernels: $(READY)  ## TRL's Triton kernels, interpreted on a CPU (Linux; fetches Triton once, 190 MB)
	@PYTHONPATH=$(TRITON) $(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) $$(grep '^triton==' requirements/gpu.lock)
	@PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -m slow --timeout=1800 -rP tests/test_train_kernels.py

lint: $(READY)  ## ruff, pyright, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

bench: $(READY)  ## Time prompt sharing and rollouts against stock TRL in one run
	@$(BIN)/python -m scripts.bench

clean:  ## Remove caches and runs (keeps .venv)
	rm -rf runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
