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
# Tests also build and inspect the CUDA kernels wherever nvcc is found; no GPU is needed.
TEST_CUDA := $(if $(shell command -v nvcc),1,)

# The engines' requirements exclude each other: each has an environment of its own.
ENGINES := diffusers sglang vllm-omni
PACKAGE_FILES := $(shell find cosmos3_fast -name "*.py")
# With QUICK=1, what is marked as slow is left out.
MARKED = $(if $(QUICK),-m "not slow")

.PHONY: help demo bench bench-full bench-bulk test test-all test-bulk fuzz soak wheels lint format verify clean test-engines test-diffusers test-sglang test-vllm-omni test-releases
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch.stamp: | $(BIN)/python
	$(PIP) "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.12"
	mkdir -p build && rm -rf build/torch-site
	cp -al $(VENV)/lib/python3.*/site-packages build/torch-site
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp $(SOURCES)
	COSMOS3_FAST_BUILD=require $(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/demo.stamp: $(VENV)/package.stamp
	$(PIP) "$(DIFFUSERS)"
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) "$(DIFFUSERS)" "$(TRITON)" "$(MATPLOTLIB)"
	COSMOS3_FAST_BUILD=require $(PIP) --no-build-isolation -e ".[test,lint]"
	@touch $@ $(VENV)/package.stamp

# The CUDA kernels take minutes to compile, so only test-all does.
$(VENV)/cuda.stamp: $(VENV)/test.stamp
	$(if $(TEST_CUDA),COSMOS3_FAST_BUILD=require COSMOS3_FAST_CUDA=1 \
		$(PIP) --no-build-isolation --no-deps -e .)
	@touch $@

## make demo    set up, turn the example photograph into latents, time it against the 3-D VAE
demo: $(VENV)/demo.stamp
	$(BIN)/python -m benchmarks.demo --out out

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(PIP) "$(MATPLOTLIB)" pyarrow tqdm fsspec
	@touch $@

## make bench   measure against the 3-D VAE, the engines' formula and a plain copy (5 minutes)
bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run --out out/bench

## make bench-full    every size, more rounds, and the documents' tables from it (90 minutes)
bench-full: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks.run --full --out benchmarks/results/cpu
	$(BIN)/python -m benchmarks.report

## make test    set up, check style and types, run what a change needs: every op and network, the seam,
##              and of each engine whose environment is there, the quick tests on its newest release
test: lint
	$(BIN)/python -m pytest --ignore tests/engines -m "not slow"
	@for engine in $(ENGINES); do \
		if [ -e .venv-$$(echo $$engine | tr - _)/stamp ]; then \
			$(MAKE) test-$$engine QUICK=1 || exit 1; \
		else echo "$$engine: left out, make test-$$engine makes its environment"; fi; done

## make test-all      all of it: planted faults, sanitizers, installs, CUDA binaries, dry runs of the
##                    benchmarks, every release of each engine, Ray (hours; before an issue is resolved)
test-all: lint $(VENV)/cuda.stamp
	$(BIN)/python tests/install/cuda_binary.py
	$(BIN)/python -m pytest --ignore tests/engines
	$(MAKE) test-engines test-releases test-bulk

build/wheel.stamp: $(VENV)/torch.stamp $(SOURCES) $(PACKAGE_FILES)
	rm -rf build/wheels build/lib*
	COSMOS3_FAST_BUILD=require COSMOS3_FAST_CUDA=0 $(BIN)/python -m pip wheel --quiet \
		--no-build-isolation --no-deps --wheel-dir build/wheels .
	@touch $@

# An environment from the folder of its requirements. What .venv had when torch was new is linked
# into it, not unpacked again: a gigabyte each.
define make_environment
	if [ ! -e .venv-$*/bin/python ]; then $(PYTHON) -m venv .venv-$* && \
		if [ -d build/torch-site ]; then \
			cp -alf build/torch-site/. .venv-$*/lib/python3.*/site-packages/; fi; fi
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

## make test-engines    the tests against each engine, in an environment of its own; QUICK=1: without
##                      the slow ones; or only make test-diffusers, make test-sglang, make test-vllm-omni
test-engines: $(ENGINES:%=test-%)
test-diffusers: .venv-diffusers/stamp
	.venv-diffusers/bin/pytest tests/engines/diffusers $(MARKED)
test-sglang: .venv-sglang/stamp
	.venv-sglang/bin/pytest tests/engines/sglang $(MARKED)
test-vllm-omni: .venv-vllm_omni/stamp
	.venv-vllm_omni/bin/pytest tests/engines/vllm_omni $(MARKED)

## make test-releases   the same tests on the other releases of each engine that are served;
##                      QUICK=1: the quick ones on the oldest and the newest (pre-)release
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

## make wheels       a wheel in dist/ for each CPython 3.10 to 3.13 that is found, installed and tried,
##                   with CUDA kernels where nvcc is found; PYTHONS="/path/to/python ..." for others;
##                   ALSO=/path/to/python: tried on that one's torch too, as one with CUDA
wheels: $(VENV)/torch.stamp
	$(BIN)/python tests/install/wheels.py --torch "$(TORCH)" $(if $(PYTHONS),--pythons $(PYTHONS)) \
		$(if $(ALSO),--also $(ALSO))

## make fuzz         random op calls against numpy, damaged files against the loaders (15 minutes)
fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/fuzzing.py

## make soak         random events on an accelerated VAE, against a twin that is not (10 minutes)
soak: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/soak.py

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
