# Start with `make demo` and `make ui`; `make help` lists all commands.
# Requires Debian or Ubuntu with python3 >= 3.11 (and python3-venv), make and git. Everything else is installed into
# .venv, once, from requirements.lock.

ifneq ($(shell uname),Linux)
$(error make needs Linux here: use WSL on Windows, a Linux container or virtual machine on macOS)
endif

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PORT ?= 5000
CORES ?= all
PYTEST_WORKERS ?= 2
STUDY := digits
UV_VERSION := 0.13.8

# Its name changes with the lock, the metadata and the directory, and a changed name asks for a new installation.
STAMP := .venv/.installed-$(shell { cat requirements.lock pyproject.toml; pwd -P; } | sha256sum | cut -c1-16)
INSTALLING := .venv/.installing

# Snakemake's jobs find the environment's `python` on PATH; no PYTHONPATH from outside may shadow its packages.
OUTSIDE_PATH := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export UV_HTTP_TIMEOUT ?= 300
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
# The environment is installed into .venv, whatever pip is told to do elsewhere; --no-user overrules a pip.conf too.
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT
# The targets run on this machine; `snakemake` and `dvc repro` go on using a cluster's profile.
unexport SNAKEMAKE_PROFILE
SAY_LOCAL = $(if $(SNAKEMAKE_PROFILE),echo "SNAKEMAKE_PROFILE=$(SNAKEMAKE_PROFILE) is left out: make runs on this machine; run snakemake to use it." >&2)
# Container images set it, and then each of a study's processes compiles torch again, 3 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-gc reproduce ui pull archive release test test-all test-processors fuzz lint format docs install lock clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

demo: reproduce ## the digits study end to end: data, teacher, coefficients, students, scores, report
demo-gc: STUDY = digits-gc
demo-gc: reproduce ## the second paper on the digits: consistency training along generator-induced flows
demo demo-gc:
	@exec python -m consistency summary --study config/studies/$(STUDY).yaml

reproduce: install
	@$(SAY_LOCAL)
	CORES=$(CORES) exec python -m consistency reproduce --study config/studies/$(STUDY).yaml

ui: install ## the recorded runs in MLflow, on 127.0.0.1 (PORT=5000)
	@store=$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}
	case "$$store" in http*) echo "MLFLOW_TRACKING_URI names a running server: open its address"; exit 0 ;; esac
	[ "$$store" != sqlite:///mlflow.db ] || [ -e mlflow.db ] || {
	  track=
	  for report in results/*/report/report.html; do
	    study=$${report#*/}
	    [ ! -e "$$report" ] || track+=$$'\n'"  .venv/bin/python -m consistency track --study config/studies/$${study%%/*}.yaml"
	  done
	  echo "Nothing is recorded here yet: $${track:+record the results that are here by}$${track:-run \`make demo\` first.}" >&2
	  exit 1
	}
	case "$$store" in sqlite:///*) ;; *)
	  python -c 'from consistency.tracking.server import require_store; require_store()'
	esac
	echo "MLflow: http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	echo "(Ctrl-C ends it; another port: make ui PORT=5001)"
	# An address may hold a password, and everybody can read a command line.
	export MLFLOW_BACKEND_STORE_URI="$$store"
	# MLflow's job runner would start six more processes, for language models.
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false exec mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1

# Snakemake compares times, which are arbitrary in a clone: files are touched once DVC reports them up to date.
pull: install ## the results of this commit from DVC's remote; computes nothing (STUDY=digits)
	@$(SAY_LOCAL)
	dvc pull
	dvc status --quiet || { dvc status; echo "The pull is incomplete: nothing was marked as up to date (docs/dvc.md)." >&2; exit 1; }
	snakemake --touch --forceall --cores 1 --quiet all --config 'studies=[$(STUDY)]' -- results/$(STUDY)/report/report.html
	exec snakemake --cores 1 --quiet all --config 'studies=[$(STUDY)]'

archive: install ## a finished study as one zip with SHA256SUMS, archives/NAME-KEY.zip (STUDY=digits)
	@exec python -m consistency archive --study config/studies/$(STUDY).yaml

release: install ## a finished study's students with a model card, release/NAME; nothing is uploaded (STUDY=digits)
	@python -m consistency archive --study config/studies/$(STUDY).yaml
	exec python -m consistency release --study config/studies/$(STUDY).yaml

# The last -m counts, so PYTEST_ARGS may select others.
test: SELECTED := -m "not slow"
test: install ## the quick tests, with the tiny study through DVC, Snakemake and an MLflow server (PYTEST_ARGS="-k fit")
test-all: SELECTED := --cov --cov-report=term:skip-covered
# One more than cores: the tests of Slurm wait most of the time.
test-all: PYTEST_WORKERS = 3
test-all: install ## every test, with the branch coverage, as continuous integration runs them (PYTEST_WORKERS=4)
test test-all:
	@export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
	exec python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(SELECTED) $(PYTEST_ARGS)

fuzz: install ## damaged files for every reader, a minute each (SECONDS=60); what is found is kept in tests/fuzzed/
	@OMP_NUM_THREADS=1 CONSISTENCY_FUZZ=$(or $(SECONDS),60) exec python -m pytest -q -n 0 tests/test_fuzz.py

test-processors: install ## the statistical tests with 20 seeds and each instruction set of this processor
	@export OMP_NUM_THREADS=1
	files=$$(grep -rl --include=test_*.py mark.statistical tests)
	for ATEN_CPU_CAPABILITY in default $$(grep -m1 flags /proc/cpuinfo | grep -owE 'avx2|avx512f' | tr -d f); do
	  export ATEN_CPU_CAPABILITY
	  echo "ATEN_CPU_CAPABILITY=$$ATEN_CPU_CAPABILITY"
	  seq 0 19 | xargs -P $(PYTEST_WORKERS) -I K env CONSISTENCY_TEST_SEED=K python -m pytest -q -m statistical $$files
	done

lint: install ## ruff, mypy, snakefmt and snakemake --lint; changes nothing
	@set -x
	ruff check .
	ruff format --check .
	mypy src
	snakefmt --check Snakefile workflow
	snakemake --lint

format: install ## let ruff and snakefmt rewrite what they can
	@set -x
	ruff check --fix-only .
	ruff format .
	snakefmt Snakefile workflow

# The pages link to one another as they do in the repository, so they are laid out in the same way. The packages have
# an environment of their own: they are of no use to a study.
docs: .venv-docs/.installed ## the documentation as a site, build/site/index.html; a warning is an error
	@rm -rf build/docs
	mkdir -p build/docs
	cp -r --parents *.md CITATION.cff LICENSE NOTICE dvc.yaml environment.yml config docs examples src workflow build/docs
	.venv-docs/bin/zensical build --strict --clean
	echo "build/site/index.html"

.venv-docs/.installed: requirements-docs.lock
	@"$(PYTHON)" -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --no-user --quiet --disable-pip-version-check --require-hashes -r requirements-docs.lock
	touch $@

install: $(STAMP) ## the environment in .venv (every target does this first, once)
	@:

# INSTALLING exists during an installation; if it is there before one, the last was interrupted.
$(STAMP):
	@export PATH="$(OUTSIDE_PATH)"
	fail() { echo "error: $$*" >&2; exit 1; }
	exec 8>>.install.lock
	flock -n 8 || {
	  [ $$? = 1 ] || fail "flock cannot lock .install.lock: install util-linux, or work on a disk that has file locks."
	  echo "Waiting: another make is installing the environment of this directory."
	  flock 8
	}
	if [ -e $@ ]; then exit 0; fi
	if [ -e .venv ] && { [ -e $(INSTALLING) ] || ! grep -qsxF -- "$$(pwd -P)" .venv/.installed-* ||
	    ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; then
	  echo "The last installation was interrupted, its directory moved or its Python removed: starting .venv afresh."
	  rm -rf .venv
	fi
	if [ ! -e .venv ]; then
	  packages="$(notdir $(PYTHON)) $(notdir $(PYTHON))-venv"
	  found=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
	    fail "$(PYTHON) is not installed or does not start. Run: sudo apt-get install $$packages"
	  printf '3.11\n%s\n' "$$found" | sort -V -C || fail "$(PYTHON) is Python $$found; 3.11 or newer is needed." \
	    "Run: sudo apt-get install python3.11 python3.11-venv (on Debian 12 or Ubuntu 22.04; a newer release may have" \
	    "python3.12 instead), then the same command with PYTHON=python3.11 after make."
	  echo "Installing the environment into .venv, once: about 260 packages, 5.6 GB on disk with PyTorch for CPU and GPU."
	  echo "This takes one to a few minutes, depending on the network; later commands start at once."
	  "$(PYTHON)" -m venv .venv || fail "$(PYTHON) cannot make virtual environments. Run: sudo apt-get install $$packages"
	fi
	touch $(INSTALLING)
	export VIRTUAL_ENV="$$(pwd)/.venv"
	{
	  echo "[1/3] the installer (uv $(UV_VERSION))"
	  .venv/bin/python -m pip install --no-user --quiet --disable-pip-version-check uv==$(UV_VERSION) &&
	  echo "[2/3] the packages of requirements.lock, each checked against its hash" &&
	  .venv/bin/uv pip sync --python .venv/bin/python --require-hashes requirements.lock &&
	  echo "[3/3] this repository's own package, in place" &&
	  .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --offline --editable .
	} || {
	  cache=$${UV_CACHE_DIR:-$${XDG_CACHE_HOME:-$${HOME-}/.cache}/uv}
	  free() { df -Ph "$$1" 2>/dev/null | awk 'NR == 2 { free = $$4 " free" } END { print free ? free : "missing" }'; }
	  fail "the installation stopped; the reason stands above." \
	    "It needs access to the package registry and 6 GB of disk here ($$(free .)), as much for uv's cache if that is on" \
	    "another disk ($$cache, $$(free "$$cache"); UV_CACHE_DIR moves it), and some in $${TMPDIR:-/tmp}" \
	    "($$(free "$${TMPDIR:-/tmp}")). Run the same command again; earlier downloads are kept."
	}
	rm -f .venv/.installed-*
	pwd -P >$@
	rm $(INSTALLING)
	echo "The environment is ready."

lock: install ## compile each requirements*.in into its lock (LOCK_ARGS=--upgrade for newer indirect packages)
	@set -x
	for name in requirements requirements-docs; do
	  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCK_ARGS) $$name.in -o $$name.lock
	done

clean: ## remove results/, state/, mlflow.db and mlruns/ (requires CONFIRM=yes)
	@[ "$(CONFIRM)" = yes ] || { echo "This removes results/, state/, mlflow.db and mlruns/, trained networks included." \
	  "To do it: make clean CONFIRM=yes" >&2; exit 1; }
	mkdir -p .snakemake
	links=$$(find results state mlruns mlflow.db -type l \( -xtype d -o -name mlflow.db \) -printf '  %p -> %l\n' 2>/dev/null ||:)
	flock -n -E 9 .snakemake/at-work.lock rm -rf results state mlruns mlflow.db mlflow.db-* ||
	  { code=$$?; [ $$code != 9 ] || echo "A run is at work in this directory; stop it first." >&2; exit $$code; }
	[ -z "$$links" ] || printf 'Of these, only the links were removed; what they name is kept:\n%s\n' "$$links"
