# make demo    train and compare clean, gradient-norm and SGR classifiers on real digits; writes demo-report/
# make test    the test suite
# make lint    style, types
# make docs    the site, into build/docs/; a warning fails it
# make fuzz    the tests that draw examples, with fresh ones; what fails prints how to see it again
# make bench   the operators' benchmark (results in benchmarks/results/)
# make versions  the quick tests under other versions of torch and Triton; an hour
# make zoo     models of timm, torchvision and transformers under every method, into docs/support.md; two hours
# make gpu     on a machine with an NVIDIA GPU: build, test, sanitize, measure, with the PYTHON that has torch
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
# pytest-xdist gives every worker a process; threads inside them would only compete.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
GPU_RESULTS ?= gpu-results
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test fuzz lint format docs bench gpu versions zoo clean

demo: $(READY)
	$(BIN)/sgr demo --out demo-report

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

fuzz: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --hypothesis-profile=fresh \
	    $(shell grep -rl 'from hypothesis' tests --include='test_*.py')

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(ONE_THREAD) $(BIN)/python -m sphinx -q -E -n -W --keep-going -c docs/site -b html . build/docs

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-enable -p no:xdist

gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(GPU_RESULTS) $(PARTS)

zoo: .venv-zoo/.ready
	.venv-zoo/bin/python -m tests.zoo.measure
	.venv-zoo/bin/python -m tests.zoo.table

.venv-zoo/.ready: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/python -m pip install --quiet setuptools wheel ninja numpy torch==2.14.1 torchvision==0.29.1 \
	    timm==1.0.31 transformers==5.24.0
	SGR_BUILD=cpu .venv-zoo/bin/python -m pip install --quiet --no-build-isolation -e .
	touch $@

versions:
	PYTHON=$(PYTHON) benchmarks/versions.sh versions $(ROWS)

$(READY): constraints.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel ninja numpy torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-zoo build dist *.egg-info sgr_kernels/*.so
