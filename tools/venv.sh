# shellcheck shell=bash
# Sourced by tests/run.sh and examples/quickstart/run.sh:
#
#     . "$root/tools/venv.sh"
#     use_environment "$root" requirements.txt
#
# Afterwards `python` is one in which the project and everything that the requirements file names are installed. A virtual environment that is active already and
# holds all that is used as it is. Otherwise it is $root/.venv, made when there is none and brought up to date when the requirements have changed since.

# Prints the first command that is Python 3.11 or newer. PYTHON=/path/to/python names one.
find_python() {
    local candidate check='import sys; sys.exit(sys.version_info < (3, 11))'
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python; do
        if "$candidate" -c "$check" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "[setup] Python 3.11 or newer is needed and none was found (python3 is $(python3 --version 2>&1 || true)); install one or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# Whether the packages that a requirements file names are installed for a python, in these very versions.
satisfies() {
    "$1" - "$2" >/dev/null 2>&1 <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement


def requirements(path):
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            yield from requirements(path.parent / line[3:].strip())
        elif line:
            yield Requirement(line)


wanted = [r for r in requirements(Path(sys.argv[1])) if r.marker is None or r.marker.evaluate()]
sys.exit(not all(r.specifier.contains(version(r.name), prereleases=True) for r in wanted))
PYTHON
}

# What an up-to-date .venv was made from: the place (scripts in it name it), the Python, and the files that say what belongs in it.
describe_environment() {
    "$1" - "$2" "$3" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

root = Path(sys.argv[1])
files = sorted({"requirements.txt", "pyproject.toml", "setup.py", sys.argv[2]})
digest = hashlib.sha256(b"".join((root / name).read_bytes() for name in files)).hexdigest()
print(root, sys.version.split()[0], sys.argv[2], digest)
PYTHON
}

use_environment() {
    local root=$1 requirements=$2 venv="$1/.venv" stamp="$1/.venv/made-from-$2" python
    if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$venv" ]; then
        if satisfies "$VIRTUAL_ENV/bin/python" "$root/$requirements"; then
            echo "[setup] using the active environment $VIRTUAL_ENV, which has what $requirements names"
            export PATH="$VIRTUAL_ENV/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
            return
        fi
        echo "[setup] the active environment $VIRTUAL_ENV lacks some of $requirements and is left alone; using $venv"
    fi
    if ! { [ -f "$stamp" ] && [ "$(describe_environment "$venv/bin/python" "$root" "$requirements" 2>/dev/null)" = "$(cat "$stamp")" ]; }; then
        python=$(find_python) || return 1
        if ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1 || [ "$(cat "$venv/made-at" 2>/dev/null)" != "$root" ]; then
            echo "[setup] making a virtual environment with $("$python" --version 2>&1) in $venv"
            "$python" -m venv --clear "$venv" || { echo "[setup] $python cannot make virtual environments; on Debian and Ubuntu install python3-venv" >&2; return 1; }
            printf '%s\n' "$root" >"$venv/made-at"
        fi
        echo "[setup] installing the project and $requirements into $venv (the first time this takes minutes)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --prefer-binary --no-compile -r "$root/$requirements" || return 1
        "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" || true # on all cores, where pip takes one; a package's templates may not be Python
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable "$root" || return 1
        describe_environment "$venv/bin/python" "$root" "$requirements" >"$stamp"
    fi
    unset PYTHONHOME
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    echo "[setup] using $venv"
}
