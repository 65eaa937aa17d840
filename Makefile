# Two commands for a fresh machine with python3, pip and make: `make demo` and `make test`.
# Each sets up .venv by itself; the stamps make a second run start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test check lint types format soak clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv

$(VENV)/.demo: $(BIN)/uv pyproject.toml constraints.txt
	@echo "Installing layerwise and what the demo needs into $(VENV) (torch and its libraries: about 5 GB, once) ..."
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/uv pyproject.toml constraints.txt
	@echo "Installing layerwise and its development tools into $(VENV) ..."
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## the whole walk on an embedded default: train, analyze, plan, compress, prove, export, record
	@$(BIN)/layerwise demo

test: $(VENV)/.dev  ## all tests but the long ones
	$(BIN)/python -m pytest -n 2 -m "not soak" $(ARGS)

check: lint types  ## the one gate before a commit: format, lint, types

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the files to the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(VENV)/.dev  ## long kill, disk and load runs; results under benchmarks/results/
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean:  ## remove what make made
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
