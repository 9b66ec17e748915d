# Every target sets up what it needs: a Python between 3.10 and 3.13 and make are enough to begin with.
# The environment lives in .venv; stamp files in it remember what is installed, so a second run installs nothing.
#   PYTHON=/path/to/python   the interpreter that makes .venv (found by itself otherwise)
#   DATA=folder OUT=folder   the MIDI files `make demo` learns drums from (loops that it makes otherwise), and where it works (demo)
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
FACTS := settings.ini setup.py pyproject.toml constraints.txt
export PYTHONUNBUFFERED := 1

.PHONY: help demo test docs lab bench drill prepare notebooks clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(VENV)/.installed ## install, and see all tools at work: one page with sounds, pictures and figures in demo/
	@$(BIN)/datatools demo --out "$(or $(OUT),demo)" $(if $(DATA),--midi "$(DATA)")

test: $(VENV)/.installed-dev ## install and run every check: clean notebooks, export in step, notebooks, pytest
	@sh scripts/install_for_tests.sh
	@echo "== style: titles, imports in cells of their own, no hidden test, sidebar, no machine paths"
	@$(BIN)/python scripts/check_notebooks.py
	@echo "== notebooks are clean, datatools/ is what the notebooks export"
	@$(BIN)/python scripts/check_export.py
	@echo "== notebooks: every cell runs, every assertion holds (nbdev_test)"
	@$(BIN)/python scripts/run_nbdev_test.py --n_workers 2
	@echo "== tests/: processes, command line, packaging, site (pytest)"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

docs: $(VENV)/.installed-dev ## build the site into _docs/ (needs Quarto 1.7.34)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto 1.7.34 on PATH: download it from \
	https://github.com/quarto-dev/quarto-cli/releases/tag/v1.7.34"; exit 1; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs --n_workers 2

lab: $(VENV)/.installed-dev ## open the notebooks in JupyterLab (NB=... for one; LAB_ARGS="--no-browser --port 8890")
	@JUPYTER_PREFER_ENV_PATH=1 JUPYTER_PATH= $(BIN)/jupyter lab "$(or $(NB),nbs)" $(if $(filter 0,$(shell id -u)),--allow-root) \
	$(if $(SSH_CONNECTION),--no-browser) $(LAB_ARGS)

bench: $(VENV)/.installed-bench ## run benchmarks/ side by side with the peers (BENCH="groove ..." for some)
	@for name in $(or $(BENCH),$(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py))); do \
	echo "== benchmarks/$$name.py"; $(BIN)/python -m benchmarks.$$name || exit 1; done

drill: $(VENV)/.installed-dev ## the long crash drills that `make test` leaves out; every notebook alone, and in a kernel
	@$(BIN)/python -m pytest -m drill --timeout 3600

prepare: $(VENV)/.installed-dev ## before a commit: clean, export, README, and a style report
	@$(BIN)/nbdev_clean
	@$(BIN)/python scripts/check_export.py --write
	@$(BIN)/python scripts/make_readme.py
	@$(BIN)/python scripts/check_notebooks.py --report

notebooks: $(VENV)/.installed-dev ## execute the notebooks and save their outputs (NB="nbs/a.ipynb ..." for some)
	@$(BIN)/python scripts/run_notebooks.py $(NB)

clean: ## remove .venv, results and everything built
	rm -rf $(VENV) demo _docs _proc build dist tests/plugin/build *.egg-info .pytest_cache .hypothesis benchmarks/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@PYTHON="$(PYTHON)" sh scripts/make_venv.sh $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(FACTS)
	@echo "== installing datatools (the first time takes a few minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(FACTS)
	@echo "== installing datatools with what its tests need (the first time takes a few minutes)"
	@$(PIP) -e '.[dev,cluster]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/.installed-dev benchmarks/requirements.txt benchmarks/requirements-alone.txt
	@echo "== installing what the benchmarks compare with"
	@$(PIP) -r benchmarks/requirements.txt
	@$(PIP) --no-deps -r benchmarks/requirements-alone.txt
	@touch $@
