"""Where numbers are kept: TensorBoard events and metrics.jsonl. Plain values in; imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardWriter:
    """Scalars into a TensorBoard log."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step`: points of an earlier process at this step or later are hidden, as a resumed run writes them again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = Event, Summary
        self._file = EventFileWriter(str(folder))
        self._file.add_event(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point of each tag; None is left out."""
        points = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items() if value is not None]
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def flush(self) -> None:
        """Make what was added visible to readers."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._file.close()


class MetricsWriter:
    """One JSON object a line; each line is handed to the operating system at once, or as soon as the disk has room again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._waiting = b""

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record. Numbers are written so that they read back to the same bits."""
        self._waiting += (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with contextlib.suppress(OSError):
            self._write()

    def flush(self) -> None:
        """Make what was added durable. Raises OSError where it cannot be written."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Raises OSError where what was added cannot be written."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        """All that waits, or nothing."""
        if not self._waiting:
            return
        try:
            written = self._file.write(self._waiting)
        except OSError:
            written = 0
        if written != len(self._waiting):
            self._file.truncate(self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._end, self._waiting = self._end + written, b""
