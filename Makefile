# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests run side by side; each process computes on one thread.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --no-loadscope-reorder
# What the tests want installed, and the file that pins all of it.
EXTRAS := demo report servers deepspeed low-bit video sentencepiece web wandb mlflow lmms-eval lmms-eval-core docs dev
LOCK := locks/dev.txt
# Parts of the tests that are targets of their own.
OTHERS := browser cuda_rehearsal launched pages
# Versions of what a CUDA build of torch brings, where pip takes one: for the torch of the locks above.
CUDA := -c locks/cuda.txt
UV = $(BIN)/uv
COMPILE = $(UV) pip compile --quiet --config-file locks/uv.toml --custom-compile-command 'make lock'

.PHONY: demo test lint types tests test-browser test-cuda test-launched test-pages test-oldest test-newest test-vllm docs dist lock clean

demo: $(VENV)/.demo
	$(BIN)/align demo --folder demo-run

# Types are checked beside the first tests, which wait for other processes now and then.
test: lint
	$(MAKE) --jobs 2 types tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck scripts/*.sh scripts/*.sbatch .ci/run
	$(BIN)/hadolint docker/*.Dockerfile

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(PYTEST) $(OTHERS:%=--ignore=tests/%) $(ARGUMENTS)

# The report and the pages of `align chat` and `align label` in a real browser; says so where none is installed.
test-browser: $(VENV)/.dev
	$(PYTEST) -rs tests/browser

# What would run on a GPU, rehearsed on tensors that only seem to be there.
test-cuda: $(VENV)/.dev
	$(PYTEST) tests/cuda_rehearsal

# Processes that the command starts by itself: their faults, and a whole run that is stopped and resumed.
test-launched: $(VENV)/.dev
	$(PYTEST) tests/launched

# The pages are built, their commands and examples run.
test-pages: $(VENV)/.dev
	$(PYTEST) tests/pages

# The pages and the reference, in build/site.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A wheel and a source archive, in dist.
dist: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation

# The suite with the oldest and with the newest of everything that pyproject.toml admits, each in an environment of its own.
test-oldest:
	$(MAKE) tests VENV=.venv-oldest LOCK=locks/oldest.txt CUDA= ARGUMENTS="-m 'not locked'"

test-newest: $(VENV)/.dev
	mkdir -p build
	$(COMPILE) --upgrade --python $(BIN)/python pyproject.toml $(EXTRAS:%=--extra %) -o build/newest.txt
	$(MAKE) tests VENV=.venv-newest LOCK=build/newest.txt CUDA= ARGUMENTS="-m 'not locked'"

# The plugin and the engine against vLLM itself, with the transformers that vLLM wants.
test-vllm:
	$(MAKE) .venv-vllm/.dev VENV=.venv-vllm LOCK=locks/vllm.txt CUDA=
	OMP_NUM_THREADS=1 .venv-vllm/bin/pytest tests/vllm

# All packages to the newest versions that pyproject.toml and locks/held.txt admit, for every Python and system.
lock: $(VENV)/.dev
	$(COMPILE) --upgrade --universal -c locks/held.txt --overrides locks/overrides.txt pyproject.toml $(EXTRAS:%=--extra %) -o locks/dev.txt
	$(COMPILE) --upgrade --universal -c locks/dev.txt --overrides locks/overrides.txt pyproject.toml --extra demo -o locks/demo.txt
	$(COMPILE) --upgrade --universal -c locks/dev.txt locks/install.in -o locks/install.txt
	$(UV) pip compile --quiet --no-config --custom-compile-command 'make lock' --upgrade --universal -c locks/dev.txt -c locks/install.txt locks/cuda.in -o locks/cuda.txt
	$(COMPILE) --upgrade --python-version 3.11 --resolution lowest-direct pyproject.toml $(EXTRAS:%=--extra %) -o locks/oldest.txt
	$(COMPILE) --upgrade --python-version 3.11 --overrides locks/vllm-overrides.txt pyproject.toml --extra servers --extra sentencepiece locks/vllm.in -o locks/vllm.txt

# torch before the rest and alone with what its build requires: CUDA's libraries on most systems, nothing for a CPU build.
$(VENV)/.torch: locks/install.txt locks/cuda.txt $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r locks/install.txt
	$(PIP) install --quiet -c $(LOCK) $(CUDA) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch locks/demo.txt pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation -r locks/demo.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(LOCK) pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation -r $(LOCK) -e .
	touch $@

clean:
	rm -rf .venv .venv-* demo-run build dist *.egg-info
