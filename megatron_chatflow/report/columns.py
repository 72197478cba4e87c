"""Columns of text that line up on a terminal, also where letters are two cells wide."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Cells that the widest entry of each column takes; rows may be of different lengths."""
    return [max(map(width, column)) for column in itertools.zip_longest(*rows, fillvalue="")]


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    """A row, its first column aligned to the left and all others to the right, indented by two
    cells.
    """
    return (
        "  "
        + "  ".join(
            _aligned(cell, width, i)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
    )


def width(text: str) -> int:
    """Cells that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _aligned(text: str, cells: int, column: int) -> str:
    padding = " " * (cells - width(text))
    return padding + text if column else text + padding
