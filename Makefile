# The two commands that a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
# On a machine where plain pip would fetch a CUDA build of PyTorch, point this at a CPU one:
#   make demo TORCH='torch==2.13.0 --index-url <the CPU index named on pytorch.org>'
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint fuzz clean

demo: $(VENV)/demo
	$(BIN)/python -m gptoss_compile.demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# Requests made from /openapi.json against a real server.
fuzz: $(VENV)/dev
	$(BIN)/pip install --quiet schemathesis
	$(BIN)/python tests/api/fuzz.py

clean:
	rm -rf $(VENV) .demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
