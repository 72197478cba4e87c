"""The command line: ``python -m megatron_chatflow <command>``, installed also as ``chatflow``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from megatron_chatflow import __version__

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

EXIT_INTERRUPTED = 130
"""Exit code at Ctrl-C, as shells have it."""
EXIT_USAGE = 2
"""Exit code where what the user wrote cannot be used."""


def usage() -> str:
    """The text of ``chatflow --help``."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return f"""usage: chatflow <command> [flags]     (or: python -m megatron_chatflow <command> [flags])

{rows}

`chatflow <command> --help` tells a command's flags. A first run: bash examples/quickstart/run.sh
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 what was written cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if words else EXIT_USAGE
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    from megatron_chatflow.config import nearest
    from megatron_chatflow.distributed.launch import LaunchError, node_name
    from megatron_chatflow.errors import ChatflowError, ConfigError, SampleError, messages_of
    from megatron_chatflow.utils.user_files import visible

    try:
        if words[0] not in COMMANDS:
            raise ConfigError(
                f"unknown command "
                f"{words[0]!r}{nearest(words[0], COMMANDS) or '; the commands are ' + ', '.join(COMMANDS)}"
            )
        return importlib.import_module(f"megatron_chatflow.cli.{words[0]}").main(words[1:])
    except LaunchError as error:
        where = _speaker(os.environ)
        if where is None and not error.shared:  # the first process of the node may not be there
            where = f" on {node_name()}"
        if where is not None:
            print(f"chatflow {words[0]}{where}: error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except SampleError as error:
        print(f"chatflow {words[0]}: error: {visible(str(error))}", file=sys.stderr)
        return 1
    except ChatflowError as error:
        where = _speaker(os.environ)
        if where is not None:
            for message in messages_of(error):
                print(
                    f"chatflow {visible(words[0])}{where}: error: {visible(message)}",
                    file=sys.stderr,
                )
        return EXIT_USAGE
    except KeyboardInterrupt:
        with suppress(OSError):
            print(f"chatflow {words[0]}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _speaker(env: Mapping[str, str]) -> str | None:
    """How a process names itself in an error: the first one not at all, one of each further node by
    the node; None keeps the others silent.

    What is wrong may be wrong on one node only, so the first process cannot speak for all. Where no
    launcher started them, each may differ.
    """
    if env.get("RANK", env.get("SLURM_PROCID", "0")) == "0":
        return ""
    launched = "TORCHELASTIC_RUN_ID" in env or "RANK" not in env
    if launched and env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) != "0":
        return None
    from megatron_chatflow.distributed.launch import node_name

    return f" on {node_name(env)}"


if __name__ == "__main__":
    sys.exit(main())
