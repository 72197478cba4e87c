"""The table that `plan` prints: what each stage and the run draw from each domain."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_chatflow.report import columns


def plan_table(
    stages: Iterable[Any],
    domains: Iterable[Any],
    *,
    num_samples: int,
    seq_length: int,
    end: int,
    warnings: Sequence[str] = (),
) -> str:
    """Return the plan as text.

    Args:
        stages: for each stage and domain, in order: stage, start, stop, domain, share, share_start,
            share_end, samples, tokens, epochs (attributes).
        domains: for each domain: name, samples, tokens, epochs, max_epochs (or None),
            exhausted_at (or None).
        num_samples: length of the run.
        seq_length: tokens per sample.
        end: samples that the run will have.
        warnings: messages to print below.

    Returns:
        Lines of aligned columns, without a newline at the end.
    """
    domains = list(domains)
    head = ("domain", "share", "from", "to", "samples", "tokens", "epochs")
    blocks: list[tuple[str, list[tuple[str, ...]]]] = []
    for _, group in itertools.groupby(stages, key=lambda row: (row.stage, row.start)):
        rows = list(group)
        title = f"stage {rows[0].stage}: samples {rows[0].start:,} to {rows[0].stop - 1:,}"
        lines = [
            (
                r.domain,
                *map(_percent, (r.share, r.share_start, r.share_end)),
                f"{r.samples:,}",
                _tokens(r.tokens),
                _epochs(r.epochs),
            )
            for r in rows
            if r.share or r.samples
        ]
        blocks.append((title, [head, *lines]))
    total = max(sum(row.samples for row in domains), 1)
    last = (
        "domain",
        "share",
        "",
        "",
        "samples",
        "tokens",
        "epochs",
        "max epochs",
        "runs out at sample",
    )
    lines = [
        (
            *(
                r.name,
                _percent(r.samples / total),
                "",
                "",
                f"{r.samples:,}",
                _tokens(r.tokens),
                _epochs(r.epochs),
            ),
            *(
                "-" if r.max_epochs is None else f"{r.max_epochs:g}",
                "-" if r.exhausted_at is None else f"{r.exhausted_at:,}",
            ),
        )
        for r in domains
    ]
    length = f"{end:,} samples" if end == num_samples else f"{end:,} of {num_samples:,} samples"
    length += f" of {seq_length:,} tokens, {_tokens(end * seq_length)} tokens"
    blocks.append((f"the complete run: {length}", [last, *lines]))
    widths = columns.widths([row for _, rows in blocks for row in rows])
    text = []
    for title, rows in blocks:
        text += [title, *(columns.line(row, widths) for row in rows), ""]
    return "\n".join([*text, *(f"warning: {sentence}" for sentence in warnings)]).rstrip("\n")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{share * 100:.2g}%"


def _tokens(tokens: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size:
            return (
                f"{tokens / size:.3g}{unit}"
                if tokens < 999.5 * size
                else f"{tokens / size:,.0f}{unit}"
            )
    return str(tokens)


def _epochs(epochs: float) -> str:
    return f"{epochs:,.2f}" if epochs >= 0.005 or epochs == 0 else f"{epochs:.1g}"
