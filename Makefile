# make demo: install, then quantize, export and prove SmolLM2-135M.   make test: every check that CI makes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
