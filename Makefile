# demo, test, bench and lint share one .venv, made from .requirements.txt and remade when that file
# changes; the extension is rebuilt (what changed of it) when its sources change.
#
#   make demo                 trains a small CLIP with the fused loss and reports what it learnt
#   make test ARGS='-k clip'  ARGS goes to the program behind demo, test and bench
#   make test ARGS='-n 0'     in one process, where `--pdb` and `-s` work; else one for each core,
#                             at most four (`--maxprocesses`)
#   make PIP_ARGS='--index-url URL' test     takes the packages from another index
#   make PYTHON=python3.12 test              makes .venv with another Python (after make clean)
#   make test-oldest          what touches torch's own changes, with the oldest torch that is promised
#   make gpu                  no .venv: the running python3, its torch and its GPU; eight minutes
#   make gpu AGAIN=1          then, with the tiles that won: four minutes
#   make gpu BUNDLE=folder    takes what `make gpu-bundle` made on a machine without a card
#   make gpu-bundle PYTHON=python3.12        makes it, gpu-bundle/, for torch 2.11 and Hopper cards
#   make emulated             tests of losses and operators, for the CUDA engine, on the CPU: minutes
#   make test-cuda            what compiles for minutes, the experimental tensor-core kernels foremost
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-oldest test-cuda emulated bench lint format clean gpu gpu-bundle

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
# A file's tests run in one process, since they share what takes long to make.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile
CSRC := $(shell find csrc -type f)
FORMATTED := $(CSRC) $(wildcard tests/emulation/*/*.h tests/emulation/*/*.cpp)
# Files of tests by name.
files = $(foreach name,$(1),$(shell find tests -name 'test_$(name).py'))
INSTALL := install --no-build-isolation --no-deps --editable .

# Here a missing extension is an error, so that no test or figure is of the fallback unawares.
export FASTCLIP_REQUIRE_EXTENSION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: .venv/extension
	$(BIN)/python -m fastclip.train $(ARGS)

test: .venv/extension
	$(BIN)/$(PYTEST) $(ARGS)

ON_ANY_ENGINE := operators errors blocks kept_products parts_of_a_block gradients_requested shapes \
  scalars_and_dtypes spoilt_inputs switches operator_sizes properties accuracy live
emulated: .venv/extension
	FASTCLIP_TEST_DEVICE=emulated $(BIN)/$(PYTEST) $(call files,$(ON_ANY_ENGINE)) $(ARGS)

# In an environment of its own, where a copy of fastclip is installed: an editable installation would
# put its extension into fastclip/, in the place of .venv's, which is of another torch.
OLDEST := compile compile_ranks contrast contrast_transforms operators drop_in shapes errors triton_dispatch triton_plan gpu_engine_*
test-oldest: .venv-oldest/extension
	.venv-oldest/bin/$(PYTEST) $(call files,$(OLDEST)) $(ARGS)

# CUTLASS's headers alone: what its package asks for besides is for generating kernels. Where they or
# nvcc are missing these tests are skipped.
test-cuda: .venv/extension
	$(BIN)/pip --quiet install --no-deps $(PIP_ARGS) nvidia-cutlass==4.2.0.0
	$(BIN)/$(PYTEST) -m minutes $(ARGS)

bench: .venv/extension
	$(BIN)/python -m bench $(ARGS)

lint: .venv/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: .venv/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Installs fastclip, checks and times it. Files go to $OUT, else to bench/results; `ARGS=--seconds=N`
# gives it less time or more.
gpu:
	@$(PYTHON) -m bench.gpu $(if $(AGAIN),--again) $(if $(BUNDLE),--bundle '$(BUNDLE)') \
	  $(if $(WINNERS),--winners '$(WINNERS)') $(ARGS)

# BUNDLE_PYTHON names an environment that has the packages of bench/gpu/bundle/requirements.txt.
BUNDLE_PYTHON ?= .venv-bundle/bin/python
gpu-bundle: $(if $(filter .venv-bundle/%,$(BUNDLE_PYTHON)),.venv-bundle/packages)
	$(BUNDLE_PYTHON) -m bench.gpu.bundle gpu-bundle $(ARGS)

.venv-bundle/packages: bench/gpu/bundle/requirements.txt
	@$(PYTHON) -m venv --clear .venv-bundle
	@.venv-bundle/bin/pip install --quiet --progress-bar off $(PIP_ARGS) -r $<
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-bundle gpu-bundle build dist demo *.egg-info fastclip/_C.* \
	  .pytest_cache .ruff_cache .hypothesis
	find fastclip triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# Of pip's some hundred lines those about large files are shown; errors go to stderr, past the filter.
.venv/packages: .requirements.txt
.venv-oldest/packages: .requirements-oldest.txt
.venv/packages .venv-oldest/packages:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastclip needs Python >= 3.10: make PYTHON=...")'
	@echo 'Making $(@D) from $<. Where torch is built for CUDA this takes several GB.'
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install --progress-bar off $(PIP_ARGS) -r $< \
	  | { grep --line-buffered -E 'Downloading .*([0-9]{2}\.[0-9] MB|GB)\)' || true; }
	@touch $@

.venv/extension: .venv/packages setup.py pyproject.toml $(CSRC)
	@echo 'Building the extension: a minute or two the first time.'
	@$(BIN)/pip --quiet $(INSTALL)
	@touch $@

# Not from an earlier copy in build/, which keeps modules that are gone.
.venv-oldest/extension: .venv-oldest/packages setup.py pyproject.toml $(CSRC) \
  $(shell find fastclip triton_kernels -name '*.py')
	@echo 'Building the extension for the oldest torch: a minute or two the first time.'
	@rm -rf build/lib*
	@.venv-oldest/bin/pip --quiet $(filter-out --editable,$(INSTALL))
	@touch $@
