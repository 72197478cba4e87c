"""Writers of TensorBoard events and metrics.jsonl. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoardWriter:
    """Writes scalars into a TensorBoard log, each point passed to the operating system at once.

    TensorBoard's own writer has a thread, which reports a full disk with a traceback.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new log in `folder`.

        Args:
            folder: made if it does not exist.
            first_step: points of an earlier process at this step or later are hidden, as a resumed
                run writes them again.

        Raises:
            OSError: the log cannot be written.
        """
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # The classes of a protobuf module are made at run time.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        folder.mkdir(parents=True, exist_ok=True)
        unique = (
            f"{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        )
        self._file = (folder / f"events.out.tfevents.{unique}").open("xb", buffering=0)
        self._end = 0
        self._records = RecordWriter(self)
        try:
            self._add(file_version="brain.Event:2")
            start = events.SessionLog(status=events.SessionLog.START)
            self._add(step=first_step, session_log=start)
        except OSError:
            self.close()
            raise

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add one point per tag; None is left out. Raises OSError where it cannot be written."""
        points = [
            self._summary.Value(tag=tag, simple_value=float(value))
            for tag, value in values.items()
            if value is not None
        ]
        self._add(step=step, summary=self._summary(value=points))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write(self, record: bytes) -> None:
        """Write a record or nothing of it; called by TensorBoard's writer of records."""
        written = self._file.write(record)
        if written != len(record):
            self._file.truncate(self._end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._end += written

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


class MetricsWriter:
    """Writes one JSON object per line.

    Each line is passed to the operating system at once, or as soon as the disk has space again.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` to append. Raises OSError where that fails."""
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
        """Flush what was added to disk. Raises OSError where it cannot be written."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Raises OSError where what was added cannot be written."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        """Write all that is waiting, or nothing."""
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
