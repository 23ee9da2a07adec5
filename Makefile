# The whole tool box. Nothing is needed but Python 3.11 or newer and make.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve test lint bench bench-gpu soak image image-test

install: .venv/installed

# The pip that comes with Python may be so old that it takes twice as long. Bytecode comes from all cores, where pip takes
# one, and of the server too, which Python would compile at each start where it may write none. Not of what nothing here
# imports: libraries' own tests, a file of torch's for a later Python, which does not compile, and all that a Kubernetes
# cluster can be asked, a quarter of it all.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/py312_|/kubernetes/(aio|client/(api|models))/[^_]' .venv/lib app
	touch $@

# Every setting may be given here too, such as `make serve HTTP_PORT=9000`, or in .env, which these must not outdo. What
# may be before the first name is the mark that some editors begin a file with.
named = $(shell grep -Eqs '^[^[:alnum:]_\#]*(export[[:space:]]+)?$(1)[[:space:]]*=' .env && echo yes)
ifeq ($(call named,HTTP_PORT),)
serve: export HTTP_PORT ?= 8080
endif
ifeq ($(call named,MODEL_NAME),)
serve: export MODEL_NAME ?= sdxl
endif
ifeq ($(call named,MODEL_ID),)
serve: export MODEL_ID ?= demo
endif
serve: install
	@exec $(BIN)/sdxl-runtime

test: install
	$(BIN)/pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m tests.benchmarks.solo
	$(BIN)/python -m tests.benchmarks.probes
	$(BIN)/python -m tests.benchmarks.start
	$(BIN)/python -m tests.benchmarks.load
	$(BIN)/python -m tests.benchmarks.overload
	$(BIN)/python -m tests.benchmarks.lossy
	$(BIN)/python -m tests.benchmarks.memory
	$(BIN)/python -m tests.readme

soak: install
	$(BIN)/python -m tests.benchmarks.soak
	$(BIN)/python -m tests.readme

# On a machine with a GPU; `make bench-gpu ARGS='--model sdxl --levels compile max'` runs a piece of it.
bench-gpu: install
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)
	$(BIN)/python -m tests.readme

# With CUDA, on the base image that the Containerfile names; `make image BUILD='docker build' IMAGE=registry/name:tag`.
BUILD ?= podman build --format docker
IMAGE ?= sdxl-runtime:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
image:
	$(BUILD) --file Containerfile --tag $(IMAGE) --build-arg VERSION=$(lastword $(subst :, ,$(IMAGE))) \
	  --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%Y-%m-%dT%H:%M:%SZ) .

# Builds the image on a Debian and serves the demo from it; takes minutes, and root with buildah and debootstrap.
image-test: install
	$(BIN)/pytest --numprocesses 0 tests/image/check_image.py
