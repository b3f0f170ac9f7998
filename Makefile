# Every command sets itself up: a virtual environment, and what is pinned in requirements*.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run test lint bench torture

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run ## serve on http://localhost:8000 (PORT=8123 make run serves there)
	@exec $(BIN)/python main.py

test: .venv/dev ## run the tests
	$(BIN)/python -m pytest

lint: .venv/dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench: .venv/dev ## measure the engine against its baselines
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.conversation

torture: .venv/dev ## kill -9 the service 100 times under load and count what was lost
	$(BIN)/python -m benchmarks.kill_test --kills 100

.venv/run: requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
