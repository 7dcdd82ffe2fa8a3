# make quickstart | test | lint | clean.  VENV and PYTHON choose another environment; PINS adds requirements, e.g. PINS="jax==0.11.2".
VENV ?= .venv
PYTHON ?= python3
PINS ?=
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.has-plot
	$(BIN)/python -m experiments.retrofit --config=configs/quickstart.py --workdir=runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.has-%: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
