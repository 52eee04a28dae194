# Every target does its own set-up: it needs Python 3.10+ with pip and venv, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run the tests.
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev

.PHONY: demo test test-all lint format bench clean

demo: $(INSTALLED)        ## fetch SmolLM2-135M and answer three kinds of prompts, plain and auto side by side
	$(BIN)/layerskip demo
	@echo "To type these commands: . $(BIN)/activate; to train, first: pip install -e '.[train]'"

test: $(DEV_INSTALLED)        ## the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 20

test-all: $(DEV_INSTALLED)    ## the test suite with the long exactness runs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

lint: $(DEV_INSTALLED)        ## lint, format check, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_INSTALLED)       ## time of a pass in the compiled kernels against PyTorch
	$(BIN)/python benchmarks/compiled_kernels.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "layerskip needs Python 3.10 or newer; set PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(DEV_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
