# One command for each thing one does here. Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
# The build of torch. pip's own configuration decides where it comes from; for a CPU build see the README.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: help venv check format test test-all bench parity
.DEFAULT_GOAL := help

help:
	@echo "make test      install, format check, lint, types, the test suite"
	@echo "make test-all  the same with the slow crosses"
	@echo "make check     format, lint and types only"
	@echo "make format    write the format and the lint fixes"
	@echo "make bench     every speed claim, as paired ratios (about 10 minutes)"
	@echo "make parity GOLDEN=DIR   compare with recorded outputs of the reference"

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt "$(TORCH)"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: check
	$(BIN)/pytest -n auto -m "not slow"

test-all: check
	$(BIN)/pytest -n auto

bench: venv
	$(BIN)/python -m bench.run_all

parity: venv
	$(BIN)/python tests/parity.py $(GOLDEN)
