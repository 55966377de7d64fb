# Two commands do everything on a fresh machine: `make serve` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
ARGS ?=

.PHONY: install serve test lint clean

install: $(VENV)/.installed

# Constraints pin the tested versions; torch among them, because an unpinned torch brings gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	touch $@

serve: install
	$(BIN)/boomerang serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info
