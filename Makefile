# Every target makes its own virtual environment on first use and needs nothing but Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: demo test check format bench faults clean

demo: $(VENV)/.ready
	$(BIN)/rewarm run configs/pipelines/tiny.yaml --output $(RUNS)/tiny

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q

# The wheel is what users get: types and imports are checked on it, from outside this folder.
check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build && mkdir -p build/check
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/check .
	$(BIN)/python -m pip install -q --no-deps --target build/check/site build/check/*.whl
	cd build/check && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml -p rewarm
	cd build/check && PYTHONPATH=site ../../$(BIN)/python -W error -c \
	  "import rewarm; assert 'site' in rewarm.__file__; [getattr(rewarm, name) for name in rewarm.__all__]"
	$(BIN)/python -m pytest -q tests/house

# A quarter of an hour or more: not part of CI, which has a small share of it in tests/faults.
faults: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# TRL lives in an environment of its own, so that neither decides about the other's versions.
bench: $(VENV)/.ready $(VENV)-peers/.ready
	$(BIN)/python -m benchmarks.peers --peer-python $(VENV)-peers/bin/python --output $(RUNS)/peers.json

$(VENV)-peers/.ready: benchmarks/requirements.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(VENV)-peers/bin/python -m pip install -q -r benchmarks/requirements.txt
	touch $@

# PyTorch first and by its exact version: that is the build for CPUs where one is on offer.
$(VENV)/.ready: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache
