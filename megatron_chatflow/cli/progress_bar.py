"""The progress of `chatflow preprocess`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from megatron_chatflow.data.preprocess.pipeline import PreprocessProgress

_BAR = 30
"""Width of the bar in characters."""


class ProgressBar:
    """Shows progress at most once per second: as a bar on a terminal, as lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`."""
        self._stream = stream
        self._drawn = False
        self._last = 0.0

    def __enter__(self) -> ProgressBar:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the line of the bar."""
        if self._drawn:
            print(file=self._stream)

    def __call__(self, progress: PreprocessProgress) -> None:
        """Show how far preprocessing is."""
        if progress.seconds - self._last < 1:
            return
        self._last = progress.seconds
        if self._stream.isatty():
            self._drawn = True
            print(
                f"\r{_bar(progress)}{_line(progress)}\x1b[K", end="", file=self._stream, flush=True
            )
        else:
            print(_line(progress), file=self._stream, flush=True)


def _bar(progress: PreprocessProgress) -> str:
    return "" if progress.done is None else f"[{'#' * round(_BAR * progress.done):<{_BAR}}] "


def _line(progress: PreprocessProgress) -> str:
    line = (
        f"{progress.documents:,} documents, {progress.bytes / 1e6:,.1f} MB of text, "
        f"{progress.rate / 1e6:.2f} MB/s"
    )
    if progress.done is not None:
        line += f", {progress.done:.0%} of the input"
    if progress.left is not None:
        left = round(progress.left)
        line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    return line
