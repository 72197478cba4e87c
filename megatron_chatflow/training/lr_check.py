"""A note where the learning rate is too low for the last stage of the curriculum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_chatflow.config import ResolvedConfig, Schedule
from megatron_chatflow.curriculum import BlendPlan
from megatron_chatflow.training.optimizer import build_scheduler

FLOOR = 1 / 3
"""Share of the peak below which a stage teaches too little (arXiv 2511.18903 ends near it)."""


def rate_at(config: ResolvedConfig, sample: int) -> float:
    """Return the learning rate of the iteration that begins at `sample`, by megatron-core."""
    group = {"lr": 0.0, "weight_decay": 0.0}
    optimizer: Any = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(config, Schedule.of(config), optimizer)
    scheduler.step(sample)
    return group["lr"]


def late_stage_note(config: ResolvedConfig, plan: BlendPlan, end: int) -> str | None:
    """Return a note if the last stage is trained at less than a third of the peak rate, else None.

    Args:
        config: resolved settings.
        plan: the run's plan.
        end: samples that the run will read.
    """
    (first, *_), peak = plan.stages, config.optimizer.lr
    name, start = max(
        (stage for stage in plan.stages if stage[1] < end),
        key=lambda stage: stage[1],
        default=first,
    )
    if start == 0:
        return None
    points = 16
    mean = sum(rate_at(config, start + (end - start) * i // points) for i in range(points)) / points
    if mean >= FLOOR * peak * 0.99:
        return None
    return (
        f"stage {name} (samples {start} to {end - 1}) is trained at {mean / peak:.0%} of "
        f"the peak learning rate on average, and a rate that "
        f"decays wipes out much of what the last stage teaches; give --min-lr "
        f"{peak / 3:.2g} (a third of --lr), or --lr-decay-style constant with "
        "--ema-decay"
    )
