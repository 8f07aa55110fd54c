# Every target sets itself up in .venv (Python) and .comfy (ComfyUI, browser driver); repeated calls start at once.
PYTHON ?= python3
# A bare "torch" brings gigabytes of CUDA libraries on some platforms; override for another build.
TORCH ?= torch==2.13.0
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt
COMFYUI_DIR ?= .comfy/ComfyUI
BROWSER_DIR ?= .comfy/browser
TINY_MODELS ?= .comfy/tiny
export COMFYUI_DIR BROWSER_DIR TINY_MODELS
# Idle OpenMP threads that spin slow every other process down when cores are shared.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

# By file: a worker starts ComfyUI and loads the small models once for all tests of a file.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
TEST_NEEDS := $(VENV)/.dev $(VENV)/.comfyui $(TINY_MODELS)/.written browser

.PHONY: demo test test-slow bench docs comfy lint thumbnails browser clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package ## small pictures from the shipped models, and what the methods save
	$(BIN)/diffusers-ext demo

test: $(TEST_NEEDS) ## everything but the slow tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(TEST_NEEDS) ## tests that take minutes
	$(PYTEST) -m slow $(PYTEST_ARGS)

bench: $(VENV)/.dev ## every claim beside its peers, measured here
	$(BIN)/diffusers-ext bench all

docs: $(VENV)/.dev ## the site, into site/
	$(BIN)/mkdocs build --strict

comfy: $(VENV)/.comfyui ## start ComfyUI with this pack and print the URL
	$(BIN)/python scripts/start_comfyui.py

lint: $(VENV)/.dev ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

thumbnails: $(VENV)/.dev $(VENV)/.comfyui browser ## redraw workflows/*.jpg and docs/assets/workflows/*.png
	$(BIN)/python scripts/render_workflows.py

clean:
	rm -rf $(VENV) .comfy

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.package
	$(PIP) -e ".[dev,bench,docs]"
	touch $@

$(VENV)/.comfyui: scripts/install_comfyui.sh scripts/comfyui_cpu_shim.py requirements.txt $(VENV)/.package
	scripts/install_comfyui.sh $(VENV) $(COMFYUI_DIR)
	touch $@

# No stamp: it looks before it installs, and tries again where a part was missing.
browser:
	scripts/install_browser.sh $(BROWSER_DIR)

$(TINY_MODELS)/.written: scripts/write_tiny_models.py $(VENV)/.comfyui
	$(BIN)/python scripts/write_tiny_models.py $(COMFYUI_DIR) $(TINY_MODELS)
	touch $@
