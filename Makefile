# Two commands on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
OLDEST := .venv-oldest
LOCKER := .venv-lock
ECOSYSTEM := .venv-ecosystem

LOCK := requirements/lock.txt
TORCH := requirements/torch.txt
EXTRAS := dev,coreml,executorch
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: demo test lint types contracts unit test-exhaustive lock test-newest test-oldest test-ecosystem clean

# Exact versions and digests of everything; torch by itself (see its file), and nothing is resolved.
$(VENV)/.installed: pyproject.toml $(LOCK) $(TORCH)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --requirement $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pocketvlm demo --out runs/demo

test: lint types contracts unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

contracts: $(VENV)/.installed
	$(BIN)/lint-imports

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# With the families whose operators another one covers, on ExecuTorch: about ten minutes more.
test-exhaustive: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --exhaustive

# Writes the lock anew, with the newest versions that pyproject.toml allows.
lock:
	$(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python -m pip install --quiet 'uv>=0.13,<0.14'
	$(LOCKER)/bin/uv pip compile --quiet --no-config --upgrade --python-version 3.11 \
		--python-platform linux --extra dev --extra coreml --extra executorch \
		--constraints $(TORCH) --no-emit-package torch --excludes requirements/not_locked.txt \
		--generate-hashes --custom-compile-command 'make lock' --output-file $(LOCK) pyproject.toml
	$(PYTHON) requirements/arm64_wheels.py > pocketvlm/emulation/arm64/wheels.txt

# The newest of everything, as `pip install` gives it to a user today.
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --requirement $(TORCH)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint $(TORCH) --editable '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python $(PYTEST)

# The lower bounds of pyproject.toml, so that they are true.
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet packaging
	$(OLDEST)/bin/python requirements/lower_bounds.py > $(OLDEST)/lower_bounds.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/lower_bounds.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/lower_bounds.txt \
		--editable '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST)

# The doors to other tools, with these tools: what they cost to install is not for every checkout.
test-ecosystem:
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --requirement $(TORCH)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --constraint $(TORCH) \
		--editable '.[dev,ecosystem]'
	$(ECOSYSTEM)/bin/python -m pip install --quiet ./plugins/optimum
	$(ECOSYSTEM)/bin/python -m pip check
	$(ECOSYSTEM)/bin/pocketvlm doctor
	POCKETVLM_ECOSYSTEM=1 OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest tests/ecosystem tests/hub

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(LOCKER) $(ECOSYSTEM) runs build dist *.egg-info
