#!/usr/bin/env bash
# Collects the wheels that a machine without network needs on top of torch, transformers and accelerate:
#
#     tests/gpu/wheels.sh FOLDER [PYTHON_VERSION] [CUDA_VERSION]      e.g. tests/gpu/wheels.sh build/wheels 3.12 130
#
# Versions are those of constraints.txt. Of bitsandbytes' CUDA libraries only the one for CUDA_VERSION stays (130 is
# CUDA 13.0, torch's "cu130"): 10 MB in all instead of 50.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?where to put the wheels}
python_version=${2:-3.12}
cuda=${3:-130}
PYTHON=${PYTHON:-python3.11}
names=(trl peft datasets dill multiprocess bitsandbytes pydantic pydantic_core annotated-types typing-inspection)
most_bytes=60000000

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder"/*.whl
pins=()
for name in "${names[@]}"; do
    pin=$(grep -E "^$name==" constraints.txt) || { echo "constraints.txt has no version of $name" >&2; exit 2; }
    pins+=("$pin")
done
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
done
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "$python_version" "${platforms[@]}" --dest "$folder" "${pins[@]}"

"$PYTHON" - "$folder" "$cuda" <<'PYTHON'
"""Rewrite the bitsandbytes wheel with the library for one CUDA version (and the one for the CPU)."""
import sys
import zipfile
from pathlib import Path

wheel = next(Path(sys.argv[1]).glob("bitsandbytes-*.whl"))
kept = {"bitsandbytes/libbitsandbytes_cpu.so", f"bitsandbytes/libbitsandbytes_cuda{sys.argv[2]}.so"}
cut = wheel.with_suffix(".cut")
with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(cut, "w", zipfile.ZIP_DEFLATED) as out:
    names = whole.namelist()
    if missing := kept - set(names):
        sys.exit(f"{wheel.name} has no {sorted(missing)[0]}; it has {[n for n in names if n.endswith('.so')]}")
    dropped = {name for name in names if name.endswith(".so")} - kept
    for name in names:
        content = whole.read(name)
        if name.endswith(".dist-info/RECORD"):
            lines = content.decode().splitlines(keepends=True)
            content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
        if name not in dropped:
            out.writestr(whole.getinfo(name), content, zipfile.ZIP_DEFLATED)
cut.replace(wheel)
PYTHON

bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((bytes / 1000000)) MB in $folder"
[ "$bytes" -lt "$most_bytes" ] || { echo "more than $((most_bytes / 1000000)) MB" >&2; exit 1; }
