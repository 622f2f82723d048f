# `make run` and `make test` need Python 3.11 or newer with venv; `make test` needs Node 20 or newer and gcc as well.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 3210
DATABASE ?= data/engine.db

BIN := .venv/bin
CLIENTS := tests/clients
NODE_MODULES := $(CLIENTS)/node_modules/.package-lock.json
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# What is installed is what the lock files say, byte for byte; the package itself is built with what they lock too.
INSTALL_LOCKED := $(PIP_INSTALL) --require-hashes --requirement
INSTALL_ITSELF := $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
# One file for every platform and every Python that is supported: what differs is marked in it.
LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-annotate --no-strip-extras --custom-compile-command 'make lock' --group build pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help run test lint types unit audit soak bench flames lock clean

help: ## say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

run: .venv/installed ## serve the demo app on http://127.0.0.1:3210, reloading functions on save
	@$(BIN)/engine run --database $(DATABASE) demo:seed > /dev/null
	@echo 'For the commands below, in another terminal: . .venv/bin/activate'
	@$(BIN)/engine dev --database $(DATABASE) --host $(HOST) --port $(PORT)

test: .venv/installed-dev $(NODE_MODULES) ## everything: lint, types, tests and the real clients
	@status=0; \
	$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target lint types audit || status=1; \
	$(MAKE) --no-print-directory unit || status=1; \
	exit $$status

lint: .venv/installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev ## mypy, strict
	$(BIN)/mypy

unit: .venv/installed-dev $(NODE_MODULES) ## pytest, with the official clients in Node and Python
	$(BIN)/pytest --numprocesses 2 --dist loadfile

audit: .venv/installed-dev ## look the locked dependencies up among the known vulnerabilities
	@$(BIN)/python .ci/audit.py

soak: .venv/installed-dev $(NODE_MODULES) ## tests/reliability in the sizes of a night (some 3 hours), and half an hour of everyday load
	@status=0; \
	night() { echo "== $$1, REL_N=$$2"; REL_N=$$2 $(BIN)/pytest --quiet -s "tests/reliability/test_$$1.py" || status=1; }; \
	night serializability 115000; night kill 500; night power_loss 1120; night io_faults 300; night bit_rot 250; \
	night malformed 100000; night reconnect 2000; night scheduled 100000; night scheduled_kills 200; \
	night function_faults 10000; night reported_bugs 20; \
	REL_SECONDS=10 $(BIN)/pytest --quiet -s tests/reliability/test_slow_clients.py tests/reliability/test_abuse.py || status=1; \
	$(BIN)/python -m tests.reliability.soak || status=1; \
	exit $$status

bench: .venv/installed-dev ## what it costs; the figures so far are in bench/RESULTS.md
	$(BIN)/pytest bench
	$(BIN)/python -m bench.load --short

flames: .venv/installed-dev ## flame graphs of the server under load, into bench/flames
	$(BIN)/python -m bench.load --only 1,4,7 --flames bench/flames

lock: .venv/bin/python ## take the newest dependencies that pyproject.toml allows, and write down their hashes
	$(PIP_INSTALL) uv
	$(LOCK) --output-file requirements.lock
	$(LOCK) --extra dev --extra bench --constraints requirements.lock --output-file requirements-dev.lock

clean: ## remove what the other targets made, but not the data
	rm -rf .venv $(CLIENTS)/node_modules bench/peers/*/.venv bench/peers/*/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml requirements.lock | .venv/bin/python
	$(INSTALL_LOCKED) requirements.lock
	$(INSTALL_ITSELF)
	@touch $@

.venv/installed-dev: pyproject.toml requirements-dev.lock | .venv/bin/python
	$(INSTALL_LOCKED) requirements-dev.lock
	$(INSTALL_ITSELF)
	@touch $@ .venv/installed

$(NODE_MODULES): $(CLIENTS)/package-lock.json
	npm ci --prefix $(CLIENTS) --no-audit --no-fund
	@touch $@
