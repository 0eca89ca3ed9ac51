# `make` alone lists the targets. Everything is installed into .venv.
#
#   PYTHON=python3.12          another interpreter, 3.11 to 3.14
#   TORCH=torch==2.14.0        another PyTorch than the one pinned here, or a wheel's path
#   TORCH_INDEX=URL            another package index for PyTorch alone (CPU, CUDA or ROCm builds)
#   TEST_DATA=PATH             real text for the tests that want it
#   ARGS="..."                 more arguments for mhc (demo) or pytest (test)

PYTHON ?= python3
# torch goes first and by exact version: a range would let pip take the newest CUDA build.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# CPU builds of PyTorch bring no Triton for its interpreter: the one that builds for GPUs pin.
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1 ; platform_system == 'Linux')
# Its PyTorch reference is compared in the tests and needs none of its dependencies, which need CUDA.
TILE_KERNELS := tile-kernels==1.0.0
TEST_DATA ?=
ARGS ?=

BIN := .venv/bin
# Environment of each other PyTorch that is tested.
OTHER := .venv-$(subst /,-,$(subst ==,-,$(TORCH)))
# The tests of the connections alone: no command, no trainer.
CORE := $(addprefix tests/test_,functional.py constraints.py mutants.py connection.py norms.py \
	single_pass.py parts.py recompute.py replaced_forward.py warmup.py \
	docstrings.py torch_names.py) tests/kernels tests/diagnostics
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quick: .venv/ready-to-develop  ## run the core's tests, of each the fewest cases that have every value
	$(BIN)/pytest --quick --numprocesses=logical --maxprocesses=8 --dist=worksteal $(CORE) $(ARGS)

demo: .venv/ready  ## train residual, HC and mHC on Python's own documentation, make a page
	$(BIN)/mhc compare --out runs/demo $(ARGS)

test: .venv/ready-to-develop  ## run the tests, on up to eight processors
	$(BIN)/pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal $(if $(TEST_DATA),--test-data=$(TEST_DATA)) $(ARGS)

# The interpreter of Triton 3.6, which PyTorch 2.10 brings, does not run with NumPy 2.4.
test-torch:  ## run the core's tests with another PyTorch: make test-torch TORCH=torch==2.10.0
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(OTHER)/bin/pip install --quiet --editable '.[test-core]' 'numpy<2.4'
	$(OTHER)/bin/pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal $(CORE) $(ARGS)

test-distributed: .venv/ready-to-develop  ## run the tests of several processes, the widest too
	$(BIN)/pytest tests/parallel --wide $(ARGS)

kernels: .venv/ready-to-develop  ## compile every GPU kernel for every target: some minutes
	$(BIN)/pytest tests/kernels/test_triton_compiles.py --every-kernel $(ARGS)

drill: .venv/ready-to-develop  ## kill the processes of a run at random, 24 times, and compare
	$(BIN)/python -m tests.parallel.drill $(ARGS)

check: .venv/ready-to-develop  ## lint, formatting, types, order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

golden: .venv/ready-to-develop  ## record the golden losses anew
	$(BIN)/python -m tests.golden

wheel:  ## make dist/*.whl with the CPU kernels inside, for machines without a compiler: 2 min
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=true $(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:  ## remove .venv and caches; runs stay
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else f"$(PYTHON) is Python {v[0]}.{v[1]}; make PYTHON=... takes 3.11 to 3.14")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

.venv/ready: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[train]'
	touch $@

.venv/ready-to-develop: .venv/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]' $(if $(TRITON),"$(TRITON)")
	$(BIN)/pip install --quiet --no-deps $(TILE_KERNELS)
	touch $@ .venv/ready

.PHONY: help demo quick test test-torch test-distributed kernels drill check golden wheel clean
