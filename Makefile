# Every target makes .venv when there is none; the stamp file says that it is complete.
#
#   make demo        compile the bundled model to int4 and let it tell a story
#   make test        the fast tests, at most 15 minutes on 2 cores
#   make test-full   every test; after `test` on the same command line, only those that `test` left out
#   make lint typecheck bench bench-cpu clean
#
# PYTHON=/path/to/python3 chooses the interpreter of a new .venv. Tests run in one process a core (WORKERS=0:
# in one process), each with one torch thread; PYTEST_ARGS is handed to pytest. On a machine without a GPU,
# PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU wheels saves gigabytes of CUDA.

VENV := .venv
STAMP := $(VENV)/.complete
BIN := $(VENV)/bin
PYTHON ?=
# The cores this process may use; what pytest calls `auto` counts fewer where cores are threads of others.
WORKERS ?= $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
PYTEST_ARGS ?=
# A file's tests stay in one process: they share what its fixtures compiled.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
DEMO := build/demo

.PHONY: demo test test-full lint typecheck bench bench-cpu clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(STAMP)
	@mkdir -p $(DEMO)
	$(BIN)/llmc compile models/stories-7m --quant int4 --target reference -o $(DEMO)/stories-7m-int4.llmc --force
	$(BIN)/llmc generate $(DEMO)/stories-7m-int4.llmc --prompt "Once upon a time" --max-tokens 80

test: $(STAMP)
	$(PYTEST) -m "not slow"

# `make test test-full` runs every test once.
test-full: $(STAMP)
	$(PYTEST) $(if $(filter test,$(MAKECMDGOALS)),-m slow)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(STAMP)
	$(BIN)/pyright

bench: $(STAMP)
	@set -e; for script in $(sort $(wildcard bench/bench_*.py bench/*/bench_*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

# Peers join by LLMC_BENCH_PEERS="openvino=openvino:MODEL:PYTHON ..."; see docs/cpu-performance.md.
bench-cpu: $(STAMP)
	$(BIN)/python bench/cpu/prepare.py
	$(BIN)/python bench/cpu/kernels.py
	$(BIN)/python bench/cpu/end_to_end.py --shape qwen2.5-0.5b
	$(BIN)/python bench/cpu/end_to_end.py --shape llama-3.2-1b
	$(BIN)/python bench/cpu/first_token.py
	$(BIN)/python bench/cpu/build.py
	$(BIN)/python bench/cpu/sampling.py
	$(BIN)/python bench/cpu/accuracy.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and pinned: any looser request resolves to the newest CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || bash .ci/make-venv $(VENV) "$(PYTHON)"
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[compile,serve,dev]'
	@touch $@
