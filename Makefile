# `make demo` trains the default Swin-MoE on 2 MPI ranks; `make test` runs the tests. Both set up .venv first.

PYTHON ?= python3
RANKS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
# Three test files at a time for two cores: a test has one thread a process, and many wait for processes that they have
# started. In the order that tests/conftest.py gives, longest first.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
# Where nothing may be kept of what Python compiled, each of some 500 processes of the tests compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-full lint docs clean

setup: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m launcher -n $(RANKS) -- -m swin_moe.train configs/debug/digits_swin_moe.yaml
	@printf 'the report of the run: '; $(BIN)/python -m swin_moe report output/digits_swin_moe

test: $(INSTALLED)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -q --full

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	@$(BIN)/python -c 'import mkdocs' 2> /dev/null || $(BIN)/pip install -q 'mkdocs>=1.6'
	$(BIN)/python docs/site/build.py && echo 'the pages: build/site/index.html'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# An installation that was interrupted is thrown away and redone. torch comes first and alone, so that no other package
# chooses its build.
$(INSTALLED): requirements.txt pyproject.toml setup.py swin_moe/data/torchvision_site.py $(shell find csrc -name '*.h' -o -name '*.cpp')
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; try: make PYTHON=python3.11" % v)'
	@if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED)
	@echo 'installing into $(VENV), 1 of 3: torch, a download of 200 MB or more'
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$$(grep '^torch==' requirements.txt)"
	@echo 'installing into $(VENV), 2 of 3: the other packages'
	$(BIN)/pip install -r requirements.txt
	@echo 'installing into $(VENV), 3 of 3: this package; compiling its kernels takes minutes'
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	$(BIN)/python -m swin_moe.data.torchvision_site
	@rm $(UNFINISHED) && touch $@
