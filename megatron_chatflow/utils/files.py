"""Write files that survive a power cut, and record how to detect damaged ones.

Imports no torch.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_chatflow.errors import ConfigError, RunError

_OF_THE_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_OF_THE_DISK = {
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ENXIO,
    errno.ESTALE,
}
_ATTEMPTS = 1000


class WriteError(RunError):
    """What must be written cannot be written: the disk is full, or fails."""


def unwritable(key: str, path: Path, error: OSError) -> ConfigError | WriteError:
    """Return the error for a file that cannot be written when a run starts.

    Args:
        key: the setting that decides where it is.
        path: what the setting says.
        error: what the system says.
    """
    where = f" {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    what = f"{key} {path}: cannot write{where} ({error.strerror or error})"
    if error.errno in _OF_THE_PATH:
        flag = key.replace("_", "-")
        return ConfigError(f"{what}; give --{flag} a folder that this user can write to")
    return WriteError(f"{what}; free space on the disk, then start the same command again")


@contextmanager
def disk_errors(output: str | Path) -> Iterator[None]:
    """Raise WriteError where the disk or the path of an output refuses what is written inside.

    Any other OSError is a bug of this package and passes unchanged.

    Args:
        output: named in the message where the system names no file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_PATH | _OF_THE_DISK:
            raise
        raise WriteError(
            f"{error.filename or output} cannot be written ({error.strerror}); check the path and "
            f"the space on the disk"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write under another name, flush to disk, then rename.

    A reader sees the old text or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def record_file(path: Path) -> dict[str, int | str]:
    """Flush a file to disk and return its size and SHA-256, read back from what the system has."""
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        return record_open_file(file)


def record_open_file(file: io.FileIO) -> dict[str, int | str]:
    """Return the size and the SHA-256 of an open file."""
    size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it, where there are none; others may remove them meanwhile."""
    for attempt in range(_ATTEMPTS):
        try:
            return os.makedirs(path, exist_ok=True)
        except (FileExistsError, FileNotFoundError):  # it existed a moment ago, or will
            with suppress(FileNotFoundError):  # one look: it may come and go between two
                if stat.S_ISDIR(os.stat(path).st_mode):
                    return None
                raise
            if attempt == _ATTEMPTS - 1:
                raise


def sync_file(file: IO[bytes]) -> None:
    """Flush what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: str | Path) -> None:
    """Flush the names in a folder to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
