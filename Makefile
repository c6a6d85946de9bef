# preflow on this machine. `make` alone explains the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
export PYTHON
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo up down test lint server clean

help:
	@echo "make demo    take a tiny SFT adapter to a better one through every stage, offline (about 8 minutes)"
	@echo "make up      serve the demo's adapters with vLLM, with the Prefect server and its UI; Ctrl-C ends them"
	@echo "make server  the Prefect server and UI alone, with the runs of the demo"
	@echo "make test    lint, types and every test (about 10 minutes)"
	@echo "make lint    ruff and mypy only"
	@echo "make clean   delete the demo's workspace; the virtual environments stay"
	@echo "The first target that needs an environment makes it (.venv, .venv-serve)."

.venv/ready: constraints.txt pyproject.toml infra/local/setup.sh
	@infra/local/setup.sh main .venv

.venv-serve/ready: constraints-serve.txt infra/local/setup.sh
	@infra/local/setup.sh serve .venv-serve

demo: .venv/ready .venv-serve/ready
	@$(BIN)/python -m flows.demo

up: .venv/ready .venv-serve/ready
	@$(BIN)/python -m flows.demo --up

server: .venv/ready
	@$(BIN)/python -m flows.demo --server

lint: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: .venv/ready .venv-serve/ready lint
	@infra/local/setup.sh browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	@rm -rf .demo
