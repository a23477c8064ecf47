# make demo    build the bundled mini model with ADSC and ask it about a picture
# make test    run every check that CI runs
# make clean   remove what the two have made
#
# PYTHON is the interpreter that .venv is made with; PIP_FLAGS is handed to every pip install, e.g.
# for a torch without CUDA: make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
PIP_FLAGS ?=

BIN := .venv/bin
BUNDLE := out/mini_adsc
# Type checkers do not run the import hook of an editable install: they find the package by this link.
LINK := .venv/source/tokexport

.PHONY: demo test clean

demo: .venv/installed-cpu
	$(BIN)/tokexport build -o $(BUNDLE) --overwrite
	$(BIN)/tokexport run $(BUNDLE) --image examples/shapes.png --prompt "Where is the letter H?"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --cov

clean:
	rm -rf .venv build dist out tokexport.egg-info htmlcov .coverage .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "tokexport needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
		"name another one, e.g.: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip
	mkdir -p $(dir $(LINK))
	ln -sfn ../.. $(LINK)
	@touch $@

.venv/installed-cpu: pyproject.toml | .venv/created
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[cpu]'
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/created
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[cpu,dev]'
	@touch $@ .venv/installed-cpu
