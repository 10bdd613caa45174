# Every target makes .venv if it is missing, and again when pyproject.toml or constraints.txt change.
# Recipes are short on purpose: what a test run consists of is in .ci/run.

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint notebooks notebooks-keep bench gpu docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       compare every approximation on scikit-learn's digits -> runs/demo"
	@echo "make test       format, lint, types, tests, notebooks"
	@echo "make lint       format, lint, types"
	@echo "make notebooks  execute the notebooks"
	@echo "make notebooks-keep  run them in full and keep their outputs"
	@echo "make bench      measure speed"
	@echo "make gpu        tests and bench on a CUDA device, in eight minutes"
	@echo "make docs       the documentation, API and notebooks -> site/index.html"
	@echo "make clean      remove .venv, caches and runs (not data/downloads)"

demo: $(STAMP)
	$(BIN)/fisherlab compare --data digits --model mlp --out runs/demo --overwrite

test: $(STAMP)
	.ci/run

lint: $(STAMP)
	.ci/run lint

notebooks: $(STAMP)
	.ci/run notebooks

notebooks-keep: $(STAMP)
	$(BIN)/python notebooks/keep.py

bench: $(STAMP)
	$(BIN)/fisherlab bench

gpu: $(STAMP)
	.ci/gpu

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find fisherlab tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	.ci/install
