# The two commands of the README are `make demo` and `make test`. Both need Python 3.11+, git and make, nothing else:
# the first call makes .venv/ (a stamp file makes the second call instant).

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The newest Python on the PATH that is 3.11 or later; override with `make demo PYTHON=/path/to/python3`.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$python"; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PYTEST_ARGS ?=
# Processes; most tests wait for others. Each that gets a Kafka test runs a broker of its own (400 MB).
TEST_WORKERS ?= auto

.PHONY: help demo demo-kafka test lint format bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.demo ## Train 10 models in parallel and query what they logged (KAFKA=1: through a real broker)
	@if [ -n "$(KAFKA)" ]; then $(BIN)/python deploy/local/kafka_demo.py; else $(BIN)/python -m runstream demo; fi

demo-kafka: ## The same through a real Kafka broker and worker, all stopped afterwards (needs Java and Maven)
	@$(MAKE) --no-print-directory demo KAFKA=1

test: $(VENV)/.dev ## All tests; Kafka tests need Java and Maven, and say so when they are skipped
	@$(BIN)/python -m pytest --numprocesses=$(TEST_WORKERS) --maxprocesses=4 --dist=loadfile $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, mypy and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## List the benchmarks; each is one command
	@cat bench/README.md

clean: ## Remove the environment and caches; data directories stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "runstream needs Python 3.11 or later; install it or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing runstream with its demo into $(VENV) (once; about a minute)"
	@RUNSTREAM_BUILD_UI=0 $(PIP) install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing runstream with its development tools into $(VENV) (once; about a minute)"
	@RUNSTREAM_BUILD_UI=0 $(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.demo
