# `make run` and `make test` need Python 3.11 or newer with venv; `make test` needs Node 20 or newer as well.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 3210
DATABASE ?= data/engine.db

BIN := .venv/bin
CLIENTS := tests/clients
NODE_MODULES := $(CLIENTS)/node_modules/.package-lock.json
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

.DEFAULT_GOAL := help
.PHONY: help run test lint types unit bench flames clean

help: ## say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

run: .venv/installed ## serve the demo app on http://127.0.0.1:3210, reloading functions on save
	@$(BIN)/engine run --database $(DATABASE) demo:seed > /dev/null
	@echo 'For the commands below, in another terminal: . .venv/bin/activate'
	@$(BIN)/engine dev --database $(DATABASE) --host $(HOST) --port $(PORT)

test: .venv/installed-dev $(NODE_MODULES) ## everything: lint, types, tests and the real clients
	@status=0; \
	$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target lint types || status=1; \
	$(MAKE) --no-print-directory unit || status=1; \
	exit $$status

lint: .venv/installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev ## mypy, strict
	$(BIN)/mypy

unit: .venv/installed-dev $(NODE_MODULES) ## pytest, with the official clients in Node and Python
	$(BIN)/pytest --numprocesses 2 --dist loadfile

bench: .venv/installed-bench ## what it costs; the figures so far are in bench/RESULTS.md
	$(BIN)/pytest bench
	$(BIN)/python -m bench.load --short

flames: .venv/installed-bench ## flame graphs of the server under load, into bench/flames
	$(BIN)/python -m bench.load --only 1,4,7 --flames bench/flames

clean: ## remove what the other targets made, but not the data
	rm -rf .venv $(CLIENTS)/node_modules bench/peers/*/.venv bench/peers/*/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(INSTALL) .
	@touch $@

.venv/installed-%: pyproject.toml | .venv/bin/python
	$(INSTALL) '.[$*]'
	@touch $@

$(NODE_MODULES): $(CLIENTS)/package-lock.json
	npm ci --prefix $(CLIENTS) --no-audit --no-fund
	@touch $@
