"""An exclusive lease on a folder: at most one process writes into it. Imports no torch.

    FOLDER/lease-<n>.json    who holds the folder; locked (flock) as long as the holder lives

The kernel's lock decides where it can. For file systems whose locks do not work, or not across
nodes, the file names the holder (user, host, process, SLURM job), and its modification time, set
every `BEAT` seconds from the file system's clock, is the heartbeat. A holder is dead when

- its lock is free and it ran under this kernel, or its process is gone; or
- it ran elsewhere, its heartbeat is older than `DEAD` seconds by the file system's clock, and does
  not change while it is watched for `WATCH` seconds.

The number in the name makes takeovers exclusive without any lock: who finds lease n dead creates
lease n + 1, which only one process can, and removes n. A holder whose file is gone or outnumbered
has lost its lease.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import fcntl
import json
import logging
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.checkpoint.lease_holder import Holder, kernel, read_holder
from megatron_chatflow.errors import ConfigError, RunError
from megatron_chatflow.utils.files import make_folder

BEAT = 5.0
"""Seconds between two heartbeats."""
DEAD = 60.0
"""Age in seconds from which a heartbeat of another machine counts as old."""
WATCH = 15.0
"""Seconds for which an old heartbeat is watched before its lease is taken over."""
PATIENCE = 10.0
"""Seconds in which a lock must become free whose holder's process has ended."""

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


class LeaseLostError(RunError):
    """The folder is no longer this run's: its lease was taken over or removed."""


@dataclass(frozen=True)
class _Seen:
    """What a lease file looks like at one time."""

    holder: Holder | None
    """None where the file is still empty, or damaged."""
    locked: bool | None
    """None on a file system without locks."""
    beat: int
    """Modification time in ns."""


class Lease:
    """The lease of one folder. `acquire` takes it; leaving the `with` block gives it back."""

    def __init__(self, folder: Path, setting: str = "save", prefix: Path | None = None) -> None:
        """Takes nothing yet.

        Args:
            folder: what is leased.
            setting: the setting that names the folder, for messages.
            prefix: of the lease's files, where they cannot be in the folder itself.
        """
        self.folder, self._setting = folder, setting
        self._prefix = folder / "lease" if prefix is None else prefix
        self._made: list[Path] = []
        self._file: int | None = None
        self._path, self._number = folder, 0
        self._holder: Holder | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None

    @classmethod
    def next_to(cls, folder: Path, setting: str) -> Lease:
        """The lease of a folder that is made, or replaced, as one: its files are FOLDER.lease-*."""
        place = Path(os.path.abspath(folder))
        return cls(folder, setting, place.with_name(place.name + ".lease"))

    def __enter__(self) -> Lease:
        """Return the lease, not yet acquired."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lease back."""
        self.release()

    @property
    def lost(self) -> bool:
        """Whether this process held the lease and was found to have lost it."""
        return self._lost is not None

    def acquire(self) -> None:
        """Make the folder if it does not exist, and take its lease.

        Logs a line if it must first wait to see whether an earlier holder is alive.

        Raises:
            ConfigError: a living process holds it; the message names it.
            OSError: the folder cannot be written.
        """
        while not self._take():
            pass
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that this process still holds the lease. To be called before it publishes.

        Raises:
            LeaseLostError: it does not.
            OSError: the file system does not answer, so it is not known.
        """
        if self._lost is None:
            newest = _newest(self._prefix)
            if newest is None or newest == self._number and not self._is_mine():
                self._lost = f"its lease {self._path.name} was removed"
            elif newest != self._number:
                taker = _look(_path(self._prefix, newest))
                by = f" by {taker.holder}" if taker and taker.holder else ""
                self._lost = f"its lease was taken over{by}"
        if self._lost is not None:
            raise LeaseLostError(
                f"{self._setting} {self.folder}: this run no longer holds the folder: "
                f"{self._lost}; it publishes nothing more, end the other run before resuming this"
            )

    def holds(self) -> bool:
        """Whether this process still holds the lease, as far as the file system answers."""
        try:
            self.check()
        except LeaseLostError:
            return False
        except OSError:
            pass
        return True

    def release(self) -> None:
        """Give the lease back; without one do nothing."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._file is not None:
            with suppress(OSError):
                if self.holds():
                    self._path.unlink()
            os.close(self._file)
            self._file = None
        for folder in reversed(self._made):  # stay only if something was written into them
            with suppress(OSError):
                folder.rmdir()
        self._made = []

    def _take(self) -> bool:
        """Whether the lease was taken; False where another process was faster, to look again."""
        self._make_folder()
        old, token = _newest(self._prefix), None
        if old is not None:
            dead = self._wait_for_end(_path(self._prefix, old))
            if dead is None:
                return False
            token = dead.holder and dead.holder.token
        self._number = 1 + (old or 0)
        self._path = _path(self._prefix, self._number)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileExistsError, FileNotFoundError):  # another is faster, or removed the folder
            return False
        try:
            self._write(self._file)
            if old is None:
                return self._confirm()
            left = _look(_path(self._prefix, old))
            if left is None or (left.holder and left.holder.token) != token:
                self._withdraw()  # the lease that was found dead is a living one's by now
                return False
            return self._confirm()
        except BaseException:
            self._withdraw()
            raise

    def _write(self, file: int) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locks = True
                break
            except BlockingIOError:  # another process just looks whether it is locked
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locks = False
                break
        self._holder = Holder.this_process(locks=locks)
        os.write(file, json.dumps(dataclasses.asdict(self._holder), indent=1).encode())
        os.fsync(file)

    def _confirm(self) -> bool:
        """Whether the new lease is the newest; then older ones are removed."""
        if _newest(self._prefix) != self._number or not self._is_mine():
            self._withdraw()
            return False
        for number in _numbers(self._prefix):
            if number < self._number:
                with suppress(OSError):
                    _path(self._prefix, number).unlink()
        return True

    def _withdraw(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _make_folder(self) -> None:
        where = self._prefix.parent
        missing = [path for path in (where, *where.parents) if not path.exists()]
        make_folder(where)
        self._made = list(dict.fromkeys([*self._made, *reversed(missing)]))

    def _is_mine(self) -> bool:
        try:
            token = json.loads(self._path.read_bytes())["token"]
            return self._holder is not None and token == self._holder.token
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False
        except OSError as error:
            if error.errno == errno.ESTALE:
                return False
            raise

    def _renew(self) -> None:
        """The thread: a heartbeat every few seconds, as long as the lease is held."""
        while not self._closed.wait(BEAT):
            if not self.holds():
                return
            with suppress(OSError):  # tried again; a save checks for itself
                if self._file is not None:
                    os.utime(self._file)

    def _wait_for_end(self, path: Path) -> _Seen | None:
        """Wait until it is known that the holder is dead; None where its file is gone by then.

        Raises ConfigError where it lives.
        """
        begin, first, reported = time.monotonic(), None, False
        while (seen := _look(path)) is not None:
            watched, holder = time.monotonic() - begin, seen.holder
            here = holder if holder is not None and holder.here else None
            first = first or seen
            changed = (seen.beat, holder) != (first.beat, first.holder)
            if seen.locked:
                # A holder that has just ended may keep its lock for a moment.
                if (here and here.state()) or (holder and changed) or watched > PATIENCE:
                    raise self._held(seen)
            elif holder and holder.boot == kernel()[0] and holder.locks and seen.locked is False:
                return seen
            elif here:
                if here.state():
                    raise self._held(seen)
                return seen
            elif changed:
                if holder is not None:
                    raise self._held(seen)
                first = seen
            else:
                age = (_now(self._prefix.parent) - seen.beat) / 1e9
                if watched >= WATCH and (age > DEAD or watched >= DEAD):
                    return seen
                if watched > 1 and not reported:
                    logger.info(
                        f"{self._setting} {self.folder}: held by {holder or 'another process'}; "
                        f"its last heartbeat is {max(0.0, age):.0f} s old; waiting up to "
                        f"{DEAD:.0f} s for another"
                    )
                    reported = True
            time.sleep(0.2)
        return None

    def _held(self, seen: _Seen) -> ConfigError:
        holder = seen.holder
        state = (holder.state() or "ended") if holder is not None and holder.here else None
        if state == "ended":
            note = "the process has ended, but its lock is still held"
        elif holder is not None and state in ("T", "t"):
            note = f"the process is stopped, `kill -CONT {holder.pid}` resumes it"
        else:
            beat = datetime.datetime.fromtimestamp(seen.beat / 1e9).astimezone()
            note = f"last heartbeat at {beat:%F %T %Z}"
        return ConfigError(
            f"{self._setting} {self.folder}: another process writes there: "
            f"{holder or 'a process that has not yet written its name'} ({note}); "
            f"wait until it ends, stop it, or give --{self._setting} another folder"
        )


def _path(prefix: Path, number: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{number}.json")


def _numbers(prefix: Path) -> list[int]:
    """The leases of a prefix."""
    name = re.compile(re.escape(prefix.name) + r"-(\d{1,18})\.json", re.ASCII)
    found = (name.fullmatch(entry) for entry in os.listdir(prefix.parent))
    return [int(match[1]) for match in found if match]


def _newest(prefix: Path) -> int | None:
    try:
        return max(_numbers(prefix), default=None)
    except FileNotFoundError:
        return None


def _look(path: Path) -> _Seen | None:
    """What is known of a lease; None where it does not exist."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        locked: bool | None = False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given up when the file is closed
        except BlockingIOError:
            locked = True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = None
        return _Seen(read_holder(file), locked, os.fstat(file).st_mtime_ns)
    finally:
        os.close(file)


def _now(folder: Path) -> int:
    """The time in ns by the file system's clock, which may be a server's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lease-clock-") as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime_ns
