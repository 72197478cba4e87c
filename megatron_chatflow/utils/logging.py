"""Set up the package's loggers for a command: one handler, one format, rank 0 only.

Modules log with `logging.getLogger(__name__)`. As a library the package configures nothing; a
program that embeds it may call `configure_logging` or attach its own handler to the logger
"megatron_chatflow".
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Literal, TextIO

PACKAGE = "megatron_chatflow"
LEVELS = ("debug", "info", "warning", "error")


def configure_logging(
    level: str = "info", *, rank: int = 0, stream: Literal["stdout", "stderr"] = "stdout"
) -> None:
    """Send the package's log records to a standard stream; a later call replaces an earlier one.

    Args:
        level: the lowest level that is shown, one of LEVELS.
        rank: this process's rank. Ranks other than 0 show errors only.
        stream: "stderr" for commands whose result goes to standard output.
    """
    logger = logging.getLogger(PACKAGE)
    handler = _StandardStreamHandler(stream)
    handler.addFilter(_FirstRankFilter(rank))
    handler.setFormatter(_Formatter())
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False  # a handler of the root logger would print everything twice


def log_notes(logger: logging.Logger, notes: Iterable[str]) -> None:
    """Log each note; one that begins with "warning: " at level WARNING, the others at INFO."""
    for note in notes:
        if note.startswith("warning: "):
            logger.warning(note.removeprefix("warning: "))
        else:
            logger.info(note)


class _Formatter(logging.Formatter):
    """The message; every level but INFO goes in front of it, as in "warning: ..."."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _FirstRankFilter(logging.Filter):
    """Pass what rank 0 logs, and errors of every rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        return self._rank == 0 or record.levelno >= logging.ERROR


class _StandardStreamHandler(logging.StreamHandler[TextIO]):
    """Writes to `sys.stdout` or `sys.stderr` as it is when a record comes, redirected or not."""

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._stream_name = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return getattr(sys, self._stream_name)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Raise, as `print` does: the caller decides what a closed pipe or a full disk means."""
        raise
