"""Columns of text aligned on a terminal, also where letters are two cells wide."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence


def widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column in cells; rows may be of different lengths."""
    return [max(map(width, column)) for column in itertools.zip_longest(*rows, fillvalue="")]


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Return a row, indented by two cells: first column left-aligned, all others right-aligned."""
    return (
        "  "
        + "  ".join(
            _aligned(cell, width, i)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
    )


def width(text: str) -> int:
    """Return the cells that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _aligned(text: str, cells: int, column: int) -> str:
    padding = " " * (cells - width(text))
    return padding + text if column else text + padding
