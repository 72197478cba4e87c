"""metrics.jsonl as a file: what a record is, and preparing the file for a run that resumes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.utils.user_files import load_json

BAD = ".bad"
"""After the name of the file: where lines go that are not records."""
_LONGEST = 1 << 24
"""Bytes that are read as one line."""
_START = re.compile(rb'\{"iteration": ([0-9]{1,15})[,}]')
_BRANCH = b'"branch": "'
_IN_NUMBERS = b"0123456789+-.eE"
_PARSED, _MOST_SHAPES = 50_000, 1000


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, or None where it is not one.

    A record is an iteration's values by domain, or a validation's by name.
    """
    try:
        record = load_json(line.decode("utf-8"))
    except (UnicodeDecodeError, ChatflowError):
        return None
    if type(record) is not dict or type(record.get("iteration")) is not int:
        return None
    values = record.get("validation" if "validation" in record else "domains")
    return record if type(values) is dict and record["iteration"] >= 0 else None


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return all records of a file, and the numbers of the lines that are not records.

    An incomplete last line is left out: a run may be writing it.
    """
    records, bad = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file), 1):
            record = parse_record(line) if line.endswith(b"\n") else None
            if record is not None:
                records.append(record)
            elif not _is_half(line):
                bad.append(number)
    return records, bad


Course = Callable[[str, int], bool]
"""(branch, iteration) -> whether a record of it belongs to the run."""


def prepare_records(
    path: Path, iteration: int, *, validated: bool, course: Course = lambda branch, at: True
) -> list[str]:
    """Prepare a file for a run that resumes after `iteration`; memory does not grow with the file.

    Records of later iterations or of another course, and a partial line, are cut from its end.
    Lines that are not records, and such records before the last one that is kept, are moved to
    ``metrics.jsonl.bad``.

    Args:
        path: metrics.jsonl; it need not exist.
        iteration: the last one that is kept.
        validated: whether the validation of `iteration` is kept as well.
        course: which branches' records are kept, up to which iteration.

    Returns:
        What the user should see: lines moved, gaps, and iterations that are recorded twice.
    """
    if not path.exists():
        return []
    pass_, order = _Pass(iteration, validated, course), _Order()
    end = moved = waiting = 0
    with open(path, "rb") as file:
        for kind, position, _ in pass_.lines(file):
            if kind == _KEPT:
                end, moved, waiting = position, moved + waiting, 0
                order.add(*pass_.found)
            elif kind == _LATER:
                waiting += 1
            elif kind == _BAD:
                moved += 1
    notes = order.notes(iteration)
    if moved:
        _move_lines(path, _Pass(iteration, validated, course), end)
        are = "s are not records" if moved > 1 else " is not a record"
        notes.insert(0, f"{moved} line{are} of this run; moved to {path.name}{BAD}")
    else:
        os.truncate(path, end)
    return [f"{path}: {note}" for note in notes]


def copy_records(source: Path, path: Path) -> None:
    """Give a branch the file of its trunk, where it has none; `prepare_records` then cuts it."""
    if path.exists() or not source.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    os.replace(temporary, path)


_KEPT, _LATER, _BAD, _HALF = range(4)


class _Pass:
    """Classifies the lines of a file.

    The first 50,000 are parsed, about a second. After them a line is parsed where its shape, the
    text without numbers, is new: a run of a million iterations has a few shapes.
    """

    def __init__(self, iteration: int, validated: bool, course: Course) -> None:
        self._iteration, self._validated, self._course = iteration, validated, course
        self._shapes: dict[bytes, bool] = {}
        self._parsed = 0
        self.found = (0, False)
        """(iteration, whether it is of a validation) of the last record."""

    def lines(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """Yield (kind, end position, line) of every line."""
        position = 0
        for line in _lines(file):
            position += len(line)
            yield self._kind(line), position, line

    def _kind(self, line: bytes) -> int:
        if _is_half(line):
            return _HALF
        start, shape = _START.match(line), line.translate(None, _IN_NUMBERS)
        if start is not None and shape in self._shapes and self._parsed >= _PARSED:
            self.found = int(start[1]), self._shapes[shape]
        elif (record := parse_record(line)) is None:
            return _BAD
        else:
            self._parsed += 1
            self.found = record["iteration"], "validation" in record
            if start is not None and len(self._shapes) < _MOST_SHAPES:
                self._shapes[shape] = self.found[1]
        at, is_validation = self.found
        is_kept = at < self._iteration or (
            at == self._iteration and (self._validated or not is_validation)
        )
        return _KEPT if is_kept and self._is_on_course(line, at) else _LATER

    def _is_on_course(self, line: bytes, iteration: int) -> bool:
        start = line.rfind(_BRANCH)
        if start < 0:  # of an earlier version
            return True
        start += len(_BRANCH)
        return self._course(line[start : line.index(b'"', start)].decode(), iteration)


class _Order:
    """Checks that the iterations that are kept are consecutive."""

    def __init__(self) -> None:
        self._last: dict[bool, int] = {}
        self._gaps: list[str] = []
        self._again: list[str] = []
        self._counts = [0, 0]

    def add(self, iteration: int, is_validation: bool) -> None:
        """Add the next record."""
        last = self._last.get(is_validation)
        if last is not None and iteration <= last:
            self._again = self._counted(1, self._again, str(iteration))
            return
        if last is not None and not is_validation:
            self._gap(last, iteration)
        self._last[is_validation] = iteration

    def _gap(self, last: int, following: int) -> None:
        if following > last + 1:
            first, end = last + 1, following - 1
            text = f"{first} to {end}" if end > first else str(first)
            self._gaps = self._counted(0, self._gaps, text)

    def _counted(self, which: int, texts: list[str], text: str) -> list[str]:
        self._counts[which] += 1
        return [*texts, text] if len(texts) < 5 else texts

    def notes(self, iteration: int) -> list[str]:
        """Return what is wrong, for a file that should end with `iteration`."""
        if False in self._last:
            self._gap(self._last[False], iteration + 1)
        found = []
        for texts, count, what in (
            (self._gaps, self._counts[0], "no record of"),
            (self._again, self._counts[1], "more than one record, or one in the wrong place, of"),
        ):
            if texts:
                more = f", ... ({count} in all)" if count > len(texts) else ""
                found.append(f"{what} iteration {', '.join(texts)}{more}")
        return found


def _move_lines(path: Path, pass_: _Pass, end: int) -> None:
    """Move what is not kept to the other file; after `end` later records are dropped."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with (
        open(path, "rb") as source,
        open(temporary, "wb") as kept,
        open(f"{path}{BAD}", "ab") as moved,
    ):
        for kind, position, line in pass_.lines(source):
            if kind == _KEPT:
                kept.write(line)
            elif kind == _BAD or (kind == _LATER and position < end):
                moved.write(line)
        for file in (moved, kept):
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_LONGEST):
        yield line


def _is_half(line: bytes) -> bool:
    """Return whether it is a partial last line."""
    return not line.endswith(b"\n") and len(line) < _LONGEST
