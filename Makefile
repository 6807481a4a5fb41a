# `make` alone lists what there is. Every target that needs an environment makes `.venv` itself;
# the files .venv/.installed-* record what it holds, and setup.py or pyproject.toml being newer
# than they are means installing again.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help train test test-gpu test-compiled test-executed test-versions benchmarks gpu-report guard lint format format-check typecheck docs docs-serve build clean distclean

help: ## show this list
	@echo "MoCapsNet: momentum capsule networks with fused routing"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Options for a command go into ARGS:     make train ARGS=\"--help\""
	@echo "                                        make test ARGS=\"-k squash -x\""
	@echo "Another interpreter for a new .venv:    make test PYTHON=python3.12"

train: $(VENV)/.installed-train ## train on the embedded handwritten digits
	$(BIN)/mocapsnet train $(ARGS)

test: $(VENV)/.installed-dev ## run the tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-gpu: $(VENV)/.installed-dev ## run the kernels' tests natively on an NVIDIA GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
		"no NVIDIA GPU that PyTorch can use: `make test` runs the same tests in an interpreter")'
	$(BIN)/python -m pytest -n auto --dist worksteal tests/kernels tests/mocapsnet $(ARGS)

test-compiled: $(VENV)/.installed-dev ## compile every kernel for every GPU generation; needs no GPU
	$(BIN)/python -m pytest tests/kernels/test_compiled.py -m whole_matrix -s $(ARGS)

test-executed: $(VENV)/.installed-dev ## execute compiled kernels on the CPU; needs g++, no GPU
	$(BIN)/python -m pytest tests/kernels/test_executed.py -m executed -s $(ARGS)

test-versions: $(VENV)/.installed-dev ## try other Pythons and the lowest dependencies; 5 GB each
	$(BIN)/python tests/versions.py $(ARGS)

benchmarks: $(VENV)/.installed-train ## run all benchmarks that need no GPU; nothing else should run meanwhile
	$(BIN)/mocapsnet benchmark suite $(ARGS)

guard: $(VENV)/.installed-train ## check in a minute that the library is still faster than eager code
	$(BIN)/mocapsnet benchmark guard $(ARGS)

gpu-report: $(VENV)/.installed-dev ## test and measure an NVIDIA GPU; DRY_RUN=1 tries it without one
	$(BIN)/mocapsnet benchmark gpu-report $(if $(DRY_RUN),--dry-run) $(ARGS)

lint: $(VENV)/.installed-dev ## check the code with ruff
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --select I --fix .

format-check: $(VENV)/.installed-dev ## report code that `make format` would change
	$(BIN)/ruff format --check .

# mypy finds modules by folder and does not run the import hook of an editable install. So it is
# given the tree as a wheel would install it, made of links, and its paths are mapped back.
TYPED := build/typecheck
typecheck: $(VENV)/.installed-dev ## check types with mypy
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/mocapsnet
	@ln -s "$(CURDIR)"/mocapsnet/* $(addprefix "$(CURDIR)"/,kernels train benchmarks) \
		$(TYPED)/mocapsnet
	@cd $(TYPED) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p mocapsnet > output; status=$$?; \
		sed -E 's#^mocapsnet/(kernels|train|benchmarks)/#\1/#' output; exit $$status

# A warning, as of a link that leads nowhere, is an error; --quiet would hide them from --strict.
docs: $(VENV)/.installed-dev ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: $(VENV)/.installed-dev ## show the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

build: $(VENV)/.installed-dev ## build the source distribution and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean: ## remove what build, tests and checks left, but not .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mocapsnet kernels train tests benchmarks -name __pycache__ -prune -exec rm -rf {} + \
		2>/dev/null || true

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# .venv/.incomplete stands while pip works. Found at the start, it tells of an installation that
# was cut off, whose remains pip would take for whole packages: begin again. A .venv made by hand
# is kept, and so are the packages in it that fit (a CPU-only torch, for one).
$(VENV)/.installed-train: EXTRAS := train
$(VENV)/.installed-dev: EXTRAS := train,dev
$(VENV)/.installed-train $(VENV)/.installed-dev: pyproject.toml setup.py
	@if [ -e $(VENV)/.incomplete ] || ! $(BIN)/python -m pip --version > /dev/null 2>&1; then \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
			echo "MoCapsNet needs Python 3.10 or newer, and '$(PYTHON)' is not that." \
				"Name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }; \
		[ ! -e $(VENV)/.incomplete ] || echo "the last installation into $(VENV) was cut off"; \
		echo "making $(VENV) with $$("$(PYTHON)" --version)"; \
		rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.incomplete && \
			"$(PYTHON)" -m venv $(VENV) || exit 1; \
	fi
	@echo "installing mocapsnet[$(EXTRAS)] into $(VENV)" \
		"(the first time about 5 GB, most of it PyTorch: some minutes)"
	@touch $(VENV)/.incomplete && rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@rm $(VENV)/.incomplete
	@touch $(VENV)/.installed-train $@
