# Each target works alone on a fresh clone and creates .venv first. Settings: PYTHON (3.10 to 3.13),
# CUDA (13, or 12 for older drivers), TORCH_INDEX (a wheel index for torch alone, README.md "Install"), JOBS.
PYTHON ?= python3
VENV := .venv
CUDA ?= $(or $(patsubst $(VENV)/.installed-cuda%,%,$(firstword $(wildcard $(VENV)/.installed-cuda*))),13)
TORCH_INDEX ?=
# Test files that run at the same time: many of them wait for restarts.
JOBS ?= 2
# The stamp is written last and holds the choice of CUDA; an incomplete .venv has none.
STAMP := $(VENV)/.installed-cuda$(CUDA)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Demo and tests run many small tensor operations: more threads compete, and spinning threads waste cores.
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-fast check clean
.DEFAULT_GOAL := install

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/mcl demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# What a developer runs all day: no ranks, no servers, no browsers.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder -m "not slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(STAMP): pyproject.toml constraints.txt
	@case "$(CUDA)" in 12|13) ;; *) echo "make: CUDA=$(CUDA): must be 12 or 13" >&2; exit 2;; esac
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "make: $(PYTHON): no such program; name a Python of 3.10 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "make: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); name one of 3.10 to 3.13: make PYTHON=python3.12" >&2; exit 1; }
	@test -e $@ || "$(PYTHON)" -m venv --clear $(VENV) >/dev/null 2>&1 || \
		{ rm -rf $(VENV); echo "make: $(PYTHON) cannot make a virtual environment here; check the free space and that" \
		  "its venv module is whole (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@rm -f $@
	@echo "installing into $(VENV) (once; torch and DALI are large)"
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -c constraints.txt -e '.[cuda$(CUDA),demo,dev,s3]'
	@touch $@
