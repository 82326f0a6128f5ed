# Every target sets up what it needs: the first call makes .venv and installs the project with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: install demo test test-all lint check bench performance docs dist clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py --out runs/demo

# Every fact once, in minutes.
test: install
	$(BIN)/python -m pytest $(PARALLEL) -m "not matrix"

# And every method over every transport, each port under each method, chaos.
test-all: install
	$(BIN)/python -m pytest $(PARALLEL)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

bench: install
	$(BIN)/python -m benchmarks

performance: bench
	$(BIN)/python -m benchmarks.page docs/performance.md

# The site, into build/site. A warning ends it.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site

# Wheel and sdist, checked; and the wheel in an environment of its own, where it must work.
dist: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[release]'
	rm -rf dist build/smoke
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls dist/*.whl)[cli,report]"
	build/smoke/bin/python -P tests/smoke.py

clean:
	rm -rf .venv runs build dist src/*.egg-info
