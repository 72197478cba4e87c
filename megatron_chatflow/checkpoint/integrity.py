"""manifest.json of a checkpoint: the size and SHA-256 of every file in it, and of itself.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import ChatflowError, CheckpointError
from megatron_chatflow.utils.files import record_file, record_open_file, write_atomically
from megatron_chatflow.utils.user_files import load_json, open_inside

NAME = "manifest.json"
FileRecords = Mapping[str, Mapping[str, Any]]
"""{file name: {"bytes", "sha256"}}."""


REQUIRED = (".metadata", "common.pt", "metadata.json", "state.json")
"""What every checkpoint has next to its shards."""


def write_manifest(folder: Path, records: FileRecords) -> None:
    """Write the manifest of a checkpoint folder.

    `records` are those of all its files, made where the files were written.
    """
    write_atomically(folder / NAME, _render(records))


def record_files(folder: Path) -> FileRecords:
    """The records of all files that are in a folder, taken now."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {name: record_file(folder / name) for name in names if name != NAME}


def check_files(folder: Path, records: FileRecords) -> None:
    """Raise CheckpointError unless a folder's files are exactly `records`, by name and size."""
    there = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    there.pop(NAME, None)
    for name, wanted in records.items():
        if name not in there:
            raise CheckpointError(f"{name} was written and is not there")
        if there[name] != wanted["bytes"]:
            raise CheckpointError(
                f"{name} has {there[name]} bytes, and {wanted['bytes']} were written"
            )
    if unknown := sorted(set(there) - set(records)):
        raise CheckpointError(f"{unknown[0]} was not written by this run")


def read_manifest(folder: Path) -> FileRecords | None:
    """Return the records of a checkpoint's files; None without a manifest (version 0.1.0).

    Raises ChatflowError for a damaged manifest.
    """
    try:
        with open_inside(folder, NAME) as file:
            text = file.read().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(str(error)) from None
    content = load_json(text)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or text != _render(files):
        raise CheckpointError("its content is not what was written")
    for name, entry in files.items():
        if type(entry) is not dict or type(entry.get("bytes")) is not int:
            raise CheckpointError(f"{name!r:.100} has no size")
    return files


def _was_sealed(folder: Path) -> bool:
    try:
        state = load_json((folder / "state.json").read_bytes())
    except (OSError, ChatflowError):
        return True  # a state that cannot be read is damage enough
    return not isinstance(state, dict) or bool(state.get("sealed"))


def _render(files: FileRecords) -> str:
    body = json.dumps(files, indent=1, sort_keys=True)
    return (
        json.dumps(
            {"version": 1, "sha256": hashlib.sha256(body.encode()).hexdigest(), "files": files},
            indent=1,
            sort_keys=True,
        )
        + "\n"
    )


def damage_at_first_sight(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint by sizes and the content of small files, or None."""
    return damage(folder, lambda name, size: size < 1 << 20)


def damage(folder: Path, read: Any) -> str | None:
    """What is wrong with a checkpoint; None where nothing is, or where it never had a manifest.

    Args:
        folder: the checkpoint.
        read: (file name, bytes) -> whether to read that file and compare its SHA-256; the sizes of
        all are compared.
    """
    try:
        records = read_manifest(folder)
    except (OSError, ChatflowError) as error:
        return f"{NAME} is damaged ({error})"
    if records is None and _was_sealed(folder):
        return f"{NAME} is missing"
    for name, wanted in (records or {}).items():
        try:
            with open_inside(folder, name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != wanted["bytes"]:
                    return f"{name} has {size} bytes instead of {wanted['bytes']}"
                if read(name, size) and record_open_file(file) != wanted:
                    return f"{name} is not what was written (SHA-256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ChatflowError as error:
            return f"{NAME} is damaged ({error})"
    for name in REQUIRED:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if records is not None and name not in records:
            return f"{NAME} does not list {name}"
    return None
