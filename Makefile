# The whole tool box. Nothing is needed but Python 3.11 or newer and make.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve test lint bench

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

# Every setting may be given here too, such as `make serve HTTP_PORT=9000`.
serve: export HTTP_PORT ?= 8080
serve: export MODEL_NAME ?= sdxl
serve: export MODEL_ID ?= demo
serve: install
	@exec $(BIN)/sdxl-runtime

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks.solo
	$(BIN)/python -m tests.benchmarks.probes
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.readme
