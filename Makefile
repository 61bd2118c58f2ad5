PYTHON ?= python3
VENV ?= .venv
# Bytecode is written by the first process that imports a module, for all later ones.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint docs linkcheck

# A teacher and a student on scikit-learn's bundled digits: minutes on two cores.
quickstart: $(VENV)/.quickstart
	$(VENV)/bin/python recipes/quickstart.py

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The documentation site, in docs/_build/html.
docs: $(VENV)/.dev
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Addresses on the pages that do not answer; needs a network, and is no part of the tests.
linkcheck: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck

# One environment; each target adds what it needs, once. With --no-compile bytecode is made later, only for modules that are
# imported. With `INSTALL="uv pip install -q -p .venv"` the installation takes a quarter of the time.
INSTALL ?= $(VENV)/bin/python -m pip install -q --no-compile
$(VENV)/.%: setup.py
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): minutes the first time."
	$(INSTALL) -e '.[$*]'
	touch $@
