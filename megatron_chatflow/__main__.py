"""The command line: ``python -m megatron_chatflow <command>``, installed also as ``chatflow``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_chatflow import __version__
from megatron_chatflow.errors import EXIT_USAGE, ConfigError

COMMANDS = {
    "train": "train a model, or go on training it",
    "plan": "the curriculum as a table: shares, samples, tokens, epochs; and as a plot",
    "locate": "which documents a sample or an iteration holds, and their text",
    "evaluate": "a checkpoint's held-out loss and bits per byte on each domain",
    "generate": "text from a checkpoint",
    "doctor": "what this machine can run, with the reason for each answer",
    "preflight": "a cluster configuration checked without the cluster",
    "submit": "a run as a SLURM job: the script written, checked and queued",
}


def usage() -> str:
    """The text of ``chatflow --help``."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"""usage: chatflow <command> [flags]     (or: python -m megatron_chatflow <command> [flags])

{rows}

`chatflow <command> --help` tells a command's flags. A first run: bash examples/quickstart/run.sh
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 the settings cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    from megatron_chatflow.cli.run_command import run_command
    from megatron_chatflow.config import nearest

    def work() -> int:
        if words[0] not in COMMANDS:
            others = nearest(words[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {words[0]!r}{others}")
        return importlib.import_module(f"megatron_chatflow.cli.{words[0]}").main(words[1:])

    return run_command(f"chatflow {words[0]}", work)


if __name__ == "__main__":
    sys.exit(main())
