# make venv | demo | test | lint | check. PYTHON picks the interpreter that .venv is made from (3.11 or newer).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two workers, a file's tests in one of them: half of the tests start processes and wait.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: venv demo test lint check

venv: $(STAMP)

# torch comes first and alone, so that TORCH can name a build (TORCH="torch==2.13.0 --index-url ...") for all the rest.
$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megalong needs Python 3.11 or newer, and $(PYTHON) is not; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[test]'
	@touch $@

# The CPU demo: data, SFT, GRPO, report. SEED and OUT come from the environment.
demo: $(STAMP)
	PYTHON=$(BIN)/python launch/demo.sh

test: lint
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Before a commit: lint and the unit tests alone.
check: lint
	$(PYTEST) tests/unit
