"""The installed packages, compared with the bounds that this project names, without imports."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from megatron_chatflow import __version__
from megatron_chatflow.cli.diagnostics import Row

_NEED = {
    "psutil": "a checkpoint save hangs without it",
    "transformer-engine": "needed for FP8 and for fast layers on CUDA only",
}


def versions() -> dict[str, str]:
    """Return {distribution: version or "missing"} of this project and of all that it needs."""
    found = {"megatron_chatflow": __version__, "python": platform.python_version()}
    return found | {name: _installed(name) or "missing" for name in _bounds()}


def packages() -> list[Row]:
    """Return a row per package; wrong where it is missing or out of bounds."""
    rows = [
        Row("megatron_chatflow", __version__),
        Row("python", platform.python_version(), sys.executable),
    ]
    return rows + [_row(name, bounds) for name, bounds in _bounds().items()]


def _bounds() -> dict[str, str]:
    """Return {distribution: bounds, e.g. "==0.16.1"}, the most important ones first.

    Bounds are empty where this project is not installed.
    """
    from packaging.requirements import Requirement

    first = {"megatron-core": "", "torch": "", "transformer-engine": "", "numpy": "", "psutil": ""}
    try:
        wanted = [Requirement(line) for line in requires("megatron-chatflow") or ()]
    except PackageNotFoundError:
        return first
    return first | {r.name: str(r.specifier) for r in wanted if r.marker is None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _row(name: str, bounds: str) -> Row:
    from packaging.specifiers import SpecifierSet

    number = _installed(name)
    if number is None:
        return Row(
            name,
            "missing",
            _NEED.get(name, "pip install -r requirements.txt"),
            wrong=name != "transformer-engine",
        )
    fits = SpecifierSet(bounds).contains(number, prereleases=True)
    return Row(
        name,
        number,
        "" if fits else f"this project needs {bounds}: pip install '{name}{bounds}'",
        wrong=not fits,
    )
