#!/usr/bin/env bash
# In the root of the checkout: bash benchmarks/gpu/check.sh first|second|all [--seconds N] [--dry-run]
# On the machine with the GPU it installs the wheels of .gpu/ beside the machine's own packages.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export STARTED=$(date +%s)
python=${PYTHON:-python3}
case " $* " in
*" --dry-run "*) ;;
*)
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$here"/../../.gpu/whl/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    ;;
esac
exec "$python" -u "$here/check.py" "$@"
