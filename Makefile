# `make demo` and `make test` do all the set-up themselves; `make help` lists everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Holds the folder the environment was made for: a copied or moved checkout must not run the original's code.
STAMP := $(VENV)/.installed-for
# nnU-Net's commands are found as if the environment were activated
ACTIVATED := PATH="$(CURDIR)/$(BIN):$$PATH"
# Two processes, since a test keeps one core busy. The tests of a file share module fixtures (trained models), which the
# schedulers "load" and "worksteal" would build in both processes; files keep their order, in which the last are short,
# so that neither process waits long for the other. nnU-Net takes a thread per core on a CPU: those of two trainings spin
# while they wait for each other, unless they wait passively (measured: 40 iterations in 4 s instead of 38 s).
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-fast nightly versions lint types docs clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

venv: $(STAMP)  ## the environment alone (.venv), made or brought up to date

$(STAMP): pyproject.toml setup.py
	@echo "==> Setting up $(VENV) (nnU-Net, PyTorch and the tools; the first time several GB are downloaded)"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, found $$($(BIN)/python -V); remove $(VENV) and set PYTHON=python3.x"; exit 1; }
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@printf '%s' '$(CURDIR)' > $(STAMP)

demo: $(STAMP)  ## nnU-Net alone beside the plugin, on synthetic patients of two scanners; results in ./demo
	@echo "==> Running the demo into ./demo (under 10 minutes on two cores)"
	@$(ACTIVATED) nnunet_cfcl demo --out demo

test: $(STAMP)  ## all tests, the end-to-end runs of the real commands included
	@echo "==> Running all tests, end-to-end runs included ('make test-fast' leaves those out)"
	@$(ACTIVATED) $(PYTEST)

test-fast: $(STAMP)  ## the tests without the end-to-end runs
	@echo "==> Running the tests without the end-to-end runs"
	@$(ACTIVATED) $(PYTEST) -m "not end_to_end and not nightly"

nightly: $(STAMP)  ## all tests, the long ones too (kills, every trainer), fuzzing, versions of nnU-Net; hours
	@echo "==> Running all tests, the nightly ones included"
	@$(ACTIVATED) $(PYTEST) -m ""
	@echo "==> Fuzzing every reader of files for ten minutes"
	@$(ACTIVATED) python -m tests.fuzz --minutes 10 --out benchmark_results/fuzzing.json
	@$(MAKE) versions

versions: $(STAMP)  ## which versions of nnU-Net work, each tried in an environment of its own (needs pip's index)
	@echo "==> Trying versions of nnU-Net; the table is docs/reference/compatibility.md"
	@$(ACTIVATED) python -m tests.compatibility.matrix

lint: $(STAMP)  ## style and common mistakes (ruff), which room imports which (import-linter)
	@$(BIN)/ruff check
	@$(BIN)/lint-imports

types: $(STAMP)  ## type check (mypy)
	@$(BIN)/mypy

docs: $(STAMP)  ## the documentation, into ./site; reference pages are made from the code, broken links are errors
	@echo "==> Building the documentation into ./site (site/index.html; with its search: python3 -m http.server -d site)"
	@$(BIN)/python docs/generate_reference.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove what demo, tests and builds left; keeps .venv
	rm -rf demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nnunet_cfcl trainers tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## as clean, and remove .venv too
	rm -rf $(VENV)
