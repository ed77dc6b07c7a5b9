# All targets but gpu use .venv, which is made once and filled again when pyproject.toml changes.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
GPU_PYTHON ?= python3
# Test processes. May be more than there are cores, because tests wait most of the time.
WORKERS ?= 4
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
MODULES := -p blockyard.kernels -p blockyard.engine -p blockyard.agent -p blockyard.operator -m blockyard.cli -m blockyard.user_cache

.PHONY: help demo test lint format crds gpu bench wheel clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -ts $$'\t'

demo: $(INSTALLED)  ## serve SmolLM2-135M on this machine, ask it something, show its KV pool
	@$(PY) examples/demo.py

test: $(INSTALLED)  ## the whole test suite; ARGS="tests/engine -k name" for a part of it
	$(PY) -m tests.cluster.binaries || true  # built once; without them the cluster's tests are skipped with a reason
	$(PY) -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) .build/blockyard  ## ruff, strict types, who may import whom
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	MYPYPATH=.build $(VENV)/bin/mypy $(MODULES)
	$(VENV)/bin/lint-imports

format: $(INSTALLED)  ## bring the code into ruff's form
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

crds: $(INSTALLED)  ## write crds/ and docs/reference.md from operator/api/
	$(PY) -m blockyard.operator.crds

gpu: .build/blockyard  ## kernel and runner tests and kernel benchmarks on CUDA, with GPU_PYTHON's own packages
	$(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available(), "make gpu needs a CUDA device"'
	PYTHONPATH=.build $(GPU_PYTHON) -m pytest -q tests/kernels tests/engine/test_cuda.py
	PYTHONPATH=.build $(GPU_PYTHON) benchmarks/kernels.py

bench: $(INSTALLED)  ## the CPU benchmarks of docs/performance.md; takes about an hour
	$(PY) -m tests.cluster.binaries
	$(PY) benchmarks/throughput.py
	$(PY) benchmarks/serve.py
	$(PY) benchmarks/memory.py
	$(PY) benchmarks/gateway.py
	$(PY) benchmarks/operator_scale.py

wheel: $(INSTALLED)  ## dist/*.whl
	$(PY) -m build --wheel

clean:  ## remove what was built here (prepared models and kernels stay in the user's cache folder)
	rm -rf $(VENV) .build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The repository's root folder is the package, whatever its name; tools that import by path need this link.
.build/blockyard:
	mkdir -p .build && ln -sfn .. $@

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --no-compile --editable '.[dev]'  # --no-compile: most modules of the dependencies are never imported
	touch $@
