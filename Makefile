# `make demo` and `make test` need only Python and pip.
# Each target first makes a virtual environment in .venv if there is none.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One test process per core, with one thread each (OMP_NUM_THREADS).
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-all check format docs mutation clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests
	$(BIN)/python -m pytest -m slow tests

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the site to build/site; links that lead nowhere are errors.
docs: $(STAMP)
	$(BIN)/python -m pip install -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict

# Some modules only: make mutation MODULES="ema confusion"
mutation: $(STAMP)
	$(BIN)/python -m pip install -e ".[mutation]"
	$(BIN)/python tests/mutation.py --processes $(WORKERS) $(MODULES)

# The environment is updated when pyproject.toml, which lists the dependencies, changes.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
