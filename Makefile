# Everything a person needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-all faults lint clean

demo: .venv/run.installed
	$(BIN)/python jobs/train.py

test: .venv/test.installed
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/test.installed
	$(BIN)/python -m pytest

faults: .venv/test.installed
	$(BIN)/python benchmarks/faults.py $(ONLY)

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and by its exact version: a range would take a CUDA build of several gigabytes
# where a CPU build of this version is at hand.
.venv/run.installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) --editable .
	touch $@

.venv/test.installed: .venv/run.installed
	$(PIP) --editable '.[test]'
	touch $@
