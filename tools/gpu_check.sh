#!/bin/sh
# Everything that takes a GPU, in one command and without a network: see benchmarks/gpu_check.py --help.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check.sh: no Python; set PYTHON." >&2; exit 2; }
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
