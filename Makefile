# On a fresh machine (Python 3.10 or newer, pip, make): `make demo`, `make test`, `make study`.
# Everything is installed into a virtual environment of its own, at pinned versions.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo study test lint types mutants traps format docs dist clean

help:  ## show this list
	@echo "usage: make TARGET [PYTHON=python3] [VENV=.venv]"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/installed-plot  ## vanilla PPO against PPO-max on a toy world, with curves
	$(BIN)/python examples/ppo_llama.py

study: $(VENV)/installed-plot  ## the paper's findings run again, into outputs/study/; hours, can be interrupted
	$(BIN)/python examples/secrets_study.py

test: $(VENV)/installed-dev  ## the tests, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --durations 10

lint: $(VENV)/installed-dev  ## style, format, import layers, sizes, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_size.py
	$(BIN)/python tools/check_docs.py

types: $(VENV)/installed-dev  ## static types
	$(BIN)/mypy

mutants: $(VENV)/installed-dev  ## faults in the numerical code that no test sees; takes long
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py $(FILES)

traps: $(VENV)/installed-dev  ## mistakes of earlier libraries put back, each for its test to see
	OMP_NUM_THREADS=1 $(BIN)/python tools/traps.py

format: $(VENV)/installed-dev  ## rewrite the sources in the style `lint` asks for
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs  ## the documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/installed-dist  ## source archive and wheel, into dist/, tried in an empty environment
	rm -rf dist build/tried
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/tried
	build/tried/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build && tried/bin/python -c "import mossrlhf; print(mossrlhf.__version__, mossrlhf.Trainer)"
	cd build && tried/bin/mossrlhf --help

clean:  ## remove the environment, builds and caches; outputs/ is kept
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras; a change of the requirements installs again.
$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing mossrlhf[$*] into $(VENV); the first time this takes a few minutes."
	$(PIP) install --quiet --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

# Where Python comes without ensurepip, its own pip fills the new environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mossrlhf needs Python 3.10 or newer, got %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	@echo "Creating a virtual environment in $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $@ --disable-pip-version-check install --quiet pip; }
