# Every command sets itself up: a virtual environment, and what is pinned in requirements*.txt.
PYTHON ?= python3
BIN := .venv/bin
ROWS ?= 10000 1000000

.PHONY: help run test lint bench bench-db torture

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run ## serve on http://localhost:8000 (PORT=8123 make run serves there)
	@exec $(BIN)/python main.py

# A worker for each processor: PyTorch's threads of several would only wait for each other there.
test: .venv/dev ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: .venv/dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

bench: .venv/dev ## measure speed against the baselines, in one table
	$(BIN)/python -m benchmarks.table

bench-db: .venv/dev ## measure the history: ROWS="10000 1000000 10000000" make bench-db
	$(BIN)/python -m benchmarks.history --rows $(ROWS) --out docs/history.json
	$(BIN)/python -m benchmarks.history_chart docs/history.json docs/history.svg
	$(BIN)/python -m benchmarks.transfer

torture: .venv/dev ## kill it and its databases under load, cut the power; count what was lost
	$(BIN)/python -m benchmarks.kill_test --kills 100
	$(BIN)/python -m benchmarks.once_test --kills 20
	$(BIN)/python -m benchmarks.backup_drill --drills 15
	$(BIN)/python -m benchmarks.greedy_test --prompts 200
	$(BIN)/python -m benchmarks.leak_test --requests 10000
	$(BIN)/python -m benchmarks.replay_test --records 200
	$(BIN)/python -m benchmarks.stream_test --kills 200 --stops 50 --hangups 100 --streams 200 --locked 10
	$(BIN)/python -m benchmarks.power_cut --cuts 200
	$(BIN)/python -m benchmarks.processes
	$(BIN)/python -m benchmarks.faults postgresql --times 20
	$(BIN)/python -m benchmarks.faults mariadb --times 10
	$(BIN)/python -m benchmarks.faults locked
	$(BIN)/python -m benchmarks.faults taken --times 3
	$(BIN)/python -m benchmarks.faults replaced --times 3
	$(BIN)/python -m benchmarks.redis_test --times 10

.venv/run: requirements.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: PYTHON=… names another" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
