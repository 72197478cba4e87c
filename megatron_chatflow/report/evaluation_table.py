"""What `evaluate` prints of two models: their values on each domain and the change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_chatflow.report import columns

Results = Mapping[str, Mapping[str, Any]]


def changes(
    results: Results, reference: Results, *, same_tokens: bool
) -> dict[str, dict[str, float | None]]:
    """Return by how many percent each value is above the reference's; positive is worse.

    Args:
        results: {name: {"loss", "bits_per_byte" or None}}.
        reference: the same of the reference.
        same_tokens: whether both have one tokenizer; otherwise losses per token cannot be
            compared, and are None.

    Returns:
        {name: {"loss", "bits_per_byte"}}.
    """
    return {
        name: {
            "loss": _percent(results[name]["loss"], reference[name]["loss"])
            if same_tokens
            else None,
            "bits_per_byte": _percent(
                results[name]["bits_per_byte"], reference[name]["bits_per_byte"]
            ),
        }
        for name in results
        if name in reference
    }


def _percent(value: float | None, before: float | None) -> float | None:
    return None if value is None or not before else 100 * (value / before - 1)


def comparison_lines(results: Results, reference: Results, change: Results) -> list[str]:
    """Return a table with a line per name: loss and bits per byte of both models, and changes."""
    rows = [("", "loss", "reference", "change", "bits per byte", "reference", "change")]
    for name, percent in change.items():
        here, before = results[name], reference[name]
        cells = [
            (_number(here[key]), _number(before[key]), _signed(percent[key]))
            for key in ("loss", "bits_per_byte")
        ]
        rows.append((name, *cells[0], *cells[1]))
    widths = columns.widths(rows)
    return [columns.line(row, widths) for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}%"
