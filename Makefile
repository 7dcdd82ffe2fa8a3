# make quickstart | test | lint | parity | notebooks | aot | clean.  VENV and PYTHON choose another environment; PINS adds requirements, e.g. PINS="jax==0.11.2".
VENV ?= .venv
PYTHON ?= python3
PINS ?=
PARITY_VENV ?= .venv-parity
NOTEBOOKS_VENV ?= .venv-notebooks
BIN := $(VENV)/bin

.PHONY: quickstart test lint parity notebooks aot gpu-check clean

quickstart: $(VENV)/.has-plot
	$(BIN)/python -m experiments.retrofit --config=configs/quickstart.py --workdir=runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Against the installed transformers; torch comes first and alone, or pip looks for a build of its own choice.
parity: $(PARITY_VENV)/.has-parity
	$(PARITY_VENV)/bin/python -m pytest -n 2 tests/parity

$(PARITY_VENV)/.has-parity: setup.py pyproject.toml
	test -x $(PARITY_VENV)/bin/python || $(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[parity,test]"
	touch $@

# Runs every notebook from its source and writes its outputs; trained anew, in a directory for temporary files of its own.
notebooks:
	$(MAKE) $(NOTEBOOKS_VENV)/.has-notebooks VENV=$(NOTEBOOKS_VENV)
	export TMPDIR=$$(mktemp -d) && $(NOTEBOOKS_VENV)/bin/python -m experiments.notebooks.build; status=$$?; rm -r "$$TMPDIR"; exit $$status

$(VENV)/.has-%: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable ".[$*]"
	touch $@

# Compiles every GPU kernel for an H200, on a machine without one; needs Python 3.12 and 5 GB for its own environment.
AOT_PYTHON ?= $(firstword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python) python3.12)
aot:
	$(MAKE) .venv-aot/.has-aot VENV=.venv-aot PYTHON=$(AOT_PYTHON)
	.venv-aot/bin/python -m dsa_jax.benchmarks.aot $(AOT_ARGS)

# On the GPU at hand: every kernel is checked, then timed. GPU_PYTHON has jax with CUDA; nothing is installed.
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) -m dsa_jax.benchmarks.gpu_check --output=experiments/results/gpu_check.json

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(NOTEBOOKS_VENV) .cache build *.egg-info
