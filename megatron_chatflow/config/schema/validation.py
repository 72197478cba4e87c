"""The section ``validation``: held-out losses."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config.schema.section import Section


@dataclass(frozen=True)
class ValidationSettings(Section):
    """Held-out losses, one for each domain."""

    _intervals = ("eval_interval",)

    eval_interval: int | None = None
    """Iterations between validations; never by default."""
    eval_iters: int = 100
    """Global batches of held-out samples of each domain in one validation, always the same ones; a
    smaller held-out set is read completely.
    """
