# Every target sets up what it needs: a virtual environment in .venv with the versions of requirements.lock.

PYTHON ?= python3
PYTHON312 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python) python3.12)
BIN := .venv/bin
WORKERS ?= 2

# Comments of one line above a target are its help.

.PHONY: help torture gpu-plan demo test test-all zoo bench bench-channels bench-latency-model lint clean

# what there is
help:
	@awk '/^# /{said=substr($$0, 3)} /^[a-z][a-z-]*:/{split($$1, name, ":"); printf "  make %-20s %s\n", name[1], said} /^$$/{said=""}' $(MAKEFILE_LIST)

# train, halve the latency of and export a small network on real digits (3 minutes)
demo: .venv/ready
	$(BIN)/compressor demo

# what CI runs
test: lint .venv-triton/ready
	@echo "== tests (the slow ones are in \`make test-all\`)"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not quiet" --durations 10
	@echo "== tests that measure time, alone"
	$(BIN)/python -m pytest -m "not slow and quiet"

# the same with the slow tests (an hour and a half)
test-all: lint .venv-triton/ready .venv-gpu/ready
	@echo "== all tests, the wheel in a clean environment among them"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not quiet" --durations 40
	$(BIN)/python -m pytest -m quiet

# every torchvision model and timm's families, one process each; goes on where it stopped (some two hours on two cores)
zoo: .venv/ready
	$(BIN)/python tools/zoo.py --jobs $(WORKERS)

# the channel analysis against torch-pruning
bench-channels: .venv/ready
	$(BIN)/python tools/bench_channels.py

# make bench DATA=cifar-10-batches-bin WEIGHTS=resnet56_cifar10.safetensors
bench: .venv/ready
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "usage: make bench DATA=<folder of CIFAR-10, binary version> WEIGHTS=<resnet56 .safetensors>"; exit 2; }
	$(BIN)/python tools/bench_cifar.py --data "$(DATA)" --weights "$(WEIGHTS)"

# two thousand damaged and hostile files, each of which has to be answered (half an hour)
torture: .venv/ready
	$(BIN)/python tools/torture.py --files

# ruff and mypy
lint: .venv/ready
	@echo "== lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# everything that was set up or built goes
clean:
	rm -rf .venv .venv-triton .venv-gpu build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/ready: requirements.lock pyproject.toml
	@echo "== setting up .venv (a few minutes the first time, 2 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "== installing the locked packages"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@echo "== installing compressor itself, editable"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# tritonserver comes with nvidia-pytriton, which wants numpy 1: an environment of its own, for the tests
.venv-triton/ready: requirements-triton.lock
	@echo "== setting up .venv-triton (a real tritonserver for the tests)"
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-triton.lock
	@touch $@

# the latency model against engines that it never saw (half an hour on two cores)
bench-latency-model: .venv/ready
	$(BIN)/python tools/bench_latency_model.py

# the Python, torch and onnx of a GPU machine, so that its plan can be tried dry (5 GB; left out without Python 3.12)
.venv-gpu/ready: requirements-gpu.lock
	@mkdir -p .venv-gpu
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  && $(PYTHON312) -m venv .venv-gpu \
	  && .venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-gpu.lock \
	  || echo "no Python 3.12 (PYTHON312=...): the plan for a GPU machine is not tried"
	@touch $@

# what a GPU machine does in its minutes, and what travels there
gpu-plan:
	@bash tools/gpu_check.sh --plan
