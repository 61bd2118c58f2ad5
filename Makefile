PYTHON ?= python3
VENV ?= .venv

.PHONY: quickstart test lint

# A teacher and a student on scikit-learn's bundled digits: minutes on two cores.
quickstart: $(VENV)/.quickstart
	$(VENV)/bin/python recipes/quickstart.py

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.%: setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e .[$*]
	touch $@
