# Every target sets up what it needs: the first call makes .venv and installs the project with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: install demo test check bench performance clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py --out runs/demo

test: install
	$(BIN)/python -m pytest $(PARALLEL)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

bench: install
	$(BIN)/python -m benchmarks

performance: bench
	$(BIN)/python -m benchmarks.page docs/performance.md

clean:
	rm -rf .venv runs build dist src/*.egg-info
