# `make demo` sets up and quantizes the embedded model; `make test` sets up and runs every check and test, and
# builds the documentation, which fails on any broken link; `make docs` does that alone, into site/. `make test-engines`
# makes the environments of vLLM and llama.cpp (half an hour, once) and runs exports in them.
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE  # a spinning OpenMP barrier costs milliseconds a region on shared cores

.PHONY: demo test test-engines docs

demo: .venv/installed
	.venv/bin/latmix demo

test: .venv/installed-dev
	.venv/bin/ruff check src tests scripts benchmarks
	.venv/bin/ruff format --check src tests scripts benchmarks
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/mkdocs build --strict --site-dir .venv/site
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses auto --dist loadfile

test-engines: .venv/installed-dev
	scripts/engines.sh .venv/engines
	OMP_NUM_THREADS=1 .venv/bin/pytest -v tests/test_engines.py tests/test_engines_served.py --engines .venv/engines

docs: .venv/installed-docs
	.venv/bin/mkdocs build --strict

# torch by its exact version first: looser requests can pick another build.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet torch==2.13.0
	.venv/bin/pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/pip install --quiet --editable '.[dev,docs,eval,export,parity,plots]'
	touch $@

.venv/installed-docs: .venv/installed
	.venv/bin/pip install --quiet --editable '.[docs]'
	touch $@
