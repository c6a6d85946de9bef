# preflow on this machine. `make` alone explains the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
export PYTHON
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo up down chat site test lint clean

help:
	@echo "make demo    take a tiny SFT adapter to a better one through every stage, offline (about 8 minutes)"
	@echo "make up      Prefect with its UI, a worker, vLLM and a judge in the background: press Run in the UI"
	@echo "make down    end what make up started"
	@echo "make chat    talk to the served adapter in this terminal; CHAT=\"--model sft\" for another one"
	@echo "make test    lint, types and every test (about 21 minutes)"
	@echo "make lint    ruff and mypy only"
	@echo "make clean   delete the demo's workspace; the virtual environments stay"
	@echo "The first target that needs an environment makes it (.venv, .venv-serve)."

.venv/ready: constraints.txt pyproject.toml infra/local/setup.sh
	@infra/local/setup.sh main .venv

.venv-serve/ready: constraints-serve.txt infra/local/setup.sh
	@infra/local/setup.sh serve .venv-serve

demo: .venv/ready .venv-serve/ready
	@$(BIN)/python -m preflow demo

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
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: .venv/ready .venv-serve/ready lint
	@infra/local/setup.sh browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

clean:
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m preflow down
	@rm -rf .demo
