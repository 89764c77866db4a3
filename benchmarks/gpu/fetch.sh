#!/usr/bin/env bash
# Fills .gpu/ (ignored by git) with what a machine with one NVIDIA GPU, torch 2.11 (CUDA 13),
# Python 3.12 and no network needs beside the checkout: wheels, preference pairs, the commit.
#     bash benchmarks/gpu/fetch.sh PAIRS.jsonl
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ -f "${1:-}" ] || { echo "usage: bash benchmarks/gpu/fetch.sh PAIRS.jsonl (hh-rlhf's format)" >&2; exit 2; }
python=${PYTHON:-python3}
root=$here/../..
to=$root/.gpu
mkdir -p "$to/whl"
rm -f "$to"/whl/*.whl # one version of each
cp "$1" "$to/pairs.jsonl"
git -C "$root" describe --always --dirty --exclude='*' > "$to/commit"

pinned() { # NAME [VERSION where constraints.txt has none]
    local version
    version=$(sed -n "s/^$1==//p" "$root/constraints.txt")
    echo "$1==${version:-$2}"
}
download() {
    "$python" -m pip --disable-pip-version-check download --quiet --no-deps \
        --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$@"
}
download "$to/whl" $(for name in transformers pydantic pydantic_core annotated-types \
    typing-inspection typing_extensions omegaconf trl datasets dill multiprocess rich detect-secrets torchao; do
    pinned "$name"
done) "$(pinned liger-kernel 0.8.5)"

# bitsandbytes is 41 MiB for a dozen devices: its libraries for CUDA 13.0 and CPUs are kept.
whole=$(mktemp -d)
trap 'rm -rf "$whole"' EXIT
download "$whole" "$(pinned bitsandbytes 0.50.2)"
"$python" - "$whole" "$to/whl" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

KEPT = ("_cuda130.so", "_cpu.so")
(source,) = Path(sys.argv[1]).glob("*.whl")
target = Path(sys.argv[2], source.name)
with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as part:
    for name in whole.namelist():
        if name.endswith(".so") and not name.endswith(KEPT):
            continue
        data = whole.read(name)
        if name.endswith(".dist-info/RECORD"):
            rows = data.decode().splitlines(keepends=True)
            names = [row.split(",")[0] for row in rows]
            kept = [not name.endswith(".so") or name.endswith(KEPT) for name in names]
            data = "".join(row for row, keep in zip(rows, kept, strict=True) if keep).encode()
        part.writestr(name, data)
PYTHON
du -sk "$to" | awk '{printf "%.1f MiB in .gpu\n", $1 / 1024}'
