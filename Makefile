# Two commands do everything on a fresh machine: `make serve` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
ARGS ?=

.PHONY: install serve test test-ray test-autoscale lint clean

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

# Ray Serve on one node: needs a gigabyte of packages and a minute, so it is not part of `make test`.
test-ray: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,ray]'
	BOOMERANG_TEST_RAY=1 $(BIN)/python -m pytest tests/deploy/test_ray.py $(ARGS)

# A load that rises and falls against real replicas: its outcome depends on the speed of the machine, so it is run by hand.
test-autoscale: install
	BOOMERANG_TEST_AUTOSCALE=1 $(BIN)/python -m pytest tests/deploy/test_autoscale_e2e.py $(ARGS)

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf build dist *.egg-info
