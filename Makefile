# make repro | test | lab | lint      Each first sets up what it needs: the locked versions, in .venv. A second call costs nothing.
# make test-browser                   The notebooks and the report in a browser (Chromium, installed where root may).
# make paper                          The real data sets: switches `study` in params.yaml to them (SETS=sysu for one), then repro.
# make paper-scale                    The paper's recipe on rendered sets of the real sizes, for a GPU (SETS=regdb for the
#                                     shorter one, which also comes first): switches `study` to them, then repro; card,
#                                     precision, versions and duration of each run to results/<data set>/runs.csv.
# make bench                          Measure what is claimed to be fast; writes benchmarks/RESULTS.md (at most 10 min).
# make embedded                       Switches `study` in params.yaml back to the rendered sets; runs nothing.
# make regdb-trials TRIALS=1-10       RegDB's trials as batch runs, one after the other; also TRIALS=3, TRIALS=1,4,7,
#                                     DATASET=synth_regdb.
# make extras                         Add Ray, for many runs at once (python -m tools.batch, docs/SCALE.md), and faiss, for `search`.
# make readings                       Which choice of the paper's open ones moves the scores? Trains every row of `readings` in
#                                     params.yaml (hours), JOBS=4 at a time; ARGS="--rows rho_half,rho_double" for some.
# make reference                      The embedded study on several seeds, for the README's first table: half an hour more than repro,
#                                     in a copy below build/; a second call goes on. Writes results/reference.
# make report                         Write results/report.html from what is there, name it, and open it where there is a screen.
# make verify-results STAGE=NAME      Makes a stored result again in a temporary copy: identical, within spread or different.
#                                     NAME as in `dvc stage list --all`: train_*, evaluate_* or tables_*.
# make test-faults                    Long loops of kills and full disks, a quarter of an hour; writes docs/faults.txt.
# make lock                           Compile both lock files again from pyproject.toml (ARGS=--upgrade for newer versions).
# Extra arguments go through ARGS:    make repro ARGS=--keep-going      make test ARGS="-m slow"      make test ARGS="-k losses"

PYTHON ?= python3
WORKERS ?= logical
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
export PATH := $(CURDIR)/$(BIN):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export DVC_NO_ANALYTICS := 1
unexport PYTHONHOME PYTHONPATH

# A virtual environment holds its own absolute path; after the folder was moved or copied it has to be made again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(shell rm -f $(READY))
endif

override SETS := $(or $(strip $(SETS)),sysu regdb)
TRIALS ?= 1-10
DATASET ?= regdb
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
STAGE ?= train_sysu@synth_sysu-1-baseline-0
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: setup extras repro paper paper-scale embedded regdb-trials readings reference report verify-results bench
.PHONY: test test-browser test-faults lab lint lock clean-venv
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

setup: $(READY)
	@$(BIN)/python -m tools.checkout

extras: setup $(EXTRAS)

repro: setup
	@$(BIN)/python -m dvc repro $(ARGS)

# The raw data of all sets are looked at before the first hour of training is spent on one of them.
paper: setup
	@$(BIN)/python -m tools.profile paper $(SETS)
	@$(BIN)/python -m dvc repro --keep-going $(foreach set,$(SETS),prepare_$(set)@$(set))
	@$(BIN)/python -m dvc repro $(ARGS)

# RegDB's layout first: its tables, and what its runs took, are there before the hours of SYSU-MM01's begin.
paper-scale: setup
	@$(BIN)/python -m tools.profile paper-scale $(SETS)
	@$(if $(filter regdb,$(SETS)),$(BIN)/python -m dvc repro $(foreach stage,tables figures,$(stage)_regdb@synth_regdb_paper_scale))
	@$(if $(filter regdb,$(SETS)),$(BIN)/python -m tools.runs synth_regdb_paper_scale)
	@$(BIN)/python -m dvc repro $(ARGS)
	@$(BIN)/python -m tools.runs

bench: setup
	@$(BIN)/python -m benchmarks.run $(ARGS)

embedded: setup
	@$(BIN)/python -m tools.profile embedded

regdb-trials: setup
	@$(BIN)/python -m tools.trials "$(TRIALS)" --dataset $(DATASET) $(ARGS)

readings: setup
	@$(BIN)/python -m dvc repro pack_sysu@synth_sysu weights_sysu@synth_sysu
	@$(BIN)/python -m tools.readings --jobs $(JOBS) $(ARGS)

reference: setup
	@$(BIN)/python -m tools.reference

report: setup
	@$(BIN)/python -m tools.report --open $(ARGS)

# Exit status 3, scores within the spread, is what another machine is expected to give.
verify-results: setup
	@$(BIN)/python -m tools.verify "$(STAGE)" || test $$? -eq 3

# One thread for each of the parallel test processes: more threads than cores make every one of them slower.
test: setup $(EXTRAS)
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

# Mounts small file systems, and so skips the full disks where the caller may not.
test-faults: SHELL := /bin/bash
test-faults: setup
	@set -o pipefail; mkdir -p docs; { \
	    $(BIN)/python -c "import platform as p, torch; print(p.system(), p.machine(), 'Python', p.python_version(), 'torch', torch.__version__)"; \
	    $(ONE_THREAD) TQDM_DISABLE=1 $(BIN)/python -m pytest -m faults -v -rPs --no-header --color=no --disable-warnings --durations=0 $(ARGS); \
	} 2>&1 | tee docs/faults.txt

test-browser: setup
	@$(BIN)/python -m tools.browser
	@$(ONE_THREAD) $(BIN)/python -m pytest -m browser $(ARGS)

lab: setup
	@$(BIN)/python -m tools.lab $(ARGS)

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

lock: setup
	$(BIN)/uv pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-emit-index-url \
	    --extra dev --custom-compile-command "make lock" --output-file requirements.lock --quiet $(ARGS) pyproject.toml
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print(*extras['cluster'], *extras['faiss'], sep='\n')" \
	    | $(BIN)/uv pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	    --no-emit-index-url --constraints requirements.lock --custom-compile-command "make lock" \
	    --output-file requirements-extras.lock --quiet $(ARGS) -

clean-venv:
	rm -rf $(VENV)

# The stamp is written last, so that an interrupted set-up starts again. uv comes from the lock too, checked by its hash.
# A folder .venv that somebody else made (it has no .by-make) is left alone.
MAKE_VENV = rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.by-make && "$(PYTHON)" -m venv
PIP_INSTALL = install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt

$(READY): requirements.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is older than Python 3.11: name a newer one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test ! -e $(VENV) || test -e $(VENV)/.by-make || { \
	    echo "$(CURDIR)/$(VENV) was not made by this Makefile: rename or remove it, then call make again"; exit 1; }
	@test -f $@ || { echo "Making $(VENV) with $$("$(PYTHON)" --version)"; \
	    { $(MAKE_VENV) $(VENV) || { $(MAKE_VENV) --without-pip $(VENV); }; } >$(VENV).log 2>&1 || { \
	        cat $(VENV).log; rm -rf $(VENV) $(VENV).log; \
	        echo "$(PYTHON) has no working venv module: install it (on Debian and Ubuntu the package python3-venv)"; exit 1; }; \
	    rm -f $(VENV).log; }
	@awk '/^uv==/ { inside = 1 } inside { print } inside && !/\\$$/ { exit }' requirements.lock > $(VENV)/uv.txt
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then $(BIN)/python -m pip $(PIP_INSTALL); \
	    elif "$(PYTHON)" -m pip --version >/dev/null 2>&1; then "$(PYTHON)" -m pip --python $(BIN)/python $(PIP_INSTALL); \
	    else echo "$(PYTHON) has no pip: install it (on Debian and Ubuntu the package python3-pip)"; exit 1; fi
	@echo "Installing the versions of requirements.lock"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock \
	    --build-constraints requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@echo "$(CURDIR)" > $@

# Whatever both locks name has one version: the second was compiled with the first as its constraint.
$(EXTRAS): requirements-extras.lock $(READY)
	@echo "Installing the versions of requirements-extras.lock"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-extras.lock
	@touch $@
