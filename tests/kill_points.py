"""Kill a process at its n-th file operation below a folder, as a power switch would.

Operations are counted in the process that calls `kill_at` and in those that it forks: opening a
file for writing, fsync, mkdir, rename and replace, remove and rmdir. Nothing of the product is
replaced: the counting is an audit hook and a wrapper of os.fsync.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

_EVENTS = {
    "open": "open",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
}


def kill_at(folder: Path, number: int, note: Path, only: str = "") -> None:
    """Kill the process with SIGKILL right before its `number`-th operation below `folder` (from 1).

    Args:
        folder: where operations count.
        number: which of them; those of child processes that are forked later count, too, and kill
            the child that comes to it.
        note: a file, outside of `folder`, that gets the operation's kind and path.
        only: count operations of this kind alone; all kinds where it is empty.
    """
    below, count = os.path.abspath(folder), multiprocessing.RawValue("l", 0)
    inner = [False]

    def happens(kind: str, path: str) -> None:
        if only and kind != only:
            return
        count.value += 1  # shared, without a lock that a killed process would leave behind
        if count.value == number:
            inner[0] = True
            note.write_text(f"{kind} {os.path.relpath(path, below)}\n", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        kind = _EVENTS.get(event)
        if kind is None or inner[0]:
            return
        if kind == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        path = arguments[1] if kind == "rename" else arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(path))
            if path == below or path.startswith(below + os.sep):
                happens(kind, path)

    fsync = os.fsync

    def counted_fsync(handle: int | object) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = os.readlink(f"/proc/self/fd/{number}")
        if path == below or path.startswith(below + os.sep):
            happens("fsync", path)
        fsync(number)

    os.fsync = counted_fsync
    sys.addaudithook(hook)
