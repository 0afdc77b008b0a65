# Everything sets itself up: the first target that needs it makes .venv and installs the pinned dependencies.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

# Processes that tests run in.
WORKERS ?= 2

.PHONY: demo test test-fast test-slow lint docs bench clean

demo: $(STAMP)
	$(PY) -m gradacc demo

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup

# The laws and the pieces: what to run while one writes.
test-fast: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup tests/laws tests/test_aux.py tests/test_batch.py tests/test_map.py tests/test_mean.py tests/test_units.py -k "not over_200_calls"

# Packages of docs/recipes. Two of them beside the others, see tests/vision.py.
test-slow: $(STAMP)
	$(PIP) --no-build-isolation -e '.[recipes]'
	$(PIP) --no-deps --upgrade --target $(VENV)/beside timm torchvision
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup -m slow

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build

bench: $(STAMP)
	$(PIP) --no-build-isolation -e '.[bench]'
	$(PY) -m benchmarks.eager
	$(PY) -m benchmarks.boundary
	$(PY) -m benchmarks.sharded
	$(PY) -m benchmarks.compiled
	$(PY) -m benchmarks.optim
	$(PY) -m benchmarks.microbatch
	$(PY) -m benchmarks.through
	$(PY) -m benchmarks.random
	$(PY) -m benchmarks.agreement
	$(PY) -m benchmarks.scale
	$(PY) -m benchmarks.pages

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(f"gradacc needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
