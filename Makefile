# make demo, make test: Python 3.11 or newer, git and make are all they need. `make help` lists the rest.

# The version that constraints.txt was tested with comes first. Choose another: make PYTHON=/path/to/python3.13 test
PYTHON ?= python3.11 python3.12 python3.13 python3
# One more than two cores: tests of signals, servers and processes that end wait a quarter of their time.
PYTEST_ARGS ?= -n 3 --dist worksteal

# Of `make test-matrix`: all of it, or one of N parts of equal size, written K/N.
PART ?= 1/1

# Sizes of the demo.
DEMO_SCENES ?= 12
DEMO_SIZE ?= 512
DEMO_ROUNDS ?= 300
DEMO_SHARE ?= 1/8
# More settings of the demo's recipe and runs, as key=value.
DEMO_SHARD_KEYS ?=
DEMO_KEYS ?=

VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/sh
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-matrix lint types constraints clean clean-demo

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# ---- environment: one folder; a stamp newer than the two files that decide its content means it is up to date

$(VENV)/made:
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit; fi; \
	for python in $(PYTHON); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	    "$$python" -m venv $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo "No Python 3.11 or newer with venv among: $(PYTHON)." >&2; \
	echo "Install one (Debian and Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/made
	@echo "installing dctc into $(VENV): a minute or two where the wheels are near, longer over a slow line"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/made
	@echo "installing dctc and all that its tests need into $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/installed $@

# ---- checks

test: $(VENV)/installed-dev ## the test suite
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-matrix: $(VENV)/installed-dev ## what takes longer: all strategies against one process, crashes by the dozen
	@$(BIN)/python -m pytest -m matrix -n 2 --dist worksteal --part $(PART)

lint: $(VENV)/installed-dev ## style: ruff, and hadolint for the Dockerfile
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint Dockerfile

types: $(VENV)/installed-dev ## mypy --strict
	@$(BIN)/mypy

# After `.venv/bin/pip install --upgrade PACKAGE` and a green `make test`.
constraints: $(VENV)/installed-dev ## write constraints.txt anew from what is installed
	@{ sed '/^[^#]/d' constraints.txt; \
	  $(BIN)/python -m pip freeze --all --exclude-editable | grep -viE '^(pip|wheel)==' | sed 's/+cpu$$//' | LC_ALL=C sort -f; } > constraints.tmp
	@mv constraints.tmp constraints.txt

# ---- demo: from nothing to a map, on synthetic scenes. A second run does only what is missing.

SCENES := scenes/demo
DATASET := datasets/demo
RUNS := runs/demo
MAPS := maps/demo
TRAIN = $(BIN)/accelerate launch --config_file launch/single.yaml dctc/train.py
TRAIN_KEYS = data.dataset=$(DATASET) data.labelled_share=$(DEMO_SHARE) schedule.rounds=$(DEMO_ROUNDS) run.experiment=demo $(DEMO_KEYS)

# The picture of the first scene of the test split, as the dataset's plan has it.
define TEST_SCENE
import json
scenes = json.load(open("$(DATASET)/plan.json"))["scenes"]
print(next(file["path"] for scene in scenes if scene["tiles"]["test"] for file in scene["inputs"] if "_RGB." in file["path"]))
endef
export TEST_SCENE

demo: $(VENV)/installed ## synthetic scenes -> shards -> training -> scores -> a map
	@echo "1/6 synthetic towns: $(DEMO_SCENES) scenes of $(DEMO_SIZE) x $(DEMO_SIZE) px with labels -> $(SCENES)"
	@$(BIN)/dctc synth $(SCENES) --scenes $(DEMO_SCENES) --size $(DEMO_SIZE)
	@echo "2/6 cut them into tiles and pack them -> $(DATASET)"
	@$(BIN)/dctc shard configs/data/synthetic.yaml $(DATASET) --root $(SCENES) $(DEMO_SHARD_KEYS)
	@echo "3/6 supervised baseline on $(DEMO_SHARE) of the labels -> $(RUNS)/unet"
	@test -e $(RUNS)/unet/report.json || $(TRAIN) configs/synthetic/unet.yaml $(TRAIN_KEYS) run.name=unet
	@echo "4/6 dctc on the same labels and the other tiles without theirs -> $(RUNS)/dctc"
	@test -e $(RUNS)/dctc/report.json || $(TRAIN) configs/synthetic/dctc.yaml $(TRAIN_KEYS) run.name=dctc
	@echo "5/6 score dctc's model file on the test scenes"
	@$(BIN)/dctc evaluate $(RUNS)/dctc/model.safetensors $(DATASET)
	@echo "6/6 map a test scene -> $(MAPS)"
	@$(BIN)/dctc predict $(RUNS)/dctc/model.safetensors "$(SCENES)/$$($(BIN)/python -c "$$TEST_SCENE")" --out $(MAPS)
	@echo
	@$(BIN)/dctc compare demo
	@echo "s1: the network to judge a method by (dctc's first student; the supervised baseline's only one)"
	@echo "mean: both students of dctc; teacher: its teacher. Labels used: $(DEMO_SHARE) of the training tiles'."
	@echo
	@echo "map:       $$(ls $(MAPS)/*.tif | tail -n 1)"
	@echo "pictures:  $(RUNS)/dctc/pictures, $(RUNS)/unet/pictures"
	@echo "curves:    $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

# ---- tidying

clean-demo: ## remove what the demo made; MLflow's record of its runs stays
	rm -rf $(SCENES) $(DATASET) $(RUNS) $(MAPS)

clean: ## remove the environment and caches; scenes, datasets and runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
