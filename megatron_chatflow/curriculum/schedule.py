"""Stages and ramps, resolved to samples: the share vector at any sample of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_chatflow.curriculum.ramps import CONSTANT, Pacing, pacing
from megatron_chatflow.curriculum.schema import Curriculum
from megatron_chatflow.errors import ConfigError

GRID = 1 << 48
"""Shares are multiples of 1 / GRID, so that their sums are exact in float64 and no machine rounds
them otherwise.
"""


@dataclass(frozen=True)
class PlannedStage:
    """A stage at its place in a run."""

    name: str
    at: int
    """The first sample of the stage."""
    weights: Mapping[str, float]
    ramp: str


@dataclass(frozen=True)
class Ramp:
    """Shares from one knot to the next: (1 - pacing) before + pacing after."""

    begin: int
    """First sample that the span is used for."""
    end: int | None
    """First sample after it; None: it holds to the end."""
    origin: int
    """The sample from which the pacing counts."""
    before: Mapping[str, int]
    """Shares in units of 1 / GRID; positive ones only."""
    after: Mapping[str, int]
    pacing: Pacing


def resolve_stages(
    curriculum: Curriculum, *, num_samples: int, global_batch_size: int, seq_length: int
) -> tuple[PlannedStage, ...]:
    """The curriculum's stages in samples.

    Raises:
        ValueError: in this run two stages begin at one sample, or one before the stage above it.
    """
    per_unit = {
        "samples": Fraction(1),
        "iterations": Fraction(global_batch_size),
        "tokens": Fraction(1, seq_length),
    }[curriculum.clock]
    knots: list[PlannedStage] = []
    for stage in curriculum.stages:
        at = stage.sample(per_unit, num_samples)
        if knots and at <= knots[-1].at:
            raise ConfigError(
                f"{curriculum.source}: stages ({stage.name}).at: in a run of {num_samples} "
                f"samples it begins at sample {at} and the stage above it, "
                f"{knots[-1].name!r}, at sample {knots[-1].at}; move one of them, or "
                f"lengthen the run"
            )
        knots.append(
            PlannedStage(
                stage.name,
                at,
                {name: weight for name, weight in stage.weights.items() if weight > 0},
                stage.ramp,
            )
        )
    return tuple(knots)


def spans(knots: Sequence[PlannedStage], start: int, stop: int | None) -> Iterator[Ramp]:
    """The spans that cover samples start .. stop - 1 (to the end where `stop` is None)."""
    shares = None  # of this knot, where the span before it has them
    for i, knot in enumerate(knots):
        following = knots[i + 1] if i + 1 < len(knots) else None
        begin = max(knot.at, start)
        ends = [end for end in (stop, following.at if following else None) if end is not None]
        end = min(ends) if ends else None
        if end is not None and end <= begin:
            shares = None
            continue
        before = shares or grid_shares(knot.weights)
        shares = grid_shares(following.weights) if following else None
        after = shares if following and shares and following.ramp != "step" else before
        moving = after != before
        yield Ramp(
            begin,
            end,
            knot.at,
            before,
            after,
            pacing(following.ramp, following.at - knot.at) if moving else CONSTANT,
        )


def grid_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as shares in units of 1 / GRID that add up to GRID exactly; a positive weight gets at
    least one unit.
    """
    weights = {name: weight for name, weight in sorted(weights.items()) if weight > 0}
    largest = max(weights, key=weights.__getitem__)
    scaled = {name: weight / weights[largest] for name, weight in weights.items()}
    total = math.fsum(scaled.values())
    shares = {name: max(1, round(value / total * GRID)) for name, value in scaled.items()}
    shares[largest] += GRID - sum(shares.values())
    return shares
