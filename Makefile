# make demo | test | coverage | lint | clean. `make test TRANSFORMERS=4.57.6` picks the other supported line.

PYTHON ?= python3
# The newest 5.x that this Python can install
TRANSFORMERS ?= $(shell $(PYTHON) -c 'import sys; print("5.23.0" if sys.version_info >= (3, 11) else "5.20.2")')
# More arguments for pytest or locate.py
ARGS ?=

VENV := .venv/$(TRANSFORMERS)
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
TYPES := $(VENV)/types

.PHONY: help demo test coverage lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      set up an environment and ground the demo pictures"
	@echo "make test      set up and run the tests            (ARGS='-k assembly' for some)"
	@echo "make coverage  the tests, and what they reach of the remote code, patch/ and hub/"
	@echo "make lint      linter, formatter and type checker"
	@echo "make clean     remove environments, caches and results"
	@echo "TRANSFORMERS=$(TRANSFORMERS) picks the environment, PYTHON=$(PYTHON) what it is made with."

demo: $(STAMP)
	$(BIN)/python locate.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# Slower than `test`: every line is watched, those of the tests' own processes and of transformers' copies too
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include="$$($(BIN)/python -c \
		'import upload_to_hub as u; print(*u.remote_code_files(), "patch/*", "hub/*", sep=",")')"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The remote code imports its neighbours relatively, so the type checker needs a package around it
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/remote_code
	touch $(TYPES)/remote_code/__init__.py
	$(BIN)/python -c 'import upload_to_hub as u; print(*u.remote_code_files(), sep="\n")' | \
		xargs -I{} ln -s {} $(TYPES)/remote_code/
	MYPYPATH=$(TYPES) $(BIN)/mypy -p remote_code
	$(BIN)/mypy locate.py upload_to_hub.py hub

clean:
	rm -rf .venv .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis located
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check pip==26.3
	$(BIN)/python -m pip install --group dev transformers==$(TRANSFORMERS)
	touch $@
