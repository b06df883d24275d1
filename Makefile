# demo, test, bench and lint share one .venv, which is made from .requirements.txt and remade when
# that file changes. Changed sources of the extension are rebuilt.
#
#   make demo                 trains a small CLIP with the fused loss and reports what it learnt
#   make test ARGS='-k clip'  passes ARGS to the program behind demo, test and bench
#   make test ARGS='-n 0'     runs tests in one process, for `--pdb` and `-s`; default: one for each
#                             core, at most four (`--maxprocesses`)
#   make PIP_ARGS='--index-url URL' test     takes the packages from another index
#   make PYTHON=python3.12 test              makes .venv with another Python (after make clean)
#   make test-oldest          tests the parts that use torch's internals, with the oldest supported torch
#   make test-peers           compares losses with those of other libraries, which it installs in
#                             .venv-peers
#   make bench-peers          measures the losses other than CLIP and SigLIP beside theirs
#   make gpu                  checks and times fastclip on this machine's GPU, with the running python3
#                             and its torch, without .venv; eight minutes
#   make gpu AGAIN=1          continues with the tiles that won; four minutes
#   make gpu BUNDLE=folder    uses the result of `make gpu-bundle` on a machine without a card
#   make gpu-bundle PYTHON=python3.12        makes gpu-bundle/, for torch 2.11 and Hopper cards
#   make emulated             tests losses and operators on the CUDA engine, emulated; minutes
#   make test-cuda            runs the tests that compile for minutes, such as the tensor-core kernels'
#   make sanitize             runs the CPU engine under sanitizers, and shows that they see mistakes; minutes
#   make soak                 makes 10,000 random calls, and 2,000 across ranks with faults; an hour on
#                             two cores; ARGS='steps --count 500' makes fewer
#   make test-install         installs in every way with Python 3.10 to 3.13, as far as they are here, and
#                             checks each; half an hour, and GBs of torch for each Python
#   make dist                 makes and checks the source distribution and the pure wheel in dist/
#   make hub-kernel           makes the repository of the Hugging Face Hub's kernel in build/hub-kernel
#   make mutants              breaks single lines and checks that named tests fail; an hour.
#                             ARGS='--area cpu' runs some of them, ARGS=--list lists them
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-oldest test-peers test-cuda emulated sanitize soak mutants bench bench-peers \
  lint format clean gpu gpu-bundle dist test-install \
  hub-kernel

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
# The tests of a file run in one process, since they share what is slow to make.
PYTEST := pytest -n auto --maxprocesses 4 --dist loadfile
CSRC := $(shell find csrc -type f -not -name '*.pyc')
FORMATTED := $(filter-out %.py,$(CSRC)) $(shell find tests -name '*.h' -o -name '*.cpp')
# Files of tests by name.
files = $(foreach name,$(1),$(shell find tests -name 'test_$(name).py'))
INSTALL := install --no-build-isolation --no-deps --editable .
# The distribution was named fastclip; pip would keep it beside fastclip-loss.
forget = rm -rf fastclip.egg-info; $(1)/bin/pip --quiet uninstall --yes fastclip 2> /dev/null

# A missing extension is an error, so that no test or figure uses the fallback by mistake.
export FASTCLIP_REQUIRE_EXTENSION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: .venv/extension
	$(BIN)/python -m fastclip.train $(ARGS)

test: .venv/extension
	$(BIN)/$(PYTEST) $(ARGS)

ON_ANY_ENGINE := operators errors blocks kept_products parts_of_a_block gradients_requested shapes \
  scalars_and_dtypes spoilt_inputs switches operator_sizes properties accuracy live targets \
  targets_in_operators
emulated: .venv/extension
	FASTCLIP_TEST_DEVICE=emulated $(BIN)/$(PYTEST) $(call files,$(ON_ANY_ENGINE)) $(ARGS)

# This environment has a copy of fastclip: an editable installation would put its extension into
# fastclip/, over that of .venv, which is built for another torch.
OLDEST := cached_* compile compile_ranks contrast contrast_transforms operators drop_in shapes errors \
  triton_dispatch triton_plan gpu_engine_*
test-oldest: .venv-oldest/extension
	.venv-oldest/bin/$(PYTEST) $(call files,$(OLDEST)) $(ARGS)

# This environment has the torch of .venv, and so its extension. One file of LibAUC is needed; its
# package's requirements are for graphs and pictures.
test-peers: .venv-peers/extension
	.venv-peers/bin/pip --quiet install --no-deps $(PIP_ARGS) libauc==2.0.1
	FASTCLIP_REQUIRE_PEERS=1 .venv-peers/bin/$(PYTEST) tests/peers $(ARGS)

# Only CUTLASS's headers are needed; its package's requirements are for generating kernels. The tests
# are skipped without the headers or nvcc.
test-cuda: .venv/extension
	$(BIN)/pip --quiet install --no-deps $(PIP_ARGS) nvidia-cutlass==4.2.0.0
	$(BIN)/$(PYTEST) -m 'minutes and not sanitize' $(ARGS)

sanitize: .venv/extension
	$(BIN)/$(PYTEST) -m minutes $(call files,cpu_sanitizers) $(call files,sanitized_extension) $(ARGS)

# The tables go to build/soak.
soak: .venv/extension
	$(BIN)/python -m tests.soak $(ARGS)

# Environments and sources go to build/installs; environments that are there are used again.
test-install: .venv/packages
	$(BIN)/python -m tests.installs $(ARGS)

# docs/installing.md says why the wheel is pure.
dist: export FASTCLIP_SKIP_EXTENSION := 1
dist: .venv/packages
	rm -rf dist
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/pip --quiet wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(BIN)/pip --quiet install $(PIP_ARGS) twine==6.2.0
	$(BIN)/twine check --strict dist/*

# kernels.get_local_kernel loads it from build/hub-kernel; ARGS='--owner NAME' names the Hub's user.
hub-kernel: .venv/extension
	$(BIN)/python -m fastclip.hub_kernel build/hub-kernel $(ARGS)

# Works on copies of the tree; `tests/mutants/lists` has the lines.
mutants: .venv/extension
	PYTHONPATH=tests $(BIN)/python -m mutants $(ARGS)

bench: .venv/extension
	$(BIN)/python -m bench $(ARGS)

bench-peers: .venv-peers/extension
	.venv-peers/bin/python -m bench --family $(ARGS)

lint: .venv/packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: .venv/packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Installs, checks and times fastclip. Files go to $OUT, else to bench/results. `ARGS=--seconds=N`
# sets the time.
gpu:
	@$(PYTHON) -m bench.gpu $(if $(AGAIN),--again) $(if $(BUNDLE),--bundle '$(BUNDLE)') \
	  $(if $(WINNERS),--winners '$(WINNERS)') $(ARGS)

# BUNDLE_PYTHON: a Python with the packages of bench/gpu/bundle/requirements.txt.
BUNDLE_PYTHON ?= .venv-bundle/bin/python
gpu-bundle: $(if $(filter .venv-bundle/%,$(BUNDLE_PYTHON)),.venv-bundle/packages)
	$(BUNDLE_PYTHON) -m bench.gpu.bundle gpu-bundle $(ARGS)

.venv-bundle/packages: bench/gpu/bundle/requirements.txt
	@$(PYTHON) -m venv --clear .venv-bundle
	@.venv-bundle/bin/pip install --quiet --progress-bar off $(PIP_ARGS) -r $<
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-peers .venv-bundle gpu-bundle build dist demo *.egg-info \
	  fastclip/_C*.so .pytest_cache .ruff_cache .hypothesis
	find fastclip triton_kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# Shows only pip's lines about large files; errors go to stderr, past the filter.
.venv/packages: .requirements.txt
.venv-oldest/packages: .requirements-oldest.txt
.venv-peers/packages: .requirements-peers.txt .requirements.txt
.venv/packages .venv-oldest/packages .venv-peers/packages:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("fastclip needs Python >= 3.10: make PYTHON=...")'
	@echo 'Making $(@D) from $<. If torch is built for CUDA this takes several GB.'
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install --progress-bar off $(PIP_ARGS) -r $< \
	  | { grep --line-buffered -E 'Downloading .*([0-9]{2}\.[0-9] MB|GB)\)' || true; }
	@touch $@

.venv/extension .venv-peers/extension: %/extension: %/packages setup.py pyproject.toml $(CSRC)
	@echo 'Building the extension: a minute or two the first time.'
	@$(call forget,$*)
	@$*/bin/pip --quiet $(INSTALL)
	@touch $@

.venv-oldest/extension: .venv-oldest/packages setup.py pyproject.toml $(CSRC) \
  $(shell find fastclip triton_kernels -name '*.py')
	@echo 'Building the extension for the oldest torch: a minute or two the first time.'
	@$(call forget,.venv-oldest)
	@.venv-oldest/bin/pip --quiet $(filter-out --editable,$(INSTALL))
	@touch $@
