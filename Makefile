# make demo   the embedded model, with and without self-attention guidance: runs/demo/index.html
# make test   all tests and the style check
PYTHON ?= python3
BIN := .venv/bin
# Waiting threads sleep: several times faster wherever the machine does anything else.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test
demo: .venv/demo
	$(BIN)/python scripts/demo.py

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.venv/demo: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install -c constraints.txt -e '.[mpi,test,report,stable-diffusion]'
	touch $@
