# Two commands a newcomer needs: `make pretrain` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
WORKERS := -n logical --maxprocesses 4 --dist loadfile

.PHONY: pretrain test check clean

pretrain: .venv/installed
	$(BIN)/tiglon quickstart

test: .venv/tests-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(TESTS)

check: .venv/tests-installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'setuptools>=77' wheel
	$(BIN)/python -m pip install --quiet 'torch>=2.11,<2.14'
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/tests-installed: .venv/installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
