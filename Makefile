PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
# One thread per worker: the workers are the parallelism.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all test-torch lint format docs scoreboard bench gpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## Train a small model with a structured preconditioner
	$(BIN)/python examples/demo.py

test: lint ## Lint, check types, run the tests
	$(PYTEST)

test-all: lint $(VENV)/.models ## The same with the slow tests, and with models of other libraries
	$(PYTEST) -m ""

test-torch: ## Run the tests with another torch: make test-torch VERSION=2.15.0, several gigabytes
	@test -n "$(VERSION)" || { echo "Name the version, as in make test-torch VERSION=2.15.0"; exit 2; }
	$(PYTHON) -m venv .venv-torch-$(VERSION)
	grep -vE '^(torch|torchvision|triton|setuptools)==' constraints.txt > .venv-torch-$(VERSION)/constraints.txt
	.venv-torch-$(VERSION)/bin/python -m pip install -qq -c .venv-torch-$(VERSION)/constraints.txt \
		"torch==$(VERSION)" -e ".[dev,examples,bench]"
	OMP_NUM_THREADS=1 .venv-torch-$(VERSION)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

lint: $(VENV)/.test ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test ## Fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

scoreboard: $(VENV)/.race ## Race optimizers over several tasks: hours, and resumes where it stopped
	$(BIN)/python benchmarks/scoreboard.py
	$(BIN)/python benchmarks/scoreboard.py --report

bench: $(VENV)/.bench ## Measure the time of a step, beside other libraries
	$(BIN)/python benchmarks/step_time.py

gpu: $(VENV)/.gpu ## Test and time the optimizers on a GPU: parts of at most 9 minutes, and resumes
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu.py --report

clean: ## Remove the environment and everything built
	rm -rf $(VENV) .venv-torch-* build site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is the environment with some extras; it is made again when the requirements change.
$(VENV)/.demo: EXTRAS := examples
$(VENV)/.test: EXTRAS := dev,docs,examples
$(VENV)/.models: EXTRAS := dev,docs,examples,models,integrations
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.bench: EXTRAS := bench
$(VENV)/.gpu: EXTRAS := bench,dev,examples
$(VENV)/.race: EXTRAS := bench,examples
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
