PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint types ablation builtin-model

# The stamp is newer than what it was made from, so a second `make` starts at once.
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/slimllm prune --overwrite

test: install
	$(BIN)/pytest -m 'not slow' tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# What each step from SlimLLM to gram is worth, on the real models beside the checkout, in minutes.
ablation: install
	$(BIN)/python -m benchmarks.ablation

# Trains the built-in model anew, in minutes: the result is committed, so nobody has to.
builtin-model: install
	$(BIN)/python -m orchestrator.builtin.train
