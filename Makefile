# The whole tool box. `make serve` and `make test` need nothing but Python 3.11 or newer and make.

PYTHON ?= python3
BIN := .venv/bin
HTTP_PORT ?= 8080
MODEL_NAME ?= sdxl
MODEL_ID ?= demo
export HTTP_PORT MODEL_NAME MODEL_ID

.PHONY: install serve test lint bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

serve: install
	exec $(BIN)/sdxl-runtime

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks.solo
	$(BIN)/python -m tests.benchmarks.probes
	$(BIN)/python -m tests.readme
