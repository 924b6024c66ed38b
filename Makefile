# make demo   set up once, warm-start a small model, train it with CoSo, print success before and after
# make test   set up once, run the tests, the fast ones first; make test-fast   only those (under 3 minutes)
# make setup  the virtual environment .venv (PROFILE=gpu for a CUDA machine; PYTHON=python3.12 to choose the Python;
#             EXTRAS=alfworld for the ALFWorld engine, which the tests need too)
# make lint   ruff and mypy          make docs   write docs/config.md and docs/metrics.md anew
# make clean  remove .venv and caches; runs/ and models/ stay

PYTHON ?= python3
PROFILE ?=
EXTRAS ?=
SEED ?= 1
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q -n auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint docs clean

help:
	@sed -n 's/^# //p' Makefile

setup:
	@$(PYTHON) tools/setup_machine.py $(if $(PROFILE),--profile $(PROFILE)) $(if $(EXTRAS),--extras $(EXTRAS))

demo: setup
	@test -e models/numberline || $(BIN)/coso warmstart configs/numberline.yaml
	@$(BIN)/coso train configs/numberline.yaml --seed $(SEED) --overwrite

test test-fast: EXTRAS += alfworld
test: setup
	@$(PYTEST)

test-fast: setup
	@$(PYTEST) -m unit

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: setup
	@$(BIN)/python -m tools.docs

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
