"""What `doctor` checks, one file per subject; each returns rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was checked, what was found, and the reason or consequence."""

    name: str
    value: str
    reason: str = ""
    wrong: bool = False
    """Whether it prevents training."""
