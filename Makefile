# Two commands from a fresh clone: `make demo` and `make test`. Everything else is for people who change the code.
PYTHON ?= python3
VENV ?= .venv
# Pinned so that pip resolves a CPU build where one is offered; any torch >= 2.7 works.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
JOBS ?= 2

.PHONY: help setup demo test lint format lib ops-test sanitize clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml custom_ops/CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[cpu,export,report,dev]"
	touch $@

setup: $(STAMP)  ## create .venv and install the package with its op library

demo: $(STAMP)  ## a real language model: export, convert, compare with onnxruntime's own int4 and int8
	$(BIN)/python tools/demo.py

test: $(STAMP) ops-test  ## everything that a machine without a GPU can check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)  ## apply ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find custom_ops -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | xargs $(BIN)/clang-format -i

clean:  ## remove build products (not .venv, not the model cache)
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
