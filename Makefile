# `make demo` and `make test` set up .venv and need only Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned so that a run today and a run next year install the same thing.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.0
DIFFUSERS ?= diffusers==0.42.1
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py pyproject.toml cosmos3_fast/__init__.py $(wildcard csrc/*.* csrc/*/*.*)
# The tests also build and inspect the CUDA kernels wherever nvcc is found; no GPU is needed.
TEST_CUDA := $(if $(shell command -v nvcc),1,)

.PHONY: help demo test lint format verify clean
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: | $(BIN)/python
	$(PIP) "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.12"
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(SOURCES)
	COSMOS3_FAST_BUILD=require $(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/demo.stamp: $(VENV)/package.stamp
	$(PIP) "$(DIFFUSERS)"
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) "$(DIFFUSERS)" "$(TRITON)"
	COSMOS3_FAST_BUILD=require $(if $(TEST_CUDA),COSMOS3_FAST_CUDA=1) \
		$(PIP) --no-build-isolation -e ".[test,lint]"
	@touch $@ $(VENV)/package.stamp

## make demo    set up, turn the example photograph into latents, time it against the 3-D VAE
demo: $(VENV)/demo.stamp
	$(BIN)/python benchmarks/demo.py --out out

## make test    set up, check style and types, inspect the CUDA kernels, run every test
test: lint
	$(BIN)/python tests/cuda_binary.py
	$(BIN)/python -m pytest

## make lint    ruff, clang-format and mypy, as pre-commit runs them
lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.*)
	$(BIN)/mypy

## make format  rewrite the sources as lint wants them
format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

## make verify  compare the fast and the reference encoder on this machine, per dtype
verify: $(VENV)/demo.stamp
	$(BIN)/python -m cosmos3_fast verify

## make clean   remove what the targets above made
clean:
	rm -rf $(VENV) .venv-* build out cosmos3_fast/*.so cosmos3_fast/_not_built.txt *.egg-info
