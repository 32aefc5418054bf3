# Everything runs from the repository root in .venv, which `make setup` makes when requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NPROC ?= 4
ARGS ?=
TE_PYTHON ?= python3

.PHONY: setup train test test-full test-te-import lint bench clean

setup: $(STAMP)

# torch first and by itself: asked for through another package, pip may pick another build of it.
# Transformer Engine's Python sources (1 MB, no CUDA, not on the path) are what tests/unit/test_te_contract.py checks our calls against.
$(STAMP): requirements.txt requirements-gpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	rm -rf .venv/te_sources
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/te_sources "$$(sed -n 's/\[pytorch\]//p' requirements-gpu.txt)"
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/torchrun --nproc-per-node $(NPROC) train.py --cp-size $(NPROC) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# All of it, also what only repeats on more layouts what every push sees: about twice as long.
test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "full or not full" $(ARGS)

# Transformer Engine itself, without a GPU (docs/gpu.md): TE_PYTHON is an environment's python in which it can be imported.
test-te-import:
	OMP_NUM_THREADS=1 $(TE_PYTHON) -m pytest -p no:cacheprovider tests/te_import $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache
