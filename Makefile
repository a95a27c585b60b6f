# The targets a person needs; each sets up what it needs on a fresh machine.
#   make demo [VIDEOS=~/clips]   the whole machine in a minute: videos to token shards and back
#   make test                    every quick test;  make test-slow  the long ones
#   make check                   format, lint, types
#   make bench                   the benchmarks;  figures are comparable within one run only
#   make constraints             take today's newest versions as the pinned ones

PYTHON ?= python3
VIDEOS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format bench constraints clean

help:
	@sed -n '2,6s/^#   /  /p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "vidshard needs Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/vidshard demo $(VIDEOS)

test: $(READY)
	$(BIN)/pytest -m 'not slow'

test-slow: $(READY)
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.tiling
	$(BIN)/python -m benchmarks.tiling

constraints:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	{ echo "# What CI runs: every package of the environment, pinned. Remade by 'make constraints'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.txt

clean:
	rm -rf $(VENV) demo-out build *.egg-info
