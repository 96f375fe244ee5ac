# Every target sets up what it needs; `make help` lists them.
VENV ?= .venv
# pip takes the build of torch that fits the machine; any release that pyproject.toml admits will do.
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint test server gpu bench bench-reliability bench-gpu demo serve quality train ci clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "numpy<2"
	$(BIN)/python -m pip install --quiet --editable ".[server,dev]"
	@touch $@

setup: $(STAMP)  ## make the virtual environment with everything in it

fmt: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(STAMP)  ## all tests that need no GPU, the real server included
	$(BIN)/python -m pytest -m "not gpu"

server: $(STAMP)  ## only the tests against a real Triton server, its loads of minutes included
	$(BIN)/python -m pytest -m server

gpu: $(STAMP)  ## only the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)  ## serving overhead, batching, loading memory (CPU, tiny model)
	$(BIN)/python tests/benches/bench_serving.py
	$(BIN)/python tests/benches/bench_checkpoint_memory.py

bench-reliability: $(STAMP)  ## the loads of tests/reliability with times and memory (CPU, tiny model, 12 minutes)
	$(BIN)/python tests/benches/bench_reliability.py

bench-gpu: $(STAMP)  ## the table of targets on one CUDA GPU, each part's oracle before its times
	$(BIN)/python tests/benches/bench_gpu.py

demo: $(STAMP)  ## start the server, make a video from a prompt, stop the server
	$(BIN)/python deploy/demo.py

serve: $(STAMP)  ## serve the embedded tiny model on loopback
	$(BIN)/turbodiffusion-server serve

quality: $(STAMP)  ## measure the tiny model on held-out prompts (CPU, under 10 minutes)
	$(BIN)/python -m turbo_training quality

train: $(STAMP)  ## train the tiny model from nothing into out/training (one GPU, 25 minutes)
	$(BIN)/python -m turbo_training all --out out/training

ci: lint test  ## what continuous integration runs
