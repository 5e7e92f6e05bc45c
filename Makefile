# Every target makes .venv on its own, so that a fresh clone needs nothing but Python and a package index.
# What is installed is renewed only when pyproject.toml or the constraints change (stamps under .venv/).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PYTEST_ARGS ?=
TESTS ?= tutorials tests
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-timm test-lowest lint format docs clean

help:  ## Say what the targets do.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(STAMPS)/package  ## Train, predict and aggregate on a synthetic slide; results in demo/.
	$(BIN)/python -m pixnet._demo --out demo

test: $(STAMPS)/test  ## Run the tests (PYTEST_ARGS="-k name" or TESTS=tests/pl to choose; WORKERS=1 to run them one by one).
	$(BIN)/python -m pytest -q --nbmake -m "not slow and not timm" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) $(TESTS)

test-slow: $(STAMPS)/test  ## Run the tests that fail a write at every single step, and other long ones.
	$(BIN)/python -m pytest -q -m slow -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) tests

test-timm: $(STAMPS)/test,timm  ## Run the tests of encoders that come from timm.
	$(BIN)/python -m pytest -q -m timm $(PYTEST_ARGS) tests

test-lowest:  ## Run the tests with the lowest versions that pyproject.toml allows, installed in .venv-lowest.
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt TESTS="$(TESTS)"

lint: $(STAMPS)/lint  ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint  ## Fix style and formatting where a tool can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMPS)/docs  ## Build the site into docs/_build/html, warnings as errors, no network.
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky -q -b html docs docs/_build/html
	@echo "The site is in docs/_build/html/index.html"

clean:  ## Remove what the other targets made, .venv excepted.
	rm -rf demo docs/_build docs/generated .pytest_cache .ruff_cache

# One editable install for each set of extras that a target needs.
$(STAMPS)/%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable $(if $(filter package,$*),.,".[$*]")
	@mkdir -p $(STAMPS) && touch $@
