# make quickstart   a language model from nothing, in at most ten minutes on two cores
# make sweep        isoFLOP ladders of four architectures and their scaling laws (an hour of CPU)
# make test         the test suite
# make test-cases   all cases of the tests from which make test takes some, such as more mixers and meshes
# make test-compiled  kernels compiled for TPUs and GPUs and run on an emulated GPU; results of launch/compile.py (minutes)
# make test-published  training steps of published sizes, compiled for a TPU pod and for GPUs (minutes)
# make test-meshes  every model on every mesh that splits time, the exchanges of compiled steps, and runs of several
#                   processes (a quarter of an hour)
# make test-newest  operations, kernels, meshes and the work that overlaps exchanges on GPUs, with the newest JAX;
#                   PYTHON_NEWEST names a Python of 3.12 or newer, TESTS_NEWEST other tests, STEPS_NEWEST other steps
# make test-pages   reports opened in a headless browser, which CHROMIUM names
# make lint         ruff and mypy
# NTH=4 has test-cases, test-meshes and test-newest take every fourth case of each test; CASES= has test-compiled and
# test-newest take those that their tests name, as make test does.
# Each target makes its own environment in .venv (test-newest: .venv-newest); PYTHON names its interpreter, 3.11 or newer.

PYTHON ?= python3
PYTHON_NEWEST ?= python3.13
BIN := .venv/bin
CHROMIUM ?= chromium
TESTS_NEWEST ?= tests/ops tests/pallas tests/parallel
STEPS_NEWEST ?= griffin_7b or (test_on_gpu and hawk)
NTH ?= 1
CASES ?= --every_case

.PHONY: quickstart sweep test test-cases test-compiled test-published test-meshes test-newest test-pages lint clean

quickstart: .venv/installed
	$(BIN)/python launch/quickstart.py --workdir=runs/quickstart

sweep: .venv/installed-sweep
	test -d runs/sweep/corpus || $(BIN)/python launch/prepare_data.py --source=python-stdlib --output=runs/sweep/corpus \
	  --vocab_size=2048
	$(BIN)/python launch/sweep.py --config=configs/sweeps/quickstart.py --workdir=runs/sweep \
	  --parallel=2 --config.data.path=runs/sweep/corpus
	$(BIN)/python launch/scaling.py --workdir=runs/sweep --baseline=transformer

# Most of the programs that tests run are compiled to run once. Those for devices that are not present are compiled as a
# user's are, as all are by test-compiled, test-published and test-pages.
test: .venv/installed-test
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal --durations=15 tests

test-cases: .venv/installed-test
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal --every_case \
	  --every_nth=$(NTH) -m some_cases tests

test-compiled: .venv/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist=worksteal --compiled $(CASES) tests/pallas/test_*_compiles.py \
	  tests/pallas/test_on_an_emulated_gpu.py tests/launching/test_sizing.py

test-published: .venv/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --published_sizes tests/launching/test_published_sizes.py

test-meshes: .venv/installed-test
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -n 2 --dist=worksteal --every_mesh --every_case \
	  --every_nth=$(NTH) tests/models/test_over_sequence.py tests/parallel/test_compiled_collectives.py \
	  tests/training/test_processes.py

# JAX 0.11 and newer need Python 3.12, and .venv may be older.
test-newest: .venv-newest/installed
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv-newest/bin/python -m pytest -n 2 --dist=worksteal --compiled \
	  $(CASES) --every_nth=$(NTH) $(TESTS_NEWEST)
	JAX_PLATFORMS=cpu .venv-newest/bin/python -m pytest -n 2 --published_sizes --every_mesh --every_nth=$(NTH) \
	  tests/launching/test_published_sizes.py tests/parallel/test_compiled_collectives.py \
	  -k "$(STEPS_NEWEST)"

test-pages: .venv/installed-pages
	@command -v "$(CHROMIUM)" >/dev/null || { echo "there is no $(CHROMIUM) here; name one: make test-pages CHROMIUM=/path/to/chromium" >&2; exit 2; }
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --chromium="$$(command -v $(CHROMIUM))" tests/evaluation/test_in_chromium.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Python compiles what is imported; compiling all of every package would take longer than to install it.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxlinear needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/installed: .venv/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	touch $@

.venv/installed-sweep: .venv/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[sweep,plot]'
	touch .venv/installed $@

.venv/installed-test: .venv/bin/python setup.py
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test,parity,aot]'
	touch .venv/installed .venv/installed-sweep $@

.venv/installed-pages: .venv/installed-test
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test,pages]'
	touch $@

.venv-newest/installed: setup.py
	@$(PYTHON_NEWEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "there is no Python 3.12 or newer here; name one: make test-newest PYTHON_NEWEST=/path/to/python3.13" >&2; exit 2; }
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --no-compile --editable '.[test,aot]'
	touch $@

clean:
	rm -rf .venv .venv-newest build *.egg-info
