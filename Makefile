# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROCESSES ?= 2
# The programs of tests/benchmarks; ARGS are their options: make gpu ARGS="--only limits,model"
BENCH = PYTHONPATH=tests $(BIN)/python -m benchmarks
PYTEST = $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile
# The files that hold tests of a marker: importing all others takes longer than many a test. -r: from behind, where the
# slow files with the longest tests are.
FILES_OF = $$(grep -rlE 'mark\.$(1)\b' tests --include='test_*.py' | sort $(2))

.PHONY: install check audit test test-slow test-cluster test-soak mutations demo gpu bench-convert bench-scale bench-fusion test-gpu format lock clean

install: $(STAMP)

# Compiled once, as pip does: where PYTHONDONTWRITEBYTECODE is set, each process would compile all of torch again (1 s).
$(STAMP): requirements.lock pyproject.toml
	@if command -v uv >/dev/null 2>&1; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock && \
		uv pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements.lock && \
		$(BIN)/python -m pip install --quiet --no-deps --editable .; \
	fi
	@touch $@

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: install
	.ci/audit

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m "slow and not gpu and not soak" --no-loadscope-reorder $(call FILES_OF,slow,-r)

# One after the other: nodes are given up by seconds without an answer.
test-cluster: install
	$(BIN)/python -m pytest -m "cluster and not soak" $(call FILES_OF,cluster)

# The same promises at their full size: hours. ARGS="-k million" chooses.
test-soak: install
	$(BIN)/python -m pytest -m soak $(ARGS)

# The product broken on purpose, one place at a time: a test must notice.
mutations: install
	$(BIN)/python tests/mutations.py

demo: install
	$(BIN)/ca2st demo
	@echo "The command ca2st lives in $(VENV): source $(BIN)/activate"

gpu: install
	$(BENCH).gpu --results tests/benchmarks/results $(ARGS)

bench-convert: install
	$(BENCH).conversion $(ARGS)

bench-scale: install
	$(BENCH).conversion_scale $(ARGS)

bench-fusion: install
	$(BENCH).fusion $(ARGS)

test-gpu: install
	CA2ST_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu

lock:
	uv pip compile --universal --python-version 3.11 --extra demo --extra dev --generate-hashes --no-emit-index-url \
		--no-header --quiet -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
