"""Files that are there after a power cut, and that can be told from damaged ones. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from pathlib import Path

from megatron_chatflow.config import UsageError
from megatron_chatflow.data.unfinished import sync_folder

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


class WriteError(RuntimeError):
    """What a run must write cannot be written: the disk is full, or fails."""


def unwritable(key: str, path: Path, error: OSError) -> UsageError | WriteError:
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
        return UsageError(f"{what}; give --{flag} a folder that this user can write to")
    return WriteError(f"{what}; free space on the disk, then start the same command again")


def write_atomically(path: Path, text: str) -> None:
    """Write under another name, make it durable, then rename: a reader sees the old text or the new one, never a part."""
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


def seal_file(path: Path) -> dict[str, int | str]:
    """Flush a file to disk and return its size and SHA-256, read back from what the system has."""
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        return seal(file)


def seal(file: io.FileIO) -> dict[str, int | str]:
    """Return the size and the SHA-256 of an open file."""
    size = os.fstat(file.fileno()).st_size
    return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
