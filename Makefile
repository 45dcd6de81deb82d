# `make study` and `make test` need nothing but Python 3.11+, make and a package registry: both call `env` first.
PYTHON ?= python3
SCALE  ?= core
OUT    ?= runs/study
BIN    := .venv/bin
READY  := .venv/.ready

.PHONY: env study study-full test lint slow docs bench bench-scale fuzz clean

env: $(READY)

# torch first and by its exact version: a CPU wheel of it at hand is then taken and brings no CUDA packages
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "geopd needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

study: env
	$(BIN)/geopd study --scale $(SCALE) --out $(OUT)

study-full: env
	$(BIN)/geopd study --scale full --out runs/full

lint: env
	$(BIN)/ruff check src tests benchmarks docs fuzz
	$(BIN)/ruff format --check src tests benchmarks docs fuzz
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint docs
	$(BIN)/pytest -m "not slow"

slow: env
	$(BIN)/pytest -m slow

docs: env
	$(BIN)/sphinx-build --quiet --fail-on-warning docs docs/_build/html

bench: env
	$(BIN)/python benchmarks/spectra.py
	$(BIN)/python benchmarks/opd_step.py
	$(BIN)/python benchmarks/locked.py

# two layers of Qwen3-8B's shape through the whole engine, and projected from there: about half a core-hour, 5 GB
bench-scale: env
	$(BIN)/python benchmarks/scale.py

CASES   ?= 100000
SESSION ?= 1

# checkpoints damaged at random and opened under limits; docs/security.md has the outcome of a million
fuzz: env
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python -m fuzz.run --cases $(CASES) --session $(SESSION)

clean:
	rm -rf .venv docs/_build
