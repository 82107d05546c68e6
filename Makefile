PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
STEP := sh .ci/step
PACKAGES := $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -r requirements.lock \
    || $(BIN)/pip install -r requirements.lock

# One thread per process: the work is spread over processes.
export OMP_NUM_THREADS ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup demo test test-live lint bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock
	@$(STEP) "a Python of its own, in .venv" $(PYTHON) -m venv .venv
	@$(STEP) "uv, which installs" $(BIN)/pip install "uv>=0.9,<1"
	@$(STEP) "the packages of requirements.lock" sh -c '$(PACKAGES)'
	@$(STEP) "paredown" $(BIN)/pip install --no-deps --editable .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/paredown search examples/digits.yaml

test: $(INSTALLED)
	$(BIN)/pytest

test-live: $(INSTALLED)
	$(BIN)/pytest -m live --numprocesses=1

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# SECTION=quality or SECTION=latency: Torch-Pruning beside our methods.
SECTION ?= allocation

bench: $(INSTALLED)
	$(BIN)/python benchmarks/$(SECTION).py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
