# Needs Python 3.11 or newer and make; everything else goes into $(VENV).
#
#   make demo        the main job on real input
#   make test        the test suite          (ARGS="-k word" narrows it)
#   make check       format, lint, types, layering, API
#   make bench       the benchmarks, into benchmarks/results/
#   make docs        the documentation, into docs/_build/html/
#   make soak        the tests that run for minutes
#   make clean       what was built; `make distclean` takes the environment along

VENV ?= .venv
ARGS ?=
# Tests that share a pool or a heavy import run one after the other where they can.
PYTEST_FLAGS ?= -n auto --dist worksteal

FITS = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# The first that is new enough and can make an environment; running it is the test, since a version manager's shim may exist
# for a Python that is switched off.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python3.15 python; do \
	$$p -c '$(FITS)' >/dev/null 2>&1 && { echo $$p; break; }; done)

BIN = $(VENV)/bin
PY = $(BIN)/python
# pip compiles what it installs, but not the checkout; and an environment may keep Python from writing byte code by itself.
COMPILE = @$(PY) -m compileall -q fdshare integrations
# The tests may: each process compiles them again otherwise, which took 20 s of a run.
PYTEST = PYTHONDONTWRITEBYTECODE= $(PY) -m pytest

.PHONY: demo test check format bench docs soak clean distclean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-base
	$(PY) -m fdshare demo

test: $(VENV)/.installed-test
	$(PYTEST) $(PYTEST_FLAGS) $(ARGS)

soak: $(VENV)/.installed-test
	$(PYTEST) -m soak --timeout 3600 -o faulthandler_timeout=3500 $(ARGS)

# fdshare/ holds the link to integrations/, so mypy sees both under the names users import.
check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(PY) -m mypy fdshare $(wildcard examples/*.py)
	$(PYTEST) -q tests/test_layering.py tests/test_api.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.installed-bench
	$(PY) -m benchmarks $(ARGS)

docs: $(VENV)/.installed-docs
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# An environment that was there before is used as it is; one that was left half made is made again.
$(VENV)/.created:
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		python="$(PYTHON)"; "$${python:-none}" -c '$(FITS)' 2>/dev/null || { \
			echo "fdshare needs Python 3.11 or newer with venv and ensurepip; $${python:-nothing found on PATH} does not serve." >&2; \
			echo "Install one (on Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
			exit 1; }; \
		echo "making $(VENV) with $$python"; "$$python" -m venv $(VENV); }
	@touch $@

$(VENV)/.installed-base: $(VENV)/.created pyproject.toml
	$(PY) -m pip install -q --disable-pip-version-check -e .
	$(COMPILE)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	$(PY) -m pip install -q --disable-pip-version-check -e '.[$*]'
	$(COMPILE)
	@touch $@

clean:
	rm -rf build dist docs/_build .ci/reports benchmarks/build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
