"""What `doctor` looks at, one file a subject; each returns rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what was looked at, what is there, and why that is so or what follows
    from it.
    """

    name: str
    value: str
    reason: str = ""
    wrong: bool = False
    """Whether training cannot run because of it."""
