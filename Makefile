# Two commands: `make demo` sets up and quantizes the embedded model; `make test` sets up and runs every check and test.
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE  # a spinning OpenMP barrier costs milliseconds a region on shared cores

.PHONY: demo test

demo: .venv/installed
	.venv/bin/latmix demo

test: .venv/installed-dev
	.venv/bin/ruff check src tests scripts benchmarks
	.venv/bin/ruff format --check src tests scripts benchmarks
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/pytest

# torch by its exact version first: looser requests can pick another build.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet torch==2.13.0
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/pip install --quiet --editable '.[dev,export,parity]'
	touch $@
