#!/usr/bin/env bash
# Sets up an environment (see tools/venv.sh), then runs ruff and the tests.
#
#     bash tests/run.sh                      # all but the slow tests, on two cores, file by file
#     bash tests/run.sh --slow               # all tests, one at a time: slow tests measure
#     bash tests/run.sh tests/data -k packs  # further arguments go to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=../tools/venv.sh
. "$root/tools/venv.sh"
use_environment "$root" requirements-dev.txt

# Transformer Engine's Python, outside the environment (requirements-oracle.txt says why).
oracle="$root/build/oracle"
wanted=$(python -V && cat "$root/requirements-oracle.txt")
if [ "$(cat "$oracle/made-from" 2>/dev/null)" != "$wanted" ]; then
    echo "[setup] installing requirements-oracle.txt into $oracle"
    rm -rf "$oracle"
    if python -m pip install --quiet --disable-pip-version-check --no-deps --target "$oracle" \
        -r "$root/requirements-oracle.txt"; then
        printf '%s\n' "$wanted" >"$oracle/made-from"
    elif [ -n "${CI:-}" ]; then
        exit 1
    else
        rm -rf "$oracle"
        echo "[setup] that failed: skipping the tests against Transformer Engine's Python"
    fi
fi

options=(-n 2 --dist loadfile) # pyproject.toml excludes the slow tests
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then options=(-m ""); else arguments+=("$argument"); fi
done

cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests start several processes per core
echo "[tests] ruff check, ruff format --check"
python -m ruff check .
python -m ruff format --check .
echo "[tests] pytest"
exec python -m pytest "${options[@]}" "${arguments[@]}"
