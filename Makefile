# `make help` lists the targets. All but *-gpu happens in .venv, made from nothing by whichever target needs it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: help setup train train-fsdp compare check test test-distributed lint sanitize bench test-gpu bench-gpu accuracy format docs \
	stubs wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: $(VENV)/.installed  ## make .venv: the pinned tools, and this package built and installed in it

$(VENV)/.tools: constraints.txt tools/requirements.py pyproject.toml
	@$(PYTHON) tools/requirements.py --check
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PYTHON) tools/requirements.py dev | $(PIP) -r /dev/stdin
	touch $@

$(VENV)/.installed: $(VENV)/.tools CMakeLists.txt $(wildcard csrc/*)
	$(PIP) --no-build-isolation --no-deps -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON -e .
	touch $@

train: setup  ## the main job: train a small GPT with lucid.optim (ARGS="--compare" and others: see --help)
	$(BIN)/python examples/train_gpt.py $(ARGS)

train-fsdp: setup  ## the same model on 2 processes with FSDP2 and 8-bit state (ARGS="--resume" and others)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py $(ARGS)

compare: setup  ## the same training with lucid's AdamW and torch's, side by side
	$(BIN)/python examples/train_gpt.py --compare

check: setup lint  ## in six minutes: lint, types, and of every test a few cases, in which every value of each parameter is
	$(BIN)/python tools/tests.py --quick $(ARGS)

test: setup lint  ## everything that must pass: lint, types, formats, tests, doctests
	$(BIN)/python tools/tests.py $(ARGS)

test-distributed: setup  ## of these, the tests of several processes alone
	$(BIN)/python -m pytest -m distributed $(ARGS)

lint: setup  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp

format: setup  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp

sanitize: setup  ## build the engine with address/undefined-behaviour and thread sanitizers and run its tests under each
	tools/sanitize.sh

bench: setup  ## measure the step beside torch's (and DeepSpeed's where installed); writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.step $(if $(ARGS),$(ARGS),--markdown benchmarks/RESULTS.md)

test-gpu:  ## the tests that need a CUDA device, with what PYTHON has installed, this package among it
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests/gpu $(ARGS)

bench-gpu:  ## measure on a CUDA device, with what PYTHON has installed, not .venv; writes benchmarks/RESULTS-gpu.md
	$(PYTHON) -m benchmarks.gpu $(if $(ARGS),$(ARGS),--markdown benchmarks/RESULTS-gpu.md)

accuracy: setup  ## measure the error against exact arithmetic, as docs/numerics.md shows it
	$(BIN)/python -m benchmarks.accuracy

docs: setup  ## build the documentation into build/site (python -m http.server -d build/site shows it)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

stubs: setup  ## write the types of the CPU engine's extension anew, after a change in csrc/bindings.cpp
	$(BIN)/python tools/stubs.py

wheel: setup  ## build the sdist and, from it alone, the wheel of this Python and machine into dist/, with the pinned tools
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:  ## remove what was built
	rm -rf $(VENV) build dist runs
