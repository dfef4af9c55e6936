# Every target sets up .venv first and returns at once if that is done. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: two test workers on two cores would otherwise wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test check bench docs

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | column -t -s '|'

setup:
	@$(PYTHON) scripts/setup_env.py

setup-dev:
	@$(PYTHON) scripts/setup_env.py dev eval

run: setup ## Set up, then make a reasoning model from scratch and report on it
	$(BIN)/phikit run nano_reasoner

test: setup-dev ## Set up, then run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile

check: setup-dev ## Linter, formatter, type checker, and the tests of the code's shape
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/shape

bench: ## Set up, then compare with peers side by side
	@$(PYTHON) scripts/setup_env.py dev bench
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.sampler
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.replay
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.rollout

docs: setup ## Write the generated pages of docs/
	$(BIN)/python scripts/build_docs.py
