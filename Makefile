# Everything a person needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Two processes that run tests, file by file.
BESIDE := --numprocesses 2 --dist loadfile

.PHONY: demo test quick test-commands test-newest test-all oracle faults gpu-dry-run lint docs wheel clean

demo: .venv/run.installed
	$(BIN)/python jobs/train.py

test: .venv/test.installed
	$(BIN)/python -m pytest $(BESIDE) -m "not slow and not commands"

# What needs neither training processes nor Ray nor seconds: under a minute, for every save.
quick: .venv/test.installed
	$(BIN)/python -m pytest $(BESIDE) -m "not slow and not commands and not ranks and not ray and not long"

test-commands: .venv/test.installed
	$(BIN)/python -m pytest $(BESIDE) -m "commands and not slow"

# The selection of `make quick` with the newest release of every package but torch, whatever the
# ranges of pyproject.toml say, in an environment of its own.
test-newest:
	$(PYTHON) -m venv build/newest
	build/newest/bin/pip --disable-pip-version-check install --quiet packaging \
		torch==$$(sed -n 's/^torch==//p' constraints.txt)
	build/newest/bin/python tests/newest.py > build/newest/requirements.txt
	build/newest/bin/pip --disable-pip-version-check install --quiet --upgrade \
		--requirement build/newest/requirements.txt
	build/newest/bin/python tests/newest.py --outside
	build/newest/bin/python -m pytest -m "not slow and not commands and not ranks and not ray and not long"

# Only here: TRL itself beside its stored trajectory; every window with every number of heads; 5,000
# random limits instead of 500; other numbers of workers; sweeps, buckets and Ray jobs as commands.
test-all: .venv/test.installed
	$(BIN)/python -m pytest

# TRL's trajectory, with which `make test` compares; the data lies beside the checkout.
oracle: .venv/test.installed
	$(BIN)/python -m tests.reference.trl_case ../shared/data/hh_rlhf_harmless.jsonl

faults: .venv/test.installed
	$(BIN)/python -m faults $(ONLY)

gpu-dry-run: .venv/test.installed
	PYTHON=$(BIN)/python bash benchmarks/gpu/check.sh all --dry-run --seconds 900

lint: .venv/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/docs.installed
	$(BIN)/python docs/settings_table.py
	$(BIN)/python docs/trl_table.py
	$(BIN)/mkdocs build --strict

# Built, put into an environment of its own, and used from another folder. The packages that it
# needs are those of the test environment, by a path file.
wheel: .venv/test.installed
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel
	$(BIN)/python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		> $$(build/wheel/bin/python -c 'import site; print(site.getsitepackages()[0])')/others.pth
	build/wheel/bin/pip --disable-pip-version-check install --quiet --no-deps --force-reinstall \
		dist/*.whl
	cd build/wheel && bin/python -c 'import orpo_ray; from orpo_ray.cli import read_arguments; \
		assert "build/wheel" in orpo_ray.__file__, orpo_ray.__file__; \
		from orpo_ray.reports.page import render; \
		render("data.html.j2", title="", parts=[], columns=[]); \
		print(orpo_ray.__version__, read_arguments([]).orpo.beta)'
	cd build/wheel && bin/orpo-ray --help

clean:
	rm -rf .venv build dist site *.egg-info

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

.venv/docs.installed: .venv/run.installed
	$(PIP) --editable '.[docs]'
	touch $@
