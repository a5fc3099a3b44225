# make demo and make test set everything up by themselves, from Python 3.11 and a C++ compiler.
#
#   make demo GPU=1 PYTHON=/path/of/python   the demo on a GPU, with the vLLM that this Python has

VENV ?= .venv
BIN := $(VENV)/bin
PROTOC_VENV := .cache/protoc-venv
PYTEST_ARGS ?=

ifeq ($(GPU),1)
  PYTHON ?= python3
  SETUP := scripts/setup_cpu.py --own-engine
  KVSTRATA := $(PYTHON) -m kvstrata.controller.cli
else
  IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
  PYTHON ?= $(shell for p in python3.11 python3 python; do \
    "$$p" -c "$(IS_3_11)" 2>/dev/null && { echo "$$p"; break; }; done)
  SETUP := scripts/setup_cpu.py --venv $(VENV)
  KVSTRATA := $(BIN)/kvstrata
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint typecheck wheel protos clean

help: ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## everything below does this first: .venv with vLLM for CPU and kvstrata
	@if [ -z "$(PYTHON)" ]; then \
	  echo "Python 3.11 is needed and was not found: install it, or name it with PYTHON=<path>." >&2; exit 1; fi
	@"$(PYTHON)" $(SETUP)

demo: setup ## show kvstrata at work with a real engine
	$(KVSTRATA) demo $(if $(filter 1,$(GPU)),--gpu)

test: lint typecheck ## all checks, then the whole test suite
	$(BIN)/pytest tests $(PYTEST_ARGS)

lint: setup ## style, formatting, which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: setup ## mypy --strict and pyright
	$(BIN)/mypy
	$(BIN)/mypy benches
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: setup ## sdist and wheel, into dist/
	$(BIN)/python -m build --outdir dist .

# In a venv of its own: code that loads on every protobuf that vLLM allows comes from this version,
# which itself wants an older protobuf than vLLM's.
protos: $(PROTOC_VENV)/ready ## generate the Python code of protos/
	$(PROTOC_VENV)/bin/python -m grpc_tools.protoc -I src \
	  --python_out=src --pyi_out=src --grpc_python_out=src src/kvstrata/protos/kvstrata/v1/*.proto

$(PROTOC_VENV)/ready:
	"$(PYTHON)" -m venv --clear $(PROTOC_VENV)
	$(PROTOC_VENV)/bin/python -m pip install --quiet grpcio-tools==1.71.2
	touch $@

clean: ## remove what was built; .venv and .cache (models) stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
