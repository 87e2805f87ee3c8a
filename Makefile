# Every target makes the virtual environment it needs, once, and runs from a fresh checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the oldest transformers that is supported, in an environment of its own
HF_OLDEST := .venv-hf-oldest
STEPS ?=
DATA ?=
STAGES ?=

.PHONY: demo test test-all test-hf-oldest lint format bench docs pictures kernel-report device-check clean

demo: $(VENV)/.bench
	$(BIN)/hypermlp demo $(if $(STEPS),--steps $(STEPS)) $(if $(DATA),--data "$(DATA)")

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m ""

test-hf-oldest: $(HF_OLDEST)/.ready
	$(HF_OLDEST)/bin/python -m pytest -n 2 tests/integrations tests/models

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/hypermlp bench attention --out benchmarks/results/attention-cpu.json --plot docs/pictures/attention-cpu.png
	$(BIN)/hypermlp bench decode --compiled --out benchmarks/results/decode-cpu.json --plot docs/pictures/decode-cpu.png

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(VENV)/.bench
	$(BIN)/python docs/pictures/lag_layout.py
	$(BIN)/python docs/pictures/cache_ring.py

kernel-report: $(VENV)/.bench
	$(BIN)/python kernels/tools/report.py
	$(BIN)/python kernels/tools/report_backward.py

# on a machine with a GPU: no virtual environment and no network, the Python there needs torch, triton, einops, pytest
device-check:
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.device_check $(if $(STAGES),--only $(STAGES))

clean:
	rm -rf $(VENV) $(HF_OLDEST) build dist site

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

$(HF_OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HF_OLDEST)
	$(HF_OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]" "transformers==5.5.*"
	touch $@
