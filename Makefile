# make demo   compile the embedded model to int8 and compare perplexity before and after
# make test   everything a change has to pass: lint, types, tests
# make lint   ruff and mypy alone
# make test-eval  the tests that need lm-eval, which make test skips
# make docs   the documentation as a site, into build/site
# make test-gpu  the tests of kernels and of whole models on a CUDA device
# make clean  remove the environment and what was built
#
# PYTHON chooses the interpreter (3.11 or 3.12), VENV the environment, PYTEST_ARGS what pytest runs,
# TEST_WORKERS in how many processes.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO_MODEL ?= demo
DEMO_PASSES ?= hadamard,percentile
DEMO_OUT ?= build/demo
DEMO_WINDOWS ?= 64

# pip resolves by the pins, also in the isolated environment in which it builds the package: for
# that one it reads the first name or the second, by its version.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

# On a busy machine, threads that spin while they wait steal each other's time.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-eval test-gpu lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# pip comes last into a new environment: without it the environment is not whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "ssmc needs Python 3.11 or 3.12, and $(PYTHON) is not; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-eval: $(VENV)/.installed-dev
	$(PIP) install -e '.[dev,eval]' accelerate
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -e '.[docs]'
	@touch $@ $(VENV)/.installed

# Strict: a page that nothing leads to, or a link that leads nowhere, is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

demo: $(VENV)/.installed
	$(BIN)/ssmc compile $(DEMO_MODEL) --passes $(DEMO_PASSES) -o $(DEMO_OUT) --force
	$(BIN)/ssmc eval $(DEMO_MODEL) --limit $(DEMO_WINDOWS)
	$(BIN)/ssmc eval $(DEMO_OUT) --limit $(DEMO_WINDOWS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A thread for each worker: the tests are many and small.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) $(PYTEST_ARGS)

# lm-eval brings fifty packages of 600 MB, which is why `dev` leaves it out.
test-eval: $(VENV)/.installed-eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/evaluate tests/cli/test_tasks.py $(PYTEST_ARGS)

# Of kernels and of whole models: what a GPU decides. PYTHON itself runs them, with the torch and
# the Triton it has, since a machine with a GPU seldom has what constraints.txt pins.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "there is no CUDA device" >&2; exit 4; }
	SSMC_TEST_GPU=1 PYTHONPATH=.:$$PYTHONPATH $(PYTHON) -m pytest tests/gpu tests/kernels $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
