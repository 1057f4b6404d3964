# Two commands do everything from a clean clone: `make demo` and `make test`.
# `make demo PYTHON=/path/to/python` uses an interpreter that already has the packages and downloads nothing.

VENV := .venv
ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.ready
endif

BASE_PYTHON ?= $(shell for p in python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
OUTPUT ?= out
ARGS ?=
JOBS ?= 2

.PHONY: demo test test-gpu lint format clean

demo: $(ENVIRONMENT)  ## the main job: load a layer, prefill, decode, compare with float64
	$(PYTHON) -m experiments.launch --experiment=demo --output_dir=$(OUTPUT) $(ARGS)

test: $(ENVIRONMENT) lint  ## everything that runs without a GPU
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(JOBS) -m "not gpu" $(ARGS)

test-gpu:  ## the third gate, on an H200
	$(PYTHON) -m pytest -m gpu $(ARGS)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.12 was not found: set BASE_PYTHON=/path/to/python3.12"; exit 1; }
	$(BASE_PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OUTPUT) .pytest_cache .ruff_cache .mypy_cache .hypothesis
