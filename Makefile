# Every target makes the virtual environment it needs, once, and runs from a fresh checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_COMPILE = .venv-constraints/bin/uv pip compile --quiet --no-annotate --custom-compile-command "make constraints"
define INSTALL_TESTS
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e ".[test]"
touch $@
endef
INSTALL_OTHERS = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	-c constraints.txt -c constraints-others.txt -e ".[test]"
CPP := $(wildcard kernels/hypermlp_kernels/native/*.h kernels/hypermlp_kernels/native/*.cpp)
# a worker that has nothing left takes tests from the other
WORKERS := -n 2 --dist worksteal
HF_TESTS := tests/integrations tests/models tests/distributed/test_heads_huggingface.py
# old releases use of each other what is deprecated by now
OLDEST := $(foreach kind,Deprecation PendingDeprecation Future,-W default::$(kind)Warning)
STEPS ?=
DATA ?=
FRESH ?=
STAGES ?=

.PHONY: demo test test-all test-hosts test-quantised test-titan test-tools test-hf-oldest test-hf-newest test-torch-oldest test-torch-newest \
	constraints lint format bench study study-smoke docs test-docs dist pictures kernel-report device-smoke device-check clean

demo: $(VENV)/.lab
	$(BIN)/hypermlp demo $(if $(STEPS),--steps $(STEPS)) $(if $(DATA),--data "$(DATA)") $(if $(FRESH),--fresh)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest $(WORKERS) -m ""

# other releases than those of constraints.txt, each in an environment of its own
test-hf-newest: .venv-hf-newest/.ready
	.venv-hf-newest/bin/python -m pytest $(WORKERS) $(HF_TESTS)

test-hf-oldest: .venv-hf-oldest/.ready
	.venv-hf-oldest/bin/python -m pytest $(WORKERS) $(OLDEST) $(HF_TESTS) tests/cli tests/test_examples.py

test-torch-newest: .venv-torch-newest/.ready
	.venv-torch-newest/bin/python -m pytest $(WORKERS)

# not torch.compile and torch.export, nor ONNX by them: their tracer is too old there
test-torch-oldest: .venv-torch-oldest/.ready
	.venv-torch-oldest/bin/python -m pytest $(WORKERS) $(OLDEST) -k "not compil and not export and not onnx" \
		tests/cache tests/layers tests/ops tests/properties

# hosts that are no requirement of anything else. Where pip brings a torchvision built for CUDA beside PyTorch for CPUs, the tests
# declare the two operators that it lacks; what cannot be imported all the same is skipped, with the reason
test-hosts: .venv-hosts/.ready
	.venv-hosts/bin/python -m pytest -rs tests/integrations/test_other_libraries.py tests/integrations/test_timm.py \
		tests/integrations/test_monai.py

# apart from those: transformers looks at images through a torchvision that is there, whether it fits or not
test-quantised: .venv-quantised/.ready
	.venv-quantised/bin/python -m pytest -rs tests/integrations/test_quantised.py

# the release that the recipe is for
test-titan: .venv-titan/.ready
	.venv-titan/bin/python -m pytest -rs -m "" tests/distributed/test_torchtitan.py

# tools that are no requirement of anything else
test-tools: .venv-tools/.ready
	.venv-tools/bin/python -m pytest -rs -m "" tests/tools/test_captum.py tests/tools/test_schedule_free.py tests/models/test_hf_tools.py

# the newest of all that constraints.in leaves open, for every Python and platform at once
constraints: .venv-constraints/.ready
	$(UV_COMPILE) --universal --python-version 3.10 --all-extras --upgrade -c constraints.in pyproject.toml -o constraints.txt

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.lab
	$(BIN)/hypermlp bench attention --out benchmarks/results/attention-cpu.json --plot docs/pictures/attention-cpu.png
	$(BIN)/hypermlp bench models --out benchmarks/results/models-cpu.json --plot runs/bench/models-cpu.png
	$(BIN)/hypermlp bench models --threads 2 --out benchmarks/results/models-2-threads-cpu.json \
		--plot runs/bench/models-2-threads-cpu.png
	$(BIN)/hypermlp bench decode --compiled --threads 1 --out benchmarks/results/decode-cpu.json --plot docs/pictures/decode-cpu.png

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the built site: what became of docstrings and equations, and, where there is a headless browser, how it looks
test-docs: $(VENV)/.docs $(VENV)/.test
	$(BIN)/python -m pytest tests/test_site.py tests/test_docs.py

# wheel and sdist, each installed into an empty environment and tried there
dist: .venv-dist/.ready
	rm -rf dist
	.venv-dist/bin/python -m build --quiet
	$(PYTHON) tools/smoke.py dist/*.whl dist/*.tar.gz

# hours; can be stopped and goes on
study: $(VENV)/.lab
	$(BIN)/hypermlp study mad --out benchmarks/results/study
	$(BIN)/hypermlp study text --out benchmarks/results/study
	$(BIN)/hypermlp study report --out benchmarks/results/study --pictures docs/pictures

study-smoke: $(VENV)/.lab
	$(BIN)/hypermlp study mad --preset smoke
	$(BIN)/hypermlp study text --preset smoke
	$(BIN)/hypermlp study report --preset smoke

pictures: $(VENV)/.lab
	$(BIN)/python docs/pictures/lag_layout.py
	$(BIN)/python docs/pictures/cache_ring.py

kernel-report: $(VENV)/.lab
	$(BIN)/python tools/kernels/report_forward.py
	$(BIN)/python tools/kernels/report_backward.py

# on a machine with a GPU: no virtual environment and no network, the Python there needs torch, triton, einops and, for the
# second, pytest
device-smoke:
	PYTHONPATH=.:kernels:benchmarks $(PYTHON) -m benchmarks.device_check --smoke

device-check:
	PYTHONPATH=.:kernels:benchmarks $(PYTHON) -m benchmarks.device_check $(if $(STAGES),--only $(STAGES))

clean:
	rm -rf $(VENV) .venv-* build dist site

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

.venv-hosts/.ready: pyproject.toml constraints.txt constraints-others.txt
	$(PYTHON) -m venv --clear $(@D)
	$(INSTALL_OTHERS) vit-pytorch x-transformers open_clip_torch timm monai
	touch $@

.venv-quantised/.ready: pyproject.toml constraints.txt constraints-others.txt
	$(PYTHON) -m venv --clear $(@D)
	$(INSTALL_OTHERS) bitsandbytes torchao optimum-quanto
	touch $@

.venv-titan/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,titan]"
	touch $@

.venv-tools/.ready: pyproject.toml constraints.txt constraints-others.txt
	$(PYTHON) -m venv --clear $(@D)
	$(INSTALL_OTHERS) captum schedulefree lm_eval trl
	touch $@

# of constraints.txt those lines that KEEP keeps: the size of an environment comes from torch
.venv-hf-newest/.ready: KEEP := grep -E '^(torch|triton|numpy)=='
.venv-torch-newest/.ready: KEEP := sed d
.venv-%-newest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(KEEP) constraints.txt > $(@D)/constraints.txt
	$(INSTALL_TESTS)

# the oldest of all that pyproject.toml allows; for transformers beside the torch of constraints.in
.venv-hf-oldest/.ready: CHOSEN := -c constraints.in
.venv-%-oldest/.ready: pyproject.toml constraints.in .venv-constraints/.ready
	$(PYTHON) -m venv --clear $(@D)
	$(UV_COMPILE) --python $(@D)/bin/python --resolution lowest-direct --extra test --only-binary :all: $(CHOSEN) \
		pyproject.toml -o $(@D)/constraints.txt
	$(INSTALL_TESTS)

.venv-dist/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check build
	touch $@

.venv-constraints/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv
	touch $@
