"""Who holds a lease: a process, identified so that no other is mistaken for it.

Imports no torch.
"""

from __future__ import annotations

import datetime
import getpass
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.utils.user_files import load_json


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease."""

    token: str
    """Unique to the lease."""
    user: str
    host: str
    pid: int
    started: int
    """When the process started, in the kernel's clock ticks: with `pid` it identifies a process."""
    job: str | None
    """SLURM's job number."""
    since: float
    """When the lease was taken, in seconds since 1970."""
    boot: str
    """Which kernel it runs under."""
    namespace: str
    """In which `pid` is a process."""
    locks: bool
    """Whether it could lock the file."""

    @staticmethod
    def this_process(*, locks: bool) -> Holder:
        """This process, as the holder of a new lease."""
        try:
            user = getpass.getuser()
        except (OSError, KeyError):  # a container without a user database
            user = str(os.getuid())
        host, job, pid = socket.gethostname(), os.environ.get("SLURM_JOB_ID"), os.getpid()
        started, token = _process(pid)[0] or 0, uuid.uuid4().hex
        return Holder(token, user, host, pid, started, job, time.time(), *kernel(), locks)

    @property
    def here(self) -> bool:
        """Whether its process can be looked up from here."""
        return (self.boot, self.namespace) == kernel()

    def state(self) -> str | None:
        """The letter of its process's state, as in ps; None where it has ended."""
        started, state = _process(self.pid)
        return state if started == self.started and state not in ("Z", "X") else None

    def __str__(self) -> str:
        """Return what messages call the holder."""
        since = datetime.datetime.fromtimestamp(self.since).astimezone()
        job = f", SLURM job {self.job}" if self.job else ""
        return f"{self.user} on {self.host}, process {self.pid}{job}, since {since:%F %T %Z}"


def read_holder(file: int) -> Holder | None:
    """The record in a lease file; None where it is empty or damaged."""
    try:
        holder = Holder(**load_json(os.read(file, 1 << 16)))
    except (ChatflowError, TypeError):
        return None
    hints = get_type_hints(Holder)
    fits = all(isinstance(getattr(holder, name), hint) for name, hint in hints.items())
    return holder if fits and 0 <= holder.since < 1 << 36 else None


def kernel() -> tuple[str, str]:
    """(which kernel this is since it was booted, the namespace of process numbers)."""
    boot, namespace = socket.gethostname(), ""  # in containers that hide the rest
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return boot, namespace


def _process(pid: int) -> tuple[int | None, str | None]:
    """(start time, state) of a process; None where there is none of this number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None, None
    return int(fields[19]), fields[0].decode()
