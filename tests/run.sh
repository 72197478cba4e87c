#!/usr/bin/env bash
# Sets up an environment (see tools/venv.sh), then runs ruff and the tests.
#
#     bash tests/run.sh                      # everything but the tests marked slow, a file at a time on each of two cores
#     bash tests/run.sh --slow               # everything, one test at a time: slow tests measure
#     bash tests/run.sh tests/data -k packs  # what follows goes to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt

# What the FP8 reference is held against, apart from the environment (requirements-oracle.txt says why).
oracle="$root/build/oracle"
wanted=$(python -V && cat "$root/requirements-oracle.txt")
if [ "$(cat "$oracle/made-from" 2>/dev/null)" != "$wanted" ]; then
    echo "[setup] installing requirements-oracle.txt into $oracle"
    rm -rf "$oracle"
    if python -m pip install --quiet --disable-pip-version-check --no-deps --target "$oracle" -r "$root/requirements-oracle.txt"; then
        printf '%s\n' "$wanted" >"$oracle/made-from"
    elif [ -n "${CI:-}" ]; then
        exit 1
    else
        rm -rf "$oracle"
        echo "[setup] that failed: the tests against Transformer Engine's Python will be skipped"
    fi
fi

marks=(-m "not slow" -n 2 --dist loadfile)
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then marks=(); else arguments+=("$argument"); fi
done

cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests start several processes a core
echo "[tests] ruff check"
python -m ruff check .
echo "[tests] pytest"
exec python -m pytest "${marks[@]}" "${arguments[@]}"
