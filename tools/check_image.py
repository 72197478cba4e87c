#!/usr/bin/env python3
"""Checks of the Docker build: keep the libraries of NVIDIA's image, and refuse broken images.

    python tools/check_image.py hold > held.txt     # pip constraints for the image's libraries
    python tools/check_image.py check held.txt      # afterwards: nothing replaced, versions fit

Needs no GPU.
"""

import argparse
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

HELD = ("torch", "numpy", "transformer-engine", "triton", "flash-attn")
"""Distributions that NVIDIA builds for the image and that an install must not replace."""

TRANSFORMER_ENGINE = (Version("2.9"), Version("2.12"))
"""The releases that megatron-core 0.16.1 works with: from the first up to, not including, the
second.
"""


def installed() -> dict[str, str]:
    """Versions of those held distributions that are there."""
    found = {}
    for name in HELD:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def problems(
    before: dict[str, str], now: dict[str, str], transformer_engine: str, have_te: bool
) -> list[str]:
    """What is wrong with an image, one sentence each.

    Args:
        before: held versions as the base image had them.
        now: held versions after the installs.
        transformer_engine: `transformer_engine.__version__`, e.g. `2.9.0+70f53666`.
        have_te: whether megatron-core found Transformer Engine.
    """
    first, end = TRANSFORMER_ENGINE
    found = [
        f"{name} was {old} in the base image and is {now.get(name, 'gone')} now"
        for name, old in before.items()
        if now.get(name) != old
    ]
    if not first <= Version(transformer_engine) < end:
        found.append(
            f"Transformer Engine is {transformer_engine}; megatron-core needs {first} <= "
            f"version < {end}: choose another BASE"
        )
    if not have_te:
        found.append("megatron-core does not find Transformer Engine")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["hold", "check"])
    parser.add_argument("held", nargs="?", help="for check: the file that hold printed")
    arguments = parser.parse_args()
    if arguments.what == "hold":
        print("\n".join(f"{name}=={number}" for name, number in installed().items()))
        return 0
    with open(arguments.held, encoding="utf-8") as file:
        before = dict(line.strip().split("==") for line in file if line.strip())
    engine = (
        import_module("transformer_engine.pytorch")
        and import_module("transformer_engine").__version__
    )
    have_te = import_module("megatron.core.extensions.transformer_engine").HAVE_TE
    for name in ("torch", "numpy", "megatron-core", "megatron-chatflow"):
        print(f"{name} {version(name)}")
    print(f"transformer_engine {engine}")
    found = problems(before, installed(), engine, have_te)
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
