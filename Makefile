# `make demo` and `make test` are the two commands of the README; `make check` is the linters'.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test nightly check clean

demo: $(VENV)/.app
	$(BIN)/fgl run

# One process per core, one thread each: the tests' models are too small for more.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses logical --dist loadfile --no-loadscope-reorder

# 10,000 examples of everything that hypothesis makes, then kills at random moments and the containers: hours.
nightly: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses logical --hypothesis-profile nightly -m hypothesis
	$(BIN)/python -m pytest -q -m nightly

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml fgl_app strategies clients

$(VENV)/.app: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[audit,pictures,privacy]'
	touch $@

$(VENV)/.dev: $(VENV)/.app
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build
