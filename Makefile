# What a person, README.md and CI type. Every target makes .venv first if it is missing or out of date.

# The constraints were tested on 3.11; 3.12 works too.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$python && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip --quiet

.PHONY: install demo check test test-fast notebooks pages bench chaos clean

install: .venv/.wheel

# torch goes first: once it is there at the constrained version, no other package asks for a build of its own.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "bertray needs Python 3.11 or 3.12: install one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt torch setuptools
	$(PIP) install --constraint constraints.txt '.[dev]'
	touch $@

# What runs is the package as users get it, made again when the library has changed.
.venv/.wheel: .venv/.installed $(shell find lib/bertray -name '*.py' -o -name '*.html')
	rm -rf build .venv/wheel
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir .venv/wheel .
	$(PIP) install --no-deps --force-reinstall .venv/wheel/*.whl
	rm -rf build
	touch $@

demo: install
	.venv/bin/bertray demo

check: install
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Two processes, each with a Ray cluster of its own: most of the time a test waits for a process to start or to end.
test: install
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Without what starts Ray, a server, or a process that loads a model.
test-fast: install
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not chaos and not services'

notebooks: install demo/scored/runs/latest.json
	$(PY) -m nbconvert --to html --execute notebooks/*.ipynb --output-dir demo
	@echo "open demo/01-model.html, demo/02-archive.html"

# The pages of all that the demo has written, and of an audit of its labels, which takes two short trainings.
pages: install demo/scored/runs/latest.json demo/label_check/label_quality.json
	.venv/bin/bertray report demo/bundle demo/evaluation demo/label_check demo/scored/runs/2* demo/scored
	@echo "open demo/scored/index.html, demo/evaluation/report.html, demo/bundle/report.html, demo/label_check/report.html"

demo/label_check/label_quality.json: demo/scored/runs/latest.json
	.venv/bin/bertray audit --data demo/dataset --output demo/label_check --encoder minilm --folds 2 --epochs 3 --learning-rate 5e-4 --overwrite

demo/scored/runs/latest.json:
	$(MAKE) demo

# Training (train, levers, tune, tasks, label_quality), which takes hours, runs as python -m benchmarks.NAME.
bench: install demo/scored/runs/latest.json
	$(PY) -m benchmarks.tokenize
	$(PY) -m benchmarks.engine --bundle demo/bundle
	$(PY) -m benchmarks.fixed
	$(PY) -m benchmarks.score
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.scale

chaos: install
	$(PY) -m pytest -m chaos
	$(PY) -m benchmarks.chaos
	$(PY) -m benchmarks.sick

clean:
	rm -rf .venv demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis lib/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
