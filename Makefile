# Everything a newcomer needs: `make demo` and `make test` set up their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test slow real cov lint types wheel-check clean

demo: $(VENV)/.installed
	$(BIN)/alphasmith run

# Two processes, each with the tests of whole files; one thread each, since most of what is computed is small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

# Every kind of fault once, Ray clusters, the examples as they are launched; `python -m tests.chaos` plays hundreds of faults.
slow: $(VENV)/.installed
	$(PYTEST) -rs -m slow

# Real models out of packages, the short form; what cannot be had is left out with the reason. See docs/real_models.md.
real: $(VENV)/.installed
	$(BIN)/python -m benchmarks.real_models --models MiniLM DINOv2 --schemes w8a8-channel-static --seeds 0 --short --check

cov: $(VENV)/.installed
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# The wheel, not the checkout, is what users get: install it alone and run it from an empty folder.
wheel-check: $(VENV)/.installed
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(BIN)/python -m build --wheel --outdir build/wheel . >build/wheel/build.log 2>&1 || (cat build/wheel/build.log && false)
	$(PYTHON) -m venv --system-site-packages build/wheel/venv
	build/wheel/venv/bin/python -m pip --quiet install --no-deps build/wheel/*.whl
	echo "$$($(CURDIR)/$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > "$$(build/wheel/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	cd build/wheel/empty && ../venv/bin/python $(CURDIR)/tests/packaging/wheel_smoke.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed; set PYTHON=python3.12, say" && false)
	@echo "setting up $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev]'
	mkdir -p .ns && ln -sfn .. .ns/alphasmith
	touch $@

clean:
	rm -rf $(VENV) .ns build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
