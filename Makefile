# Every target sets up what it needs in .venv, from the tested versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all quick contracts durations lint format docs hooks bench report compile-report \
	matrix oldest evidence gpu prime clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## .venv with everything that is needed to work here

demo: $(READY) ## train a tiny LLaVA and ask it about pictures; the report goes to demo-out/
	$(BIN)/llava-fast demo

test: $(READY) ## the tests
	$(BIN)/python -m pytest

test-all: $(READY) ## the tests, and every case of them in every dtype
	$(BIN)/python -m pytest --exhaustive

quick: $(READY) ## style, and the tests but the slow ones: under three minutes on two cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

durations: $(READY) ## measure the tests anew: which ones `make quick` leaves out (tests/slow.txt)
	$(BIN)/python -m pytest -p tests.seconds --seconds build/seconds.json
	$(BIN)/python -m tests.seconds build/seconds.json

contracts: $(READY) ## transformers' own common tests on our classes; downloads its source (10 MB)
	$(BIN)/python tests/contracts/common.py

lint: $(READY) ## style, likely mistakes, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## the documentation, into build/site; a broken link or name is an error
	$(BIN)/python docs/recipe_keys.py
	$(BIN)/python docs/evidence.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

hooks: $(READY) ## have git run ruff and mypy before each commit
	$(BIN)/pre-commit install

bench: $(READY) ## the benchmarks; results go to benchmarks/results/
	$(BIN)/python -m pytest benchmarks --benchmark --results benchmarks/results

report: $(READY) ## tables and plots of the stored results, in README.md and docs/; ADD=FILE stores a GPU's first
	$(BIN)/python -m benchmarks.report $(if $(ADD),--add $(ADD))

compile-report: $(READY) ## compile every kernel for A100 and H100, no GPU needed; fails on spills
	$(BIN)/python -m benchmarks.compile_report

matrix: $(READY) ## kernels with other versions of Triton, tests with other versions of PyTorch; the result is stored
	$(BIN)/python -m benchmarks.matrix; status=$$?; $(BIN)/python docs/evidence.py; exit $$status

oldest: $(READY) ## the tests with the oldest versions of all packages that pyproject.toml allows
	$(BIN)/python -m benchmarks.matrix --torch oldest

evidence: $(READY) ## which tests run which kernel, in which dtype: stored, and shown in docs/evidence.md
	$(BIN)/python -m tests.evidence
	$(BIN)/python docs/evidence.py

# Where PYTHON is given, that one is used as it is: a GPU machine may have its own PyTorch, and no network.
OUT ?= build/gpu
ifeq ($(origin PYTHON),file)
gpu: $(READY)
gpu: GPU_PYTHON := $(BIN)/python
else
gpu: GPU_PYTHON := $(PYTHON)
endif
gpu: ## measure, test and tune in ten minutes: make gpu OUT=dir [SUBJECT=norm] [CACHE=dir] [WHEELS=dir] [PYTHON=python3]
	$(GPU_PYTHON) -m benchmarks.gpu --out $(OUT)$(if $(SUBJECT), --subject $(SUBJECT))$(if $(CACHE), --cache $(CACHE))$(if $(WHEELS), --wheels $(WHEELS))$(if $(RESUME), --resume $(RESUME))

# The version of Triton on the GPU machine.
TRITON ?= 3.6.0
prime: $(READY) ## compile for an H100, no GPU needed, what `make gpu CACHE=build/gpu-cache` will launch: TRITON=3.6.0
	$(BIN)/python -m benchmarks.prime --out build/gpu-cache --triton $(TRITON)

clean: ## remove what was built, and the demo's output; .venv stays
	rm -rf build dist demo-out *.egg-info llava_fast/_cuda*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# A Python without ensurepip (Debian's, without python3-venv) has its pip put pip into the environment.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps --ignore-requires-python ttsem
	@touch $@
