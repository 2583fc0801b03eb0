# `make` lists the targets. `make test TRANSFORMERS=4.57.6` picks the other supported line, `TRANSFORMERS=newest` whatever
# is the newest release on PyPI today.

PYTHON ?= python3
# The newest 5.x that this Python can install
TRANSFORMERS ?= $(shell $(PYTHON) -c 'import sys; print("5.24.0" if sys.version_info >= (3, 11) else "5.20.2")')
# More arguments for pytest or locate.py
ARGS ?=

VENV := .venv/$(TRANSFORMERS)
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
STAMP_ALL := $(VENV)/.stamp-all
TYPES := $(VENV)/types
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# What the type checker examines besides the remote code
TYPED := locate.py upload_to_hub.py hub $(wildcard finetune.py serve.py scan serving training)
# What pip is asked for, and which environment `.venv/default` leads to (the one of a plain `make`)
RELEASE := $(if $(filter newest,$(TRANSFORMERS)),--upgrade transformers,transformers==$(TRANSFORMERS))
DEFAULT := $(if $(filter file,$(origin TRANSFORMERS)),.venv/default,$(VENV))

.PHONY: help demo demo-model test test-all coverage lint gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      set up an environment and ground the demo pictures"
	@echo "make test      set up and run the tests, but for the slow ones   (ARGS='-k assembly' for some)"
	@echo "make test-all  all tests, with what only they need              (ARGS='-m slow' for the slow ones)"
	@echo "make coverage  the tests, and what they reach of the code"
	@echo "make demo-model  the demo's checkpoint, trained anew into demo-model/: hours"
	@echo "make lint      linter, formatter and type checker"
	@echo "make gpu       on a CUDA machine: tests and measurements, in benchmarks/gpu-NAME.json"
	@echo "make clean     remove environments, caches and results"
	@echo "TRANSFORMERS=$(TRANSFORMERS) picks the environment, PYTHON=$(PYTHON) what it is made with."

demo: $(STAMP)
	$(BIN)/python locate.py $(ARGS)

demo-model: $(STAMP)
	$(BIN)/python demo/train.py --out demo-model $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP_ALL)
	$(PYTEST) -m "" $(ARGS)

# Slower than `test`: every line is watched, those of the tests' own processes and of transformers' copies too
coverage: $(STAMP_ALL)
	$(BIN)/coverage erase
	$(subst python -m,coverage run -m,$(PYTEST)) -m "" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include="$$($(BIN)/python -c \
		'import upload_to_hub as u; print(*u.remote_code_files(), *"patch/* hub/* scan/* serving/* training/*".split(), sep=",")')"

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
	$(BIN)/mypy $(TYPED) patch

# The stock needs TRANSFORMERS=4.57.6; its folder and a name are arguments: ARGS="--stock DIR --name h100"
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis located
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml Makefile $(if $(filter newest,$(TRANSFORMERS)),always)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check pip==26.3
	$(BIN)/python -m pip install --group dev $(RELEASE)
	$(if $(filter .venv/default,$(DEFAULT)),ln -sfn $(TRANSFORMERS) .venv/default)
	touch $@
	@echo "To work in this environment:  source $(DEFAULT)/bin/activate"

$(STAMP_ALL): $(STAMP)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -q && apt-get install -qy --no-install-recommends chromium; } || \
		{ echo "tests of the server's page drive chromium, which is missing; as root: apt install chromium" >&2; exit 1; }
	$(BIN)/python -m pip install --group all
	touch $@

# `newest` is asked anew each time
.PHONY: always
always:
