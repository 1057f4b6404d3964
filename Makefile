# Two commands do everything from a clean clone: `make demo` and `make test`.
# With PYTHON=/path/to/python they use an interpreter that already has the packages, and download nothing.

comma := ,
VENV := .venv
# Two recipes run at a time: lint beside the tests.
MAKEFLAGS += $(if $(MAKELEVEL:0=),,--jobs=2)
NVIDIA_GPU := $(wildcard /dev/nvidiactl /dev/dxg)
ifdef PYTHON
ENVIRONMENT :=
TEST_ENVIRONMENT :=
else
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.ready
TEST_ENVIRONMENT := $(VENV)/.test-ready
SM90A := $(CURDIR)/$(VENV)/sm90a
TEST_PATH := PYTHONPATH="$(SM90A)$${PYTHONPATH:+:$$PYTHONPATH}"
EXTRAS := $(if $(NVIDIA_GPU),dev$(comma)cuda,dev)
endif

BASE_PYTHON ?= $(shell for p in python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
OUTPUT ?= out
ARGS ?=
JOBS ?= 3
JAX_PLATFORMS ?= $(if $(NVIDIA_GPU),,cpu)
export JAX_PLATFORMS
# pip leaves byte code to the first import. Without it, JAX and what tests import take 6 to 9 s of CPU
# more in every process, of which tests start dozens.
export PYTHONDONTWRITEBYTECODE :=

# The GPU tests run in shards, each of which ends within 9 minutes on an H200 with 16 cores: `make
# test-gpu SHARD=fuzz` runs one, without SHARD they run one after the other. A shard is what has the
# marker of its name; `kernels` is what has none of them. Most of the kernels' time is Python that
# traces and lowers: with pytest-xdist that runs in several processes on the one GPU. (The sweep and
# the fuzz start processes of their own, and compute-sanitizer wants the GPU for itself.)
SHARDS := kernels compile sweep fuzz sanitizer demo
MARKED = gpu and $(if $(filter kernels,$*),not (compile or sweep or fuzz or sanitizer or demo),$*)
XDIST = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo yes)
GPU_JOBS_kernels ?= 12
GPU_JOBS_compile ?= 12
GPU_JOBS = $(if $(and $(XDIST),$(GPU_JOBS_$*)),-n $(GPU_JOBS_$*) --dist worksteal)

# What the API reference documents; kernels and their parts are described in docs/hopper_decode.md.
API := mla_jax mla_jax.hal pallas_kernels.hopper '!pallas_kernels.hopper.(kernels|parts|mosaic)'

.PHONY: demo generate test test-cpu test-gpu $(SHARDS:%=test-gpu-%) fuzz docs lint format clean

demo: $(ENVIRONMENT)  ## the main job: load a layer, prefill, decode, compare with float64
	$(PYTHON) -m experiments.launch --experiment=demo --output_dir=$(OUTPUT) $(ARGS)

generate: $(ENVIRONMENT)  ## a whole model generates tokens; ARGS=--folder=DIR takes yours
	$(PYTHON) -m experiments.launch --experiment=generate --output_dir=$(OUTPUT) $(ARGS)

# Compiling for the CPU takes most of the tests' time, running hardly any. These options halve it.
# (Where bits are compared, tests ask for optimised code.) Without source locations lowering is faster.
QUICK_COMPILE := --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 \
	--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters,xla_cpu_disable_loop_unrolling,xla_cpu_optimize_for_size

test: lint test-cpu  ## everything that runs without a GPU

test-cpu: $(TEST_ENVIRONMENT)
	XLA_FLAGS="$$XLA_FLAGS $(QUICK_COMPILE)" JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 JAX_PLATFORMS=cpu $(TEST_PATH) $(PYTHON) -m pytest -n $(JOBS) --dist worksteal -m "not gpu" $(ARGS)

test-gpu:  ## the third gate, on an H200; SHARD=kernels, compile, sweep, fuzz, sanitizer or demo: that
ifdef SHARD
	@$(if $(filter $(SHARD),$(SHARDS)),,echo "SHARD must be one of $(SHARDS), got $(SHARD)"; exit 2)
	$(MAKE) test-gpu-$(SHARD)
else
	@failed=; for shard in $(SHARDS); do $(MAKE) test-gpu-$$shard || failed="$$failed $$shard"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }
endif

$(SHARDS:%=test-gpu-%): test-gpu-%:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest $(GPU_JOBS) -m "$(MARKED)" --durations=5 $(ARGS)

fuzz:  ## random calls on an H200, by ARGS: "--calls=700 --data-seeds=random,random,random", "--help"
	PYTHONPATH=".:tests/support$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m fuzz $(ARGS)

docs: $(ENVIRONMENT)  ## the API reference, from the docstrings: out/docs/index.html
	$(PYTHON) -W error -m pdoc --docformat google --output-directory $(OUTPUT)/docs $(ARGS) $(API)

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(ENVIRONMENT)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Two of these run at a time. pip leaves the byte code to the first import, see above.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# The pip that Python brings is older, and takes half as much CPU time again to read the index.
$(VENV)/.made: pyproject.toml constraints.txt
	@test -n "$(BASE_PYTHON)" || { echo "Python 3.12 was not found: set BASE_PYTHON=/path/to/python3.12"; exit 1; }
	$(BASE_PYTHON) -m venv --clear $(VENV)
	$(PIP) --upgrade pip
	touch $@

$(VENV)/.ready: $(VENV)/.made
	$(PIP) -e ".[$(EXTRAS)]"
	touch $@

# The compiler of the Hopper kernels for machines without a GPU (240 MB). It stands beside the
# environment, not in it: where the rest of CUDA is missing, JAX would complain at every start.
$(VENV)/.sm90a-ready: $(VENV)/.made
	$(PIP) --no-deps --upgrade --target $(SM90A) jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
	touch $@

# One process writes the byte code that all processes of the tests need: of packages, of our modules
# and of the tests with their rewritten assertions. (An error in it is what the tests end with, too.)
$(VENV)/.test-ready: $(VENV)/.ready $(VENV)/.sm90a-ready
	-JAX_PLATFORMS=cpu $(TEST_PATH) $(VENV)/bin/python -m pytest --collect-only -qq -m "not gpu" > /dev/null
	touch $@

clean:
	rm -rf $(VENV) $(OUTPUT) .pytest_cache .ruff_cache .mypy_cache .hypothesis
