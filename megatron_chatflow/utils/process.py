"""Other processes: their state, their signals, and their end with their parent."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HANDLED = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP})
"""Signals that are for a rank, not for the processes that work for it; SLURM sends them to all of a
job's.
"""


@contextmanager
def blocked_signals(signals: frozenset[signal.Signals] = HANDLED) -> Iterator[None]:
    """Block signals inside; they are delivered at the end.

    Processes that are started inside never receive them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent() -> None:
    """Have this process killed when its parent is gone (Linux; elsewhere it does nothing)."""
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(1, signal.SIGKILL, 0, 0, 0)


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal (Linux); one in a debugger does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] == "T"
