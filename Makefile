PYTHON ?= python3
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input

.PHONY: help study explore test test-slow docs lint lock clean force

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1 /p' Makefile | while read -r name text; do printf '%-10s%s\n' "$$name" "$$text"; done

study: .venv/ready  ## run the study of configs/study.toml
	@.venv/bin/python -m experiments run configs/study.toml

explore: .venv/ready  ## serve the interactive pages on this machine
	@.venv/bin/python -m experiments.explore

# A file goes to one process, whose tests share what it compiles. Arguments and results are checked against their
# annotations.
pytest = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
  --jaxtyping-packages=jprob,experiments,typecheck.checked
# Compiling is most of the work of a test run. Kept inside .venv, the cache goes when jax changes.
test test-slow: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.venv/jax-cache
test test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test test-slow: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1
test: .venv/ready  ## run the tests and the examples in the docstrings
	@$(pytest)

test-slow: .venv/ready  ## run the tests marked slow, which make test leaves out
	@$(pytest) --slow -m slow tests

docs: .cache/docs/ready  ## build the documentation into build/docs
	@NO_MKDOCS_2_WARNING=1 .cache/docs/bin/mkdocs build --quiet && echo "build/docs/index.html"

lint: .venv/ready  ## check style, format and types
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m ruff format --check
	@.venv/bin/python -m pyright

# One file serves every Python and platform; pip can resolve only for its own, so uv does it.
compile = .cache/uv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command 'make lock' --upgrade --quiet
docs_extra = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
lock: .cache/uv/bin/uv  ## re-make both locks with the newest versions pyproject.toml allows
	@$(compile) pyproject.toml --extra checkpoint --extra study --extra explore --extra dev --output-file requirements.lock
	@.cache/uv/bin/python -c '$(docs_extra)' | $(compile) - --output-file docs.lock

clean:  ## remove .venv, caches and builds, and keep results/
	@rm -rf .venv .cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The rest makes .venv, afresh where the lock or the Python has changed. .venv/locked, written last, holds the version of
# that Python: a .venv that was interrupted, or whose Python has gone, does not pass for a ready one.
have := $(shell .venv/bin/python -V 2>/dev/null)
made := $(shell cat .venv/locked 2>/dev/null)
want := $(if $(filter file,$(origin PYTHON)),$(have),$(shell "$(PYTHON)" -V 2>/dev/null))
ifneq ($(have) $(have),$(made) $(want))
stale := force
endif

# What keeps PYTHON from making .venv, in one line, or nothing. Debian packs ensurepip apart from python3.
problem = $(shell exec 2>/dev/null; \
  if ! "$(PYTHON)" -c ""; then echo "$(PYTHON) is missing or does not run: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
  elif ! "$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))"; then \
    echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), too old: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
  elif ! "$(PYTHON)" -c "import ensurepip, venv"; then \
    echo "$(PYTHON) cannot make a virtual environment: install venv and ensurepip (Debian, Ubuntu: apt install python3-venv)"; fi)

.venv/locked: requirements.lock $(stale)
	$(if $(problem),$(error $(problem)))
	@echo "setting up .venv with $$("$(PYTHON)" -V) (once, about a minute)" >&2
	@rm -f .venv/locked .venv/ready && "$(PYTHON)" -m venv --clear .venv && $(PIP) --require-hashes -r requirements.lock \
	  && .venv/bin/python -V > $@

.venv/ready: .venv/locked pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable . && touch $@

.cache/docs/ready: docs.lock
	$(if $(problem),$(error $(problem)))
	@"$(PYTHON)" -m venv --clear .cache/docs && .cache/docs/bin/python -m pip install -qq --disable-pip-version-check \
	  --no-input --require-hashes -r docs.lock && touch $@

.cache/uv/bin/uv:
	$(if $(problem),$(error $(problem)))
	@"$(PYTHON)" -m venv --clear .cache/uv && .cache/uv/bin/python -m pip install -qq uv==0.13.9
