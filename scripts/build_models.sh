#!/usr/bin/env bash
# The tutorial's form of demo/build_triton_repository.py: builds a served model anew after its config.pbtxt was edited.
#
#   scripts/build_models.sh --model stable_diffusion_xl [--model-repository DIR] [--timeout SECONDS] [...]
#
# All other flags go to build_triton_repository.py. PYTHON names the interpreter; default: that of .venv, or python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
fi

arguments=() seconds=
while [ $# -gt 0 ]; do
    case $1 in
        --timeout) seconds=${2:?--timeout needs a number of seconds}; shift 2 ;;
        --timeout=*) seconds=${1#*=}; shift ;;
        *) arguments+=("$1"); shift ;;
    esac
done
case $seconds in
    *[!0-9]*) echo "build_models.sh: --timeout is a whole number of seconds, not $seconds." >&2; exit 2 ;;
esac

if [ -z "$seconds" ]; then
    exec "$PYTHON" "$root/demo/build_triton_repository.py" "${arguments[@]}"
fi
code=0
timeout --signal=INT --kill-after=30 "$seconds" "$PYTHON" "$root/demo/build_triton_repository.py" "${arguments[@]}" || code=$?
if [ "$code" -eq 124 ]; then
    echo "build_models.sh: not built within $seconds seconds; what was built is kept, and the next run goes on." >&2
    exit 1
fi
exit "$code"
