# make demo   the embedded model, with and without self-attention guidance: runs/demo/index.html
# make test   all tests, style and types
# make check  style and types alone
# make docs   a site of docs/, with pages of the docstrings: build/site/index.html
PYTHON ?= python3
BIN := .venv/bin
# Waiting threads sleep: several times faster wherever the machine does anything else.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: check demo docs test
demo: .venv/demo
	$(BIN)/python scripts/demo.py

check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

docs: .venv/docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site

.venv/demo: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/docs: .venv/demo
	$(BIN)/pip install -c constraints.txt -e '.[docs]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install -c constraints.txt -e '.[docs,mpi,test,report,stable-diffusion]'
	touch $@
