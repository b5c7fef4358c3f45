# `make demo` and `make test` set up .venv and need only Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned so that a run today and a run next year install the same thing.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.0
DIFFUSERS ?= diffusers==0.42.1
MATPLOTLIB ?= matplotlib==3.11.2
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := setup.py pyproject.toml cosmos3_fast/__init__.py $(wildcard csrc/*.* csrc/*/*.*)
# The tests also build and inspect the CUDA kernels wherever nvcc is found; no GPU is needed.
TEST_CUDA := $(if $(shell command -v nvcc),1,)

# The engines' requirements exclude each other: each has an environment of its own.
PACKAGE_FILES := $(shell find cosmos3_fast -name "*.py")

.PHONY: help demo bench bench-full bench-bulk test test-bulk fuzz wheels lint format verify clean test-engines test-diffusers test-sglang test-vllm-omni test-releases
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
	$(PIP) "$(DIFFUSERS)" "$(TRITON)" "$(MATPLOTLIB)"
	COSMOS3_FAST_BUILD=require $(if $(TEST_CUDA),COSMOS3_FAST_CUDA=1) \
		$(PIP) --no-build-isolation -e ".[test,lint]"
	@touch $@ $(VENV)/package.stamp

## make demo    set up, turn the example photograph into latents, time it against the 3-D VAE
demo: $(VENV)/demo.stamp
	$(BIN)/python -m benchmarks.demo --out out

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(PIP) "$(MATPLOTLIB)" pyarrow tqdm fsspec
	@touch $@

## make bench   measure against the 3-D VAE, the engines' formula and a plain copy (5 minutes)
bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run --out out/bench

## make bench-full    every size, more rounds, and README's table and plot from it (45 minutes)
bench-full: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run --full --out benchmarks/results/cpu
	$(BIN)/python -m benchmarks.readme

## make test    set up, check style and types, inspect the CUDA kernels, run every test
test: lint
	$(BIN)/python tests/install/cuda_binary.py
	$(BIN)/python -m pytest --ignore tests/engines

build/wheel.stamp: $(VENV)/torch.stamp $(SOURCES) $(PACKAGE_FILES)
	rm -rf build/wheels build/lib*
	COSMOS3_FAST_BUILD=require COSMOS3_FAST_CUDA=0 $(BIN)/python -m pip wheel --quiet \
		--no-build-isolation --no-deps --wheel-dir build/wheels .
	@touch $@

# An environment from the folder of its requirements.
define make_environment
	$(PYTHON) -m venv .venv-$*
	$(subst $(BIN),.venv-$*/bin,$(PIP)) "$(TORCH)"
	if [ -f $(dir $<)requirements-nodeps.txt ]; then \
		$(subst $(BIN),.venv-$*/bin,$(PIP)) --no-deps -r $(dir $<)requirements-nodeps.txt; fi
	$(subst $(BIN),.venv-$*/bin,$(PIP)) "$(TORCH)" -r $<
	if [ -f $(dir $<)unpack_vllm.py ]; then \
		.venv-$*/bin/python $(dir $<)unpack_vllm.py; fi
	$(subst $(BIN),.venv-$*/bin,$(PIP)) --no-deps --force-reinstall build/wheels/*.whl
	@touch $@
endef

.venv-%/stamp: tests/engines/%/requirements.txt build/wheel.stamp
	$(make_environment)

.venv-%/stamp: tests/%/requirements.txt build/wheel.stamp
	$(make_environment)

## make test-engines    the tests against each engine, in an environment of its own; or only
## make test-diffusers, make test-sglang, make test-vllm-omni
test-engines: test-diffusers test-sglang test-vllm-omni
test-diffusers: .venv-diffusers/stamp
	.venv-diffusers/bin/pytest tests/engines/diffusers
test-sglang: .venv-sglang/stamp
	.venv-sglang/bin/pytest tests/engines/sglang
test-vllm-omni: .venv-vllm_omni/stamp
	.venv-vllm_omni/bin/pytest tests/engines/vllm_omni

## make test-releases           the same tests on the other releases of each engine that are served;
##                              QUICK=1: only the oldest and the newest (pre-)release
RUN_RELEASE = tests/engines/releases.py $(if $(QUICK),--quick)
test-releases: .venv-diffusers/stamp .venv-sglang/stamp .venv-vllm_omni/stamp
	.venv-diffusers/bin/python $(RUN_RELEASE) diffusers
	.venv-sglang/bin/python $(RUN_RELEASE) sglang
	.venv-vllm_omni/bin/python $(RUN_RELEASE) vllm-omni

## make test-torch    the op tests under another torch, with the library built for this one;
##                    TORCH_NEXT=torch==2.15.0 TRITON_NEXT=triton==3.9.0
TORCH_NEXT ?= torch==2.15.0
TRITON_NEXT ?= triton==3.9.0
NEXT := .venv-$(subst ==,-,$(TORCH_NEXT))
.PHONY: test-torch
$(NEXT)/stamp: $(VENV)/package.stamp
	$(PYTHON) -m venv $(NEXT)
	$(subst $(BIN),$(NEXT)/bin,$(PIP)) "$(TORCH_NEXT)" "$(TRITON_NEXT)" pytest hypothesis \
		numpy pillow safetensors
	@touch $@
test-torch: $(NEXT)/stamp
	$(NEXT)/bin/python -m pytest tests/ops

## make test-bulk    the tests of bulk encoding with Ray, whose environment is its own too
test-bulk: .venv-bulk/stamp
	.venv-bulk/bin/pytest tests/bulk

## make bench-bulk   measure bulk encoding, with Ray and without (20 minutes)
bench-bulk: .venv-bulk/stamp $(VENV)/package.stamp
	.venv-bulk/bin/python -m benchmarks.run --full --suites bulk,bulk_memory --out out/bench-bulk

## make wheels       a wheel in dist/ for each CPython 3.10 to 3.13 that is found, installed and tried;
##                   PYTHONS="/path/to/python ..." for others
wheels: $(VENV)/torch.stamp
	$(BIN)/python tests/install/wheels.py --torch "$(TORCH)" $(if $(PYTHONS),--pythons $(PYTHONS))

## make fuzz         random op calls against numpy, damaged files against the loaders (15 minutes)
fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/fuzzing.py

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
