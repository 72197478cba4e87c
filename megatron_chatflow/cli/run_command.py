"""Run a command and report its failure: the one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

from megatron_chatflow.distributed.launch import LaunchError, node_name
from megatron_chatflow.errors import EXIT_INTERRUPTED, ChatflowError, SampleError, messages_of
from megatron_chatflow.utils.user_files import visible

_running = ["chatflow"]
"""Names of the commands that run in this process, the innermost last."""


def note(text: str) -> None:
    """Print a line to standard error that begins with the name of the running command."""
    print(f"{_running[-1]}: {text}", file=sys.stderr, flush=True)


def run_command(name: str, work: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    A ChatflowError is printed as one line per message, with its own exit code. Every other
    exception is a bug of this package and passes through: Python prints its traceback and exits
    with code 1.

    Args:
        name: what the messages begin with, e.g. ``chatflow train``.
        work: does the work and returns the exit code.
    """
    _running.append(name)
    try:
        return work()
    except ChatflowError as error:
        place = _place(error, os.environ)
        for message in messages_of(error) if place is not None else ():
            print(f"{visible(name)}{place}: error: {visible(message)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        with suppress(OSError):
            print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        _running.pop()


def _place(error: ChatflowError, env: Mapping[str, str]) -> str | None:
    """Return how this process names itself in a message; None keeps it silent."""
    if isinstance(error, SampleError):
        return ""
    place = _speaker(env)
    if place is None and isinstance(error, LaunchError) and not error.shared:
        return f" on {node_name()}"  # the first process of the node may not exist
    return place


def _speaker(env: Mapping[str, str]) -> str | None:
    """Return "" for the first process, the node for the first one of each further node, else None.

    What is wrong may be wrong on one node only, so the first process cannot speak for all. Without
    a launcher, each process may differ.
    """
    if env.get("RANK", env.get("SLURM_PROCID", "0")) == "0":
        return ""
    launched = "TORCHELASTIC_RUN_ID" in env or "RANK" not in env
    if launched and env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")) != "0":
        return None
    return f" on {node_name(env)}"
