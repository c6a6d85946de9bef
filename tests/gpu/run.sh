#!/usr/bin/env bash
# Measures trainings on this machine's GPU, without network: see README.md.
#
#     tests/gpu/run.sh [--wheels FOLDER] [--out FOLDER] [--seconds 330] [--tiny] [--only NAME ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
wheels='' out=build/gpu
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_PROGRESS_BARS=1

# Everything that can be missing shows here, in the first half minute.
"$PYTHON" - "${arguments[@]}" <<'PYTHON' || { echo "tests/gpu/run.sh: this machine cannot train; see above" >&2; exit 2; }
import importlib.metadata as packages
import sys
import time

started = time.monotonic()
names = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "pyarrow", "pydantic", "bitsandbytes")
print(", ".join(f"{name} {packages.version(name)}" for name in names), flush=True)
from tests.gpu import product

product.import_all()
import torch

if not torch.cuda.is_available() and "--tiny" not in sys.argv:
    sys.exit(f"torch {torch.__version__} sees no GPU; --tiny tries the script without one")
if torch.cuda.is_available():
    import bitsandbytes

    weights = torch.randn(64, 64, dtype=torch.bfloat16, device="cuda")
    packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
    error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weights).abs().mean().item()
    if not error < 0.2:
        sys.exit(f"bitsandbytes quantises wrongly on this card: mean error {error} of values around 0.8")
print(f"imports and card are fine, {time.monotonic() - started:.1f} s")
PYTHON

"$PYTHON" -m tests.gpu.measure --out "$out" "${arguments[@]}"
