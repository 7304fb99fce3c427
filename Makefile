PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test slow serve-test lint types truth results gpu tune-table ablation benchmarks memory forms faults same-bytes docs builtin-model

# The stamp is newer than what it was made from, so a second `make` starts at once.
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/slimllm prune --overwrite

# A file's tests run in one process, so that they share what they started.
test: install
	$(BIN)/pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests

# What repeats, on another model, method or signal, what `make test` shows on one, and what takes longest.
slow: install
	$(BIN)/pytest -m slow --durations=20 tests

# Serves pruned checkpoints in vLLM on the CPU, and measures one in lm-eval. vLLM gets an environment of its own in the
# user's cache: minutes, 3 GB.
serve-test: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[eval]'
	$(BIN)/python -m tests.serving.vllm_environment
	$(BIN)/pytest --durations=20 tests/serving

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# Every method on a real model of 135M parameters, which the first run fetches; an hour.
truth: install
	$(BIN)/python -m benchmarks.truth

# The README's table and figure: every method on two real models, tuned and not; two hours, once. A run that was cut off
# goes on where it stopped. It uses the text and a model beside the checkout.
results: install
	$(BIN)/python -m benchmarks.headline

# Checks and times slimllm on one GPU, in nine minutes; no Ray, no MLflow.
gpu: install
	$(BIN)/python -m benchmarks.gpu

# What training gets back after pruning, by method: an hour. It uses the text and models beside the checkout.
tune-table: install
	$(BIN)/python -m benchmarks.tune

# What each step from SlimLLM to gram is worth, on the real models beside the checkout, in minutes.
ablation: install
	$(BIN)/python -m benchmarks.ablation

# Seconds and memory of whole runs and of one layer's decisions, on an otherwise idle machine.
SHARED := ../shared
benchmarks: install
	$(BIN)/python -m benchmarks.stages $(SHARED)/models/lab-llama-11m \
		--calibration $(SHARED)/golden/tokens/lab.calibration.parquet \
		--evaluate $(SHARED)/golden/tokens/lab.heldout.parquet
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.observing
	$(BIN)/python -m benchmarks.timeline
	$(BIN)/python -m benchmarks.reduction
	$(BIN)/python -m benchmarks.one_process --device cpu --hidden 1024 --intermediate 2816 --layers 4 \
		--heads 16 --kv-heads 4 --blocks 8
	$(BIN)/python -m benchmarks.cluster_time
	$(BIN)/python -m benchmarks.startup

# Peak memory of every process by depth, width and tokens, in half an hour; other work beside it does not matter.
memory: install
	$(BIN)/python -m benchmarks.memory

# What a pruned model's form costs in perplexity, and which stock class takes it; minutes.
forms: install
	$(BIN)/python -m benchmarks.forms

# Kills workers, nodes, heads and drivers in whole runs, 50 times, and compares what comes of them; half an hour.
faults: install
	$(BIN)/python -m benchmarks.faults

# Writes the tables of docs/options.md from the declarations of the settings; a test compares them.
docs: install
	$(BIN)/python -m orchestrator.cli.options_table

# Whether this checkout prunes to the same bytes as another one, `make same-bytes BEFORE=DIR`; minutes.
same-bytes: install
	$(BIN)/python -m benchmarks.same_bytes --before $(BEFORE)

# Trains the built-in model anew, in minutes: the result is committed, so nobody has to.
builtin-model: install
	$(BIN)/python -m orchestrator.builtin.train
