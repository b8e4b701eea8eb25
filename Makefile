# make train          set up .venv and train on the built-in text; pass flags on with ARGS="..."
# make test           set up .venv and run the tests
# make check          lint, types and import layers
# make codegen        compile the kernels for all GPUs, without one, and check the machine code
# make docs           build the documentation into docs/_build/html; warnings are errors
# make evidence       measure the figures of the documentation on a GPU; ARGS="--parts kernels ..."
# make figures        draw plots and write tables of the documentation from the files in results
#
# Needs Python >= 3.12 and nothing else. With an NVIDIA driver the environment gets the CUDA 13 build
# of jax, or the CUDA 12 build where the driver is too old for it; CUDA=12 or CUDA=13 decides.
# EXTRAS=torch also installs PyTorch (several GB), with which the tests compare live.

PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
EXTRAS ?=
ARGS ?=

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# nvidia-smi prints the newest CUDA version that its driver can run.
CUDA ?= $(shell nvidia-smi 2>/dev/null | grep -qE 'CUDA[A-Z ]* Version: *12\.' && echo 12 || echo 13)
CUDA_EXTRA := $(if $(HAS_GPU),cuda$(CUDA))
comma := ,

# One stamp file for each set of extras. A change of pyproject.toml installs again.
RUN_STAMP := $(VENV)/.installed-$(or $(CUDA_EXTRA),cpu)
DEV_STAMP := $(RUN_STAMP)-dev$(addprefix -,$(EXTRAS))
DOCS_STAMP := $(RUN_STAMP)-docs

# An environment of its own: jax's CUDA plugin would make every start of jax in $(VENV) complain
# that this machine has no GPU.
CODEGEN_VENV := $(VENV)/codegen

.PHONY: train test check codegen docs evidence figures clean

train: $(RUN_STAMP)
	$(VENV)/bin/python -m train.main $(ARGS)

# One pytest worker for each core, at most four. On a GPU a single process, because jax reserves the
# memory of the GPU for the first one.
test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest $(if $(HAS_GPU),,--numprocesses=auto --maxprocesses=4 --dist=worksteal) $(ARGS)

check: $(DEV_STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

codegen: $(CODEGEN_VENV)/.installed
	JAX_PLATFORMS=cpu $(CODEGEN_VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal -m codegen tests/jaxattn/test_codegen.py tests/jaxattn/test_codegen_mma.py $(ARGS)

docs: $(DOCS_STAMP)
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -E -W --keep-going --quiet docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

evidence:
	$(MAKE) EXTRAS=torch $(RUN_STAMP)-dev-torch
	$(VENV)/bin/python -m train.bench.evidence $(ARGS)

figures: $(RUN_STAMP)
	$(VENV)/bin/python docs/figures.py
	$(VENV)/bin/python docs/tables.py

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "error: Python >= 3.12 is needed, $(PYTHON) is older: set PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(RUN_STAMP): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$(if $(CUDA_EXTRA),[$(CUDA_EXTRA)])"
	@touch $@

$(DEV_STAMP): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev$(addprefix $(comma),$(CUDA_EXTRA) $(EXTRAS))]"
	@touch $@ $(RUN_STAMP)

$(DOCS_STAMP): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[docs$(addprefix $(comma),$(CUDA_EXTRA))]"
	@touch $@ $(RUN_STAMP)

$(CODEGEN_VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m venv $(CODEGEN_VENV)
	$(CODEGEN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,codegen]"
	@touch $@

clean:
	rm -rf $(VENV)
