# Every target makes its own virtual environment on first use and needs nothing but Python 3.11 or newer.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: demo test check format bench bench-parts bench-gpu faults trust clean

demo: $(VENV)/.ready
	$(BIN)/rewarm run configs/pipelines/tiny.yaml --output $(RUNS)/tiny

# Each file of tests is run by one of two workers, which so share its fits; tests/conftest.py puts the long ones first.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.ready
	$(BIN)/python -m pytest -q $(WORKERS) --durations=10

# The wheel is what users get: types and imports are checked on it, from outside this folder.
check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/check build/lib build/bdist.* && mkdir -p build/check
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w build/check .
	$(BIN)/python -m pip install -q --no-deps --target build/check/site build/check/*.whl
	cd build/check && MYPYPATH=site ../../$(BIN)/mypy --config-file ../../pyproject.toml -p rewarm
	cd build/check && PYTHONPATH=site ../../$(BIN)/python -W error -c \
	  "import rewarm; assert 'site' in rewarm.__file__; [getattr(rewarm, name) for name in rewarm.__all__]"
	$(BIN)/python -m pytest -q -n 2 tests/house

# A quarter of an hour or more: not part of CI, which has a small share of it in tests/faults.
faults: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

# Hostile completions to every reward: five minutes, of which CI has a few seconds in tests/trust.
trust: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trust

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# TRL and LitGPT live in environments of their own, so that none decides about another's versions.
bench: $(VENV)/.ready $(VENV)-peers/.ready $(VENV)-litgpt/.ready
	$(BIN)/python -m benchmarks.peers --works cpu --peer-python $(VENV)-peers/bin/python \
	  --litgpt-python $(VENV)-litgpt/bin/python --output $(RUNS)/peers.json --markdown

# Half an hour: what the figures in benchmarks/RESULTS.md beside the peers are from.
bench-parts: $(VENV)/.ready
	set -e; for part in head attention generation sequence_length overhead long_run cost_model; do \
	  $(BIN)/python -m benchmarks.$$part --output $(RUNS)/parts; done

# Makes no environment: PYTHON must have what pyproject.toml asks for; peers that PEER_PYTHON lacks are left out.
PEER_PYTHON ?= $(PYTHON)
bench-gpu:
	$(PYTHON) -m benchmarks.peers --works gpu --peer-python $(PEER_PYTHON) --litgpt-python $(PEER_PYTHON) \
	  --output $(RUNS)/peers-gpu.json --markdown
	set -e; for part in head attention generation sequence_length; do \
	  $(PYTHON) -m benchmarks.$$part --output $(RUNS)/parts-gpu; done
	$(PYTHON) -m benchmarks.cost_model --cuda --output $(RUNS)/parts-gpu

$(VENV)-peers/.ready: benchmarks/requirements.txt
$(VENV)-litgpt/.ready: benchmarks/requirements-litgpt.txt
$(VENV)-peers/.ready $(VENV)-litgpt/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(@D)/bin/python -m pip install -q -r $<
	touch $@

# PyTorch first and by its exact version: that is the build for CPUs where one is on offer.
$(VENV)/.ready: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers $(VENV)-litgpt build runs .pytest_cache .mypy_cache .ruff_cache
