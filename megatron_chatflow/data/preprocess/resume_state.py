"""The folder of an unfinished run: what was written so far, and how far that is.

    <first corpus>.unfinished/
      lock           held by the process that writes
      state.json     how far everything was at the last flush to disk; replaced atomically
      <corpus>.*     token files, then what will be the corpus

A run that succeeds moves its corpora to their places and removes the folder. One that is killed
leaves it, and another run can resume from the state.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_chatflow.data.corpus.manifest import manifest_path
from megatron_chatflow.data.preprocess.input_files import Chunk, InputSource
from megatron_chatflow.data.preprocess.token_files import CorpusCounts
from megatron_chatflow.errors import ChatflowError, DataError
from megatron_chatflow.utils.files import make_folder, sync_folder, write_atomically
from megatron_chatflow.utils.user_files import load_json, read_text

_STATE = "state.json"
_COMPLETE = "whole"
"""Name of `ResumeState.complete` in the file."""


class InputChanged(DataError):
    """An input is not what the unfinished run read."""


@dataclass(frozen=True)
class InputPosition:
    """How far the input was read.

    Attributes:
        source: number of the source; the number of sources when all are read.
        next: number of its first record that was not read.
        checksum: of what was read of it (`Chunk.checksum`); empty before its first chunk.
    """

    source: int = 0
    next: int = 1
    checksum: str = ""


@dataclass
class ResumeState:
    """How far a run is.

    Attributes:
        run: what decides the output; by flag.
        place: how far the input was read.
        read: of each source that was read to its end, its size, its sha256 and when it was last
            modified.
        records: records of each source, malformed ones included.
        malformed: malformed records of each source.
        too_long: those of them that are longer than `--max-document-bytes`.
        empty: documents that encode to nothing, of each source.
        ignored: of each source, how many records have each key that nothing reads.
        shown: description of the first malformed records.
        counts: what each corpus holds, by its key.
        complete: whether the corpora are complete, and only need to be moved to their places.
    """

    run: dict[str, Any]
    place: InputPosition = InputPosition()
    read: list[dict[str, Any]] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    malformed: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    ignored: list[dict[str, int]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    counts: dict[str, CorpusCounts] = field(default_factory=dict)
    complete: bool = False


@contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Make the folder and hold its lock; at the end remove it unless it holds a state.

    Raises:
        DataError: another process holds the lock.
    """
    with _made(os.path.dirname(folder)), _lock(folder):
        try:
            yield
        finally:
            if not has_state(folder):
                _remove(folder)


def _remove(folder: str) -> None:
    """Remove the folder, its lock last: then another process may make it again."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif name != "lock":
            os.unlink(path)
    os.unlink(os.path.join(folder, "lock"))
    with suppress(OSError):
        os.rmdir(folder)


def _lock(folder: str) -> BinaryIO:
    """Make the folder if there is none, and lock it until the returned file is closed."""
    path = os.path.join(folder, "lock")
    while True:
        make_folder(folder)
        try:
            file = open(path, "a+b")  # noqa: SIM115 (closed by the caller)
        except FileNotFoundError:  # the process that had the folder has just removed it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).decode(errors="replace")
            file.close()
            raise DataError(
                f"another process{who and f' ({who})'} is writing into {folder}: "
                "wait for it, or give another --output-prefix"
            ) from None
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):  # else it was removed before it was locked
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    file.truncate(0)
    file.write(f"{socket.gethostname()}, process {os.getpid()}".encode())
    file.flush()
    return file


@contextmanager
def _made(folder: str) -> Iterator[None]:
    """Make a folder; remove it after an error if nothing is left in it."""
    if not folder or os.path.isdir(folder):
        yield
        return
    os.makedirs(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.rmdir(folder)
        raise


def has_state(folder: str) -> bool:
    """Return whether a run left a state to resume from."""
    return os.path.exists(os.path.join(folder, _STATE))


def load_state(folder: str, run: dict[str, Any]) -> ResumeState:
    """Read how far an earlier run came.

    Args:
        folder: of the run.
        run: what decides the output of this run.

    Raises:
        DataError: the state is damaged, or the run was another one; the message names both fixes.
    """
    fix = f"or delete {folder} to start over"
    try:
        content = load_json(read_text(os.path.join(folder, _STATE)))
        content["complete"] = content[_COMPLETE]
        del content[_COMPLETE]
        content["place"] = InputPosition(**content["place"])
        content["counts"] = {
            key: CorpusCounts(**counts) for key, counts in content["counts"].items()
        }
        state = ResumeState(**content)
    except (ChatflowError, TypeError, KeyError) as error:
        raise DataError(
            f"--resume: {folder}/{_STATE} is damaged ({error}): restore it, {fix}"
        ) from error
    for name in {**state.run, **run}:
        before, now = state.run.get(name), run.get(name)
        if before != now:
            raise DataError(
                f"--resume: the unfinished run in {folder} had another {name} "
                f"({_shown(before)}, now {_shown(now)}): restore it, {fix}"
            )
    return state


def save_state(folder: str, state: ResumeState) -> None:
    """Replace the state atomically and flush it to disk.

    What it describes must be on the disk already.
    """
    content = dataclasses.asdict(state)
    content[_COMPLETE] = content.pop("complete")
    text = json.dumps(content, ensure_ascii=False)
    write_atomically(Path(folder, _STATE), text)


def discard_state(folder: str) -> None:
    """Give the run up: `locked_folder` then removes the folder."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, _STATE))


def publish_corpus(path: str, prefix: str) -> None:
    """Move a complete corpus to its place, `.idx` last; an earlier call may have been interrupted.

    Files of an older corpus of this name are removed.

    Args:
        path: `<path>.bin`, `.json` and `.idx` are the corpus; they are on the disk.
        prefix: its place.
    """
    if os.path.exists(path + ".bin"):
        for stale in (prefix + ".idx", manifest_path(prefix)):
            with suppress(FileNotFoundError):
                os.unlink(stale)
    for suffix in (".bin", ".json", ".idx"):
        with suppress(FileNotFoundError):
            os.replace(path + suffix, prefix + suffix)
    sync_folder(os.path.dirname(prefix) or ".")


def skip_source(source: InputSource, read: dict[str, Any], chunk_size: int) -> None:
    """Skip a source that was read to its end; compare its content if it was modified since."""
    if source.modified is not None and source.modified == read["modified"]:
        return
    for _ in source.chunks(chunk_size):
        pass
    if source.sha256() != read["sha256"]:
        raise _changed(source)


def rest_of_source(
    source: InputSource, place: InputPosition, columns: list[str] | None, chunk_size: int
) -> Iterator[Chunk]:
    """Yield the chunks of a source from a position on.

    What comes before is read, and compared by its checksum.
    """
    chunks = source.chunks(chunk_size, columns)
    seen, unread = "", None
    for chunk in chunks:
        if chunk.next > place.next:
            unread = chunk
            break
        seen = chunk.checksum
    if seen != place.checksum or (unread is not None and unread.first != place.next):
        raise _changed(source)
    if unread is not None:
        yield unread
        yield from chunks


def _changed(source: InputSource) -> InputChanged:
    return InputChanged(
        f"--resume: {source.name} is not what the unfinished run read: restore it, or "
        f"delete the unfinished run to start over"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
