# make setup        Installs the locked versions in .venv and sets up the clone; every other target does this first.
# make repro        The study that params.yaml names: data, runs (as many at once as there are cores), tables, figures, report.
# make demo         The same in a few minutes, with shrunk parameters and apart from results/: build/demo.
# make lab          JupyterLab, for notebooks/.
# make test | lint  The tests; style and types.
# make sensitivity  Trains the rows of `sensitivity` in params.yaml (hours) and adds them to results/.
# make published    The results that are in git: the seeds of studies/published.yaml (hours), and the README's table.
# make gaps         The four variants on data with narrower and wider modality gaps (hours): results/gaps.
# make learning-rate  Four learning rates for each variant, on validation identities (hours): results/learning_rate.
# make paper        The real data sets: merges studies/paper.yaml into params.yaml, then repro.
# make report       Makes results/report.html and opens it.
# make experiments  `dvc exp show`, without the columns that do not differ.
# make bench        Measures what is claimed to be fast: results/benchmarks.md.
# make readme       Writes the README's table from results/.
# make test-gpu     What only a CUDA GPU shows, as a table to paste into an issue; under ten minutes.
# make kill-test    Kills runs at random moments and compares what comes out; half an hour.
# make ray          Adds Ray, for runs on many machines: docs/scale.md.
# make lock         Compiles the lock files again from pyproject.toml (ARGS=--upgrade for newer versions).
# .venv takes 6.5 GB on Linux, with torch's GPU libraries. More arguments through ARGS:
#    make repro ARGS="--jobs 4"     make repro ARGS=evaluate@regdb-3-b_cc-0     make test ARGS="-k losses"

PYTHON ?= python3
ARGS ?=
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)
export OMP_WAIT_POLICY := PASSIVE
unexport PYTHONHOME PYTHONDONTWRITEBYTECODE VIRTUAL_ENV

# A virtual environment holds its own path: made again after the folder was moved.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(shell rm -f $(READY))
endif

.PHONY: help setup repro demo lab test lint sensitivity published gaps learning-rate paper report \
        experiments readme bench test-gpu kill-test ray lock
help:
	@sed -n '/^#/!q; s/^# //p' Makefile

setup: $(READY)
	@python -m tools.setup

repro: setup
	@python -m tools.batch $(ARGS)
	@find results -maxdepth 2 -name tables -o -name figures -o -name report.html | sort

demo: setup
	@python -m tools.variation studies/demo.yaml --into build/demo
	@cd build/demo && PYTHONPATH=. python -m tools.batch $(ARGS)
	@ls -d build/demo/results/*/tables build/demo/results/*/figures build/demo/results/report.html

lab: setup
	@python -m jupyterlab --config=tools/lab.py $(ARGS)

test: setup
	@OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	@ruff check . && ruff format --check . && mypy

sensitivity: setup
	@python -m tools.variation --sensitivity
	@cd build/sensitivity && PYTHONPATH=. python -m tools.batch evaluate $(ARGS)
	@python -m tools.variation --collect
	@python -m tools.batch sensitivity

published: setup
	@python -m tools.variation studies/published.yaml --into build/published --share-cache
	@cd build/published && PYTHONPATH=. python -m tools.batch report $(ARGS)
	@cp -r build/published/results/. results/
	@python -m tools.readme

define conditions
	@python -m tools.variation studies/$(1).yaml --into build/$(1) --share-cache
	@cd build/$(1) && PYTHONPATH=. python -m tools.batch evaluate $(ARGS)
	@mkdir -p results/$(1) && cp -r build/$(1)/results/records results/$(1)
	@python -m danet_study.conditions build/$(1)/params.yaml results/$(1)
endef

gaps: setup
	$(call conditions,gaps)

learning-rate: setup
	$(call conditions,learning_rate)

paper: setup
	@python -m tools.variation studies/paper.yaml
	@python -m tools.batch $(ARGS)

report: setup
	@python -m tools.batch report
	@python -m webbrowser "file://$(CURDIR)/results/report.html" >/dev/null

experiments: setup
	@dvc exp show --only-changed --drop '.*/.*|.*\.yaml|runs' --no-pager $(ARGS)

readme: setup
	@python -m tools.readme

bench: setup
	@python -m tools.bench $(ARGS)

test-gpu: setup
	@python -m tools.gpu $(ARGS)
	@python -m pytest -q -m gpu

kill-test: setup
	@python -m tools.kill_test $(ARGS)

ray: setup
	@python -m pip install -qq --require-hashes -r requirements-extras.lock

LOCK := uv pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-emit-index-url \
    --custom-compile-command "make lock" --quiet
# uv reads SSL_CERT_FILE and UV_INDEX, not pip's settings.
lock: setup
	$(LOCK) --extra dev --output-file requirements.lock $(ARGS) pyproject.toml
	@python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['cluster'])" \
	    | $(LOCK) --constraints requirements.lock --output-file requirements-extras.lock $(ARGS) -

# pip, so that its settings for mirrors, proxies and certificates apply. The stamp comes last: an interrupted set-up
# starts again. A .venv that somebody else made is left alone.
$(READY): requirements.lock
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is missing or older than Python 3.11: make PYTHON=/path/to/python3.11"; exit 1; }
	@test ! -e .venv || test -e .venv/.by-make || { echo ".venv was not made by this Makefile: remove it first"; exit 1; }
	@test -f $@ || { rm -rf .venv && mkdir .venv && touch .venv/.by-make && "$(PYTHON)" -m venv .venv; } || { \
	    rm -rf .venv; echo "$(PYTHON) has no working venv module (on Debian and Ubuntu: python3-venv)"; exit 1; }
	@echo "Installing the versions of requirements.lock in .venv (some minutes, 6.5 GB on Linux)"
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@echo "$(CURDIR)" > $@
