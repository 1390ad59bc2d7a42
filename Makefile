# Works with GNU make 3.81, which macOS ships, and newer.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
EXPERIMENT := examples/digits.toml
DEMO := runs/demo
BOARD := build/board

.DEFAULT_GOAL := help
.PHONY: help demo test slow board-test chaos lint format tree figures clean

help:  ## list what make can do here
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## prune a net, train it on six agents over MQTT, write a report
	@out=$(DEMO); number=2; \
	while [ -e "$$out" ]; do out=$(DEMO)-$$number; number=$$((number + 1)); done; \
	if [ "$$out" != "$(DEMO)" ]; then echo "Earlier runs are kept; this one goes to $$out."; fi; \
	$(BIN)/scalarfed testbed run $(EXPERIMENT) --out "$$out" && \
	echo "The report lies at $$out/report.html"

test: $(READY)  ## run the tests, all but the slow ones
	@$(BIN)/python -m pytest

slow: $(READY)  ## run the slow tests: minutes, not seconds
	@$(BIN)/python -m pytest -m slow

board-test: $(READY)  ## boot a flashed image on an emulated board and let it train (needs root and qemu)
	@sh tests/board/build.sh $(BOARD)
	@BOARD=$(abspath $(BOARD)) $(BIN)/python -m pytest -m board -n 0 -s tests/board

SEED := 7
ROUNDS := 200
FAULTS := 60
chaos: $(READY)  ## run six agents among faults: make chaos SEED=7 ROUNDS=200 FAULTS=60
	@PYTHONPATH=. $(BIN)/python -m benchmarks.chaos --seed $(SEED) --rounds $(ROUNDS) --faults $(FAULTS)

lint: $(READY)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## let ruff put the code in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tree: $(READY)  ## write the file tree in README.md anew
	@$(BIN)/python docs/file_tree.py

figures: $(READY)  ## write the figures in README.md anew, from RUNS="runs/demo ..."
	@$(BIN)/python docs/figures.py $(or $(RUNS),$(DEMO))

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment is made with the first Python >= 3.10 that is found; PYTHON=... names another.
$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$($$python --version)."; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python >= 3.10 with venv and pip was found on the PATH." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python)," >&2; \
	echo "or name one: make demo PYTHON=/path/to/python3" >&2; \
	exit 1

$(READY): $(BIN)/python pyproject.toml constraints.txt $(wildcard setup.py edge_agent/native/*.[ch])
	@echo "Installing scalarfed into $(VENV). The first time takes minutes: torch is large."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[coordinator,prune,dev]'
	@touch $@

include native.mk
