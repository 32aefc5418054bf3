# Everything runs from the repository root in .venv, which `make setup` makes when requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NPROC ?= 4
ARGS ?=

.PHONY: setup train test test-full lint bench clean

setup: $(STAMP)

# torch first and by itself: asked for through another package, pip may pick another build of it.
$(STAMP): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/torchrun --nproc-per-node $(NPROC) train.py --cp-size $(NPROC) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

# All of it, also what only repeats on more layouts what every push sees: about twice as long.
test-full: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "full or not full" $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .mypy_cache
