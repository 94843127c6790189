# make quickstart   a language model from nothing, in at most ten minutes on two cores
# make sweep        isoFLOP ladders of four architectures and their scaling laws (an hour of CPU)
# make test         the test suite, in minutes
# make test-all     the tests that it leaves out (hours): more cases, every mesh, kernels and steps compiled for TPUs and GPUs,
#                   runs of several processes, pages in a headless Chromium, which CHROMIUM names. TESTS names some of them;
#                   CI=1 takes those of a step of CI, NTH=4 of each test's cases every fourth
# make docs         the site, in site/
# make lint         ruff and mypy
# Each target makes its own environment in VENV, .venv by default; PYTHON names its interpreter, 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests
NTH ?= 1
EXTRAS ?= test,parity,aot,pages
# Most of the programs that tests run are compiled to run once. Those for devices that are not present are compiled as a
# user's are (the fixture ``optimised``).
PYTEST := JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal

.PHONY: quickstart sweep test test-all docs lint clean

quickstart: $(VENV)/installed
	$(BIN)/python launch/quickstart.py --workdir=runs/quickstart

sweep: $(VENV)/installed-sweep
	test -d runs/sweep/corpus || $(BIN)/python launch/prepare_data.py --source=python-stdlib --output=runs/sweep/corpus \
	  --vocab_size=2048
	$(BIN)/python launch/sweep.py --config=configs/sweeps/quickstart.py --workdir=runs/sweep \
	  --parallel=2 --config.data.path=runs/sweep/corpus
	$(BIN)/python launch/scaling.py --workdir=runs/sweep --baseline=transformer

test: $(VENV)/installed-test
	JAXLINEAR_NTH=$(NTH) $(PYTEST) --durations=15 $(TESTS)

test-all: $(VENV)/installed-test
	JAXLINEAR_TESTS=$(if $(CI),ci,rest) JAXLINEAR_NTH=$(NTH) $(PYTEST) --durations=15 $(TESTS)

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Python compiles what is imported; compiling all of every package would take longer than to install it.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxlinear needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	touch $@

$(VENV)/installed-sweep: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[sweep,plot]'
	touch $(VENV)/installed $@

$(VENV)/installed-test: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	touch $(VENV)/installed $(VENV)/installed-sweep $@

$(VENV)/installed-docs: $(VENV)/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-newest build site *.egg-info
