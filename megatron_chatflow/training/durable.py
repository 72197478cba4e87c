"""Files that are there after a power cut, and that can be told from damaged ones. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megatron_chatflow.data.unfinished import sync_folder


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


def seal_file(path: Path, *, durable: bool = True) -> dict[str, int | str]:
    """A file's size and SHA-256, read back from what the system holds now; with `durable` it is on the disk afterwards."""
    with open(path, "rb") as file:
        if durable:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
