# The two commands are `make profile` and `make test`; `make help` lists the rest.
# Needs python3 >= 3.11 and the network for the first run, which creates .venv. Later runs start at once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
# Always with the pins: a bare `torch` can bring in gigabytes of CUDA libraries that were never tried here.
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SETTINGS := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help profile test bench-cpu gpu readme wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# Exit code 4 says that noise hides the answer, as the last lines do; the run is written all the same.
profile: $(VENV)/.installed ## what each LoRA rank costs on this machine (ARGS="--ranks 8,64" goes to lora-fast profile)
	$(BIN)/lora-fast profile $(ARGS) || test $$? -eq 4

test: $(VENV)/.installed-test ## ruff, then the whole test suite (JOBS=2 processes, ARGS="-k name" goes to pytest)
	$(BIN)/ruff check .
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

bench-cpu: $(VENV)/.installed-test ## a training step against PEFT's, and what launches cost, into benchmarks/results/cpu (keep the machine quiet)
	$(BIN)/python benchmarks/bench_train_step.py
	$(BIN)/python benchmarks/bench_train_step.py --batch-size 4 --seq-len 512 --dtypes bf16 --rounds 10
	$(BIN)/python benchmarks/bench_train_step.py --dora --ranks 16 --dtypes fp32
	$(BIN)/python benchmarks/bench_host.py

# Nothing is installed: with the .venv where there is one, else with a $(PYTHON) that has torch, triton, peft and pytest.
gpu: ## on a CUDA GPU: its tests, then the benchmarks, within 9 minutes, into benchmarks/results (ARGS="--deadline 500")
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

readme: $(VENV)/.installed ## write README's tables from benchmarks/results (ARGS="--run runs/NAME" takes that profile)
	$(BIN)/python benchmarks/readme.py $(ARGS)

# Without the rm, setuptools would pack what an earlier build left in build/.
wheel: $(BIN)/python ## build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

clean: ## remove what builds and tests left behind (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find kernels lora_fast profiler tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.installed: $(SETTINGS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

# What the tests need includes all that the commands need, so both stamps are set.
$(VENV)/.installed-test: $(SETTINGS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[test]'
	@touch $(VENV)/.installed $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "lora-fast needs Python >= 3.11, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true);" \
	           "name another with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
