# Everything that a change must pass, and what a newcomer needs; `make` lists it. Needs python3 and make only.

PYTHON ?= python3
ARGS ?=
MINUTES ?=
BIN := .venv/bin
READY := .venv/.ready
# Each of the thousand processes that the tests start would compile the packages anew.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip --disable-pip-version-check --no-input install -q -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check test slow chaos hosts soak fuzz protos demo bench wheel smoke clean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=/path/to/python3] [ARGS=\"for pytest, the demo or the benchmarks\"]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

setup: $(READY) ## make .venv, once; again when pyproject.toml or constraints.txt change

$(READY): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "setup: no $(PYTHON) here; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "setup: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), trackagent needs 3.10 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "setup: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "setup 1/2: creating .venv with $$("$(PYTHON)" -V 2>&1) (about 5 s)"
	@clear=; [ "$$($(BIN)/python -V 2>&1)" = "$$("$(PYTHON)" -V 2>&1)" ] || clear=--clear; \
	  "$(PYTHON)" -m venv $$clear .venv
	@echo "setup 2/2: installing trackagent and its tools (1 to 5 minutes the first time: it downloads PyTorch)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev,demo]'
	@touch $@

check: $(READY) ## lint, formatting, types, generated code
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python protos/generate.py --check

# Four at once also on two cores: many tests wait.
test: $(READY) ## the tests, in random order, warnings are errors
	@$(BIN)/python -m pytest -n 4 --dist loadfile -m 'not slow' $(ARGS)

slow: $(READY) ## the tests that take longest: a process killed at each step, trees of agents, torchrun's children
	@$(BIN)/python -m pytest -n 4 --dist load -m slow $(ARGS)

chaos: $(READY) ## storms of faults for MINUTES=1; SEED=N replays
	@$(BIN)/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

hosts: $(READY) ## a job over several hosts, and faults between them (root, iproute2)
	@$(BIN)/python -m tests.multihost $(ARGS)

soak: $(READY) ## a steady load for MINUTES=30; nothing may grow
	@$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

fuzz: $(READY) ## what hypothesis makes up, at random, for MINUTES=2; SEED=N begins with that one
	@$(BIN)/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

protos: $(READY) ## generate the Python code of the .proto files
	@$(BIN)/python protos/generate.py

demo: $(READY) ## a training job on this machine, watched live
	@$(BIN)/python examples/demo.py $(ARGS)

bench: $(READY) ## measure the budgets
	@$(BIN)/python -m benchmarks $(ARGS)

wheel: $(READY) ## build the wheel into dist/
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --wheel --no-isolation >build/wheel.log 2>&1 || { cat build/wheel.log >&2; exit 1; }
	@ls dist/*.whl

smoke: wheel ## install the wheel alone, with protobuf 6, and use it
	@echo "smoke: installing the wheel into build/smoke (about 30 s)"
	@rm -rf build/smoke && $(BIN)/python -m venv build/smoke
	@build/smoke/bin/python $(PIP) dist/*.whl 'protobuf>=6,<7'
	@build/smoke/bin/python -c 'import google.protobuf as p; assert p.__version__[:2] == "6.", p.__version__'
	@cd build/smoke && bin/python -I "$(CURDIR)/tests/smoke.py"

clean: ## remove what was built, except .venv
	@rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . \( -path ./.venv -o -path ./.git \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
