# Everything runs in virtual environments inside this clone; the only other thing used is pip's own cache.
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-latest test-gpu test-full te-check kernels-aot latest-python lint format bench loss-compare bench-kernels bench-layouts bench-conversion bench-step docs faults gpu-first clean

VENV := .venv
LATEST := .venv-latest
# Compilers for GPUs that need not be here: 1 GB, shared by all clones.
AOT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llada-mega/kernels-aot-venv
BIN := $(VENV)/bin
# A candidate must run (pyenv leaves shims that do not), be recent enough and be able to make an environment.
find_python = $(shell for python in $(1) python3 python $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python 2>/dev/null | sort -V); do \
	if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < $(2))' >/dev/null 2>&1; then echo "$$python"; break; fi; done)
PYTHON ?= $(call find_python,python3.11 python3.12 python3.13 python3.14,(3, 11))
LATEST_PYTHON ?= $(call find_python,python3.12 python3.13 python3.14,(3, 12))
INPUTS := pyproject.toml setup.py constraints.txt
PYTEST_WORKERS ?= 2
PIP_INSTALL := -m pip install --quiet --constraint constraints.txt

help:
	@echo "make quickstart    turn SmolLM2-135M into a block-diffusion model on this machine (QUICKSTART=moe: a tiny MoE)"
	echo "make test          all tests; PYTEST='-k name' narrows them"
	echo "make test-latest   model tests on Python 3.12+ with the newest supported Megatron-Core"
	echo "make test-gpu      tests that need a CUDA device"
	echo "make gpu-first     the first hour on a GPU: doctor, tests, kernel table, a step of the 16B shapes, into docs/gpu_results.md"
	echo "make lint          ruff, mypy, shellcheck"
	echo "make format        let ruff rewrite the sources"
	echo "make bench         the step against a plain one, its scaling, data, saves, optimizer; JSON and plots (ARGS='step data ...')"
	echo "make loss-compare  do two runs of 50 steps still make the loss curves kept in tests/golden? (ARGS='--update --reason \"...\"')"
	echo "make bench-kernels attention of every backend on this device; table, JSON, plot (ARGS=--quick: a few cases)"
	echo "make bench-step    a whole training step on one core against the way published trainers write it, and against the floor"
	echo "make bench-layouts a run moved between parallel layouts, drawn; speed, memory and bytes of every layout (8 minutes; ARGS=--figure, --table)"
	echo "make bench-conversion memory and time of import and export at the widths of Ling-flash (32 GB of disk; ARGS=--stacked)"
	echo "make faults        a small run on two processes through 65 injected faults against the same run left alone (Linux; ARGS='--count 13')"
	echo "make docs          write docs/configuration.md and docs/commands.md from the sources, and the site into build/site"
	echo "make kernels-aot   compile the GPU kernels without a GPU; registers, memory, spills, instructions"
	echo "make te-check      TransformerEngine's models, built without a GPU, against the local ones (compiles for 22 CPU-minutes once)"
	echo "make test-full     the parallel layouts that make test leaves out, against one process"
	echo "make clean         remove the environments"

# One recipe for both environments: Python, then torch (pinned per Python version), then the project with its extras.
define install
	@test -n "$(2)" || { echo "error: no Python $(3) or newer with venv and ensurepip was found; install one or set $(4)=/path/to/python" >&2; exit 2; }
	"$(2)" -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) torch
	$(1)/bin/python $(PIP_INSTALL) --editable '.[dev,docs,logging]'
	touch $(1)/.installed
endef

$(VENV)/.installed: $(INPUTS)
	$(call install,$(VENV),$(PYTHON),3.11,PYTHON)

$(LATEST)/.installed: $(INPUTS)
	$(call install,$(LATEST),$(LATEST_PYTHON),3.12,LATEST_PYTHON)

AOT_REQUIREMENTS := import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*project['optional-dependencies']['kernels-aot'], sep='\n')

$(AOT)/.installed: $(INPUTS)
	@mkdir -p $(AOT)
	"$(PYTHON)" -m venv $(AOT)
	$(AOT)/bin/python $(PIP_INSTALL) torch
	$(AOT)/bin/python -c "$(AOT_REQUIREMENTS)" > $(AOT)/requirements.txt
	$(AOT)/bin/python $(PIP_INSTALL) --requirement $(AOT)/requirements.txt
	touch $(AOT)/.installed

TE := .venv-te
$(TE)/.installed: $(INPUTS) tests/te/environment.sh
	@bash tests/te/environment.sh "$(LATEST_PYTHON)" $(TE)

te-check: $(TE)/.installed
	@bash tests/te/run.sh $(TE) -m tests.te.check $(ARGS)
	MEGATRON=0.16 bash tests/te/run.sh $(TE) -m tests.te.check $(ARGS)
	bash tests/te/run.sh $(TE) -m tests.te.features
	MEGATRON=0.16 bash tests/te/run.sh $(TE) -m tests.te.features

quickstart: $(VENV)/.installed
	@$(BIN)/llada-mega quickstart $(if $(filter moe,$(QUICKSTART)),experiment=quickstart_moe) $(ARGS)

test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST)

test-latest: $(LATEST)/.installed
	@OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest tests/models $(PYTEST)
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest --ignore=tests/models -m latest $(PYTEST)

test-gpu: $(VENV)/.installed
	@$(BIN)/python $(PIP_INSTALL) --editable '.[cudnn]'
	$(BIN)/python -m pytest -m gpu $(PYTEST)

gpu-first: $(VENV)/.installed
	@$(BIN)/python -m bench.gpu_first $(ARGS)

# Every layout against one process; `make test` runs some of them.
test-full: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST)

kernels-aot: $(AOT)/.installed
	@PYTHONPATH=kernels $(AOT)/bin/python -m llada_kernels.backends.triton_compile
	PYTHONPATH=kernels $(AOT)/bin/python -m aot $(ARGS)

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z '*.sh' .ci/run | xargs -0 $(BIN)/shellcheck

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m bench $(ARGS)

loss-compare: $(VENV)/.installed
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m bench.loss_compare $(ARGS)

bench-kernels: $(VENV)/.installed
	@$(BIN)/python -m llada_kernels.bench $(ARGS)

bench-layouts: $(VENV)/.installed
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m bench.layouts $(ARGS)

bench-step: $(VENV)/.installed
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m bench.step $(ARGS)

bench-conversion: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.conversion $(ARGS)

faults: $(VENV)/.installed
	@OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m bench.faults $(ARGS)

docs: $(VENV)/.installed
	@$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	echo build/site/index.html

latest-python:
	@echo "$(LATEST_PYTHON)"

clean:
	@rm -rf $(VENV) $(LATEST) $(TE) build dist ./*.egg-info
