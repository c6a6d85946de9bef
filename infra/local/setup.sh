#!/usr/bin/env bash
# Make one of the two virtual environments, or install what the tests need as well. Called by make.
#   setup.sh main  .venv         Prefect, TRL, tests
#   setup.sh serve .venv-serve   vLLM
#   setup.sh browser             Chromium, which the tests of the UI drive
#   setup.sh database            PostgreSQL, which the long test of backups dumps and restores
#   setup.sh lock                write the hashes of constraints*.txt into infra/local/*.lock
# uv does the work; it is installed into the environment where the machine has none, and pip takes over where uv fails.
# pip's own settings (index, find-links, certificate, proxies) count for both.
set -euo pipefail
kind=$1 env=${2:-}
uv_version=0.13.9

say() { printf '%s\n' "setup: $*"; }

fail() { printf '%s\n' "setup: $*" >&2; exit 1; }

# The first Python that fits; what PYTHON names, and nothing else, where it is set.
find_python() {
    for python in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        "$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && return
    done
    return 1
}

make_environment() {
    say "making $env"
    if find_python; then
        "$python" -m venv --clear "$env"
    elif command -v uv >/dev/null; then
        uv venv --quiet --seed --clear --python "${PYTHON:-3.11}" "$env"
    else
        fail "preflow needs Python 3.11, 3.12 or 3.13 with venv (Debian, Ubuntu: apt-get install python3-venv), or uv, which brings its own"
    fi
}

# need PACKAGE CHECK...: install a Debian package where the command CHECK fails.
need() {
    local package=$1
    shift
    "$@" >/dev/null 2>&1 && return
    say "installing $package"
    local root=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "$package is missing: run 'sudo apt-get install $package', then make again"
        root=(sudo)
    fi
    "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq "$package" >/dev/null
    "$@" >/dev/null 2>&1 || fail "'$*' fails after 'apt-get install $package': install it by hand, then make again"
}

has_numa() { ldconfig -p | grep -q libnuma.so.1; }

has_gpu() { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1

# PREFLOW_CHROMIUM names another browser of the kind, where Debian's package is not available.
install_browser() {
    [ -n "${PREFLOW_CHROMIUM:-}" ] || command -v google-chrome >/dev/null || need chromium command -v chromium
}

has_postgresql() { compgen -G "/usr/lib/postgresql/*/bin/initdb"; }

find_uv() {
    uv=$(command -v uv) && return
    "$env/bin/python" -m pip install --quiet "uv==$uv_version" && uv=$env/bin/uv && return
    uv=
    say "no uv here: pip does it, more slowly"
}

# pip_setting NAME: what pip is told by the environment or by its files.
pip_setting() {
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    printf '%s' "${!variable:-$("$env/bin/python" -m pip config get "global.$1" 2>/dev/null || true)}"
}

tell_uv_what_pip_is_told() {
    local links index certificate
    links=$(pip_setting find-links) index=$(pip_setting index-url) certificate=$(pip_setting cert)
    export UV_FIND_LINKS=${UV_FIND_LINKS:-${links//[[:space:]]/,}} UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
    [ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    [ -z "$certificate" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificate}
}

with_uv() { [ -n "$uv" ] && "$uv" pip install --quiet --python "$env/bin/python" "$@"; }

install() {
    with_uv "$@" || { say "pip installs $*"; "$env/bin/python" -m pip install --quiet "$@"; }
}

# torch stands in no lock: which build is right depends on the machine. First what lies on its disk, then what uv chooses.
install_torch() {
    local wanted=torch==2.13.0$1 backend=$2
    if ! has_gpu; then
        with_uv --no-index --no-deps "$wanted" 2>/dev/null && return
        with_uv --no-deps --torch-backend "$backend" "$wanted" 2>/dev/null && return
    fi
    "$env/bin/python" -m pip install --quiet --no-deps "$wanted"
}

install_main() {
    say "installing Prefect, torch and TRL into $env (about 2.3 GB)"
    install_torch "" auto || fail "torch 2.13.0 cannot be installed: see pip's message above"
    install --no-deps --require-hashes --requirement infra/local/main.lock
    install --constraint constraints.txt --editable '.[train,dev]'
}

install_serve() {
    if has_gpu; then
        say "installing vLLM for CUDA into $env (about 9 GB; 5 to 10 minutes)"
        install vllm==0.32.0
        return
    fi
    need libnuma1 has_numa
    say "installing vLLM's CPU build into $env (about 2.2 GB)"
    install_torch +cpu cpu ||
        fail "no CPU build of torch 2.13.0 for $("$env/bin/python" -V) was found: let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS name a place that has torch-2.13.0+cpu"
    install --no-deps --require-hashes --requirement infra/local/serve.lock
}

# Versions are chosen in constraints.txt and constraints-serve.txt; the locks add the hashes, for every Python that preflow knows.
lock() {
    local options=(--quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11)
    "${uv:-uv}" pip compile "${options[@]}" --extra train --extra dev --constraint constraints.txt \
        --overrides <(echo "torch ; sys_platform == 'never'") --output-file infra/local/main.lock pyproject.toml
    "${uv:-uv}" pip compile "${options[@]}" --no-deps --output-file infra/local/serve.lock - < <(grep -v '^torch==' constraints-serve.txt)
}

case $kind in
browser) install_browser && exit ;;
database) need postgresql has_postgresql && exit ;;
lock) lock && exit ;;
esac
# A link leads to an environment that others use too, and making it begins by emptying it.
[ ! -L "$env" ] || fail "$env is a link to $(readlink "$env"): update that one where it is, then run: touch $env/ready"
start=$SECONDS
make_environment
find_uv
tell_uv_what_pip_is_told
"install_$kind"
touch "$env/ready"
say "$env is ready after $((SECONDS - start)) s"
