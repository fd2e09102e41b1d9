# Four commands; each sets up what it needs in .venv and does nothing twice.
#   make demo    real answers, corrected as they stream (installs what running needs, nothing more)
#   make test    format, lint, types and tests
#   make check   format, lint and types alone
#   make docs    the documentation as a site in ./site
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# --no-input: a question must never stop an unattended run.
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-input -c constraints.txt
# A stamp is named by the set of packages and by the files that decide them, so that a changed
# pyproject.toml or constraints.txt installs again, and a touched one does not.
KEY    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUN    := $(VENV)/.installed-run-$(KEY)
DEV    := $(VENV)/.installed-dev-$(KEY)
DOCS   := $(VENV)/.installed-docs-$(KEY)

.PHONY: demo test check docs
.DELETE_ON_ERROR:

demo: $(RUN)
	@$(BIN)/python examples/demo.py

test: check
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DOCS)
	$(BIN)/mkdocs build --strict --config-file .ci/mkdocs.yml

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aligner-integrations needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The development set holds the running set, so a demo after the tests installs nothing.
$(RUN): | $(BIN)/python
	@test -e $(DEV) || { echo "Installing what the demo needs into $(VENV) ..."; $(PIP) -e ".[onnx,langchain]"; }
	@touch $@

$(DEV): | $(BIN)/python
	@echo "Installing the development environment into $(VENV) (torch is large) ..."
	@$(PIP) -e ".[dev]"
	@touch $@

$(DOCS): | $(BIN)/python
	@echo "Installing mkdocs-material into $(VENV) ..."
	@$(PIP) -e ".[docs]"
	@touch $@
