"""Stages and ramps resolved to samples: the share vector at any sample of the run."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from megatron_chatflow.curriculum.ramps import CONSTANT, Pacing, pacing
from megatron_chatflow.curriculum.schema import MOST_SAMPLES, Curriculum
from megatron_chatflow.errors import ConfigError

GRID = 1 << 48
"""Shares are multiples of 1 / GRID, so their sums are exact in float64 on every machine."""


class RunSizes(NamedTuple):
    """The sizes of a run that decide where its stages begin."""

    num_samples: int
    global_batch_size: int
    seq_length: int

    @classmethod
    def checked(cls, num_samples: Any, global_batch_size: Any, seq_length: Any) -> RunSizes:
        """Return the sizes as integers.

        Raises:
            ConfigError: one of them is not a positive integer, or is more than 2^53.
        """
        sizes = cls(num_samples, global_batch_size, seq_length)
        for key, value in sizes._asdict().items():
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ConfigError(
                    f"{key}: {value!r} is not a positive whole number; give at least 1"
                )
            if value > MOST_SAMPLES:
                raise ConfigError(f"{key}: {value} is more than 2^53; give a smaller number")
        return cls(*(operator.index(value) for value in sizes))


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the curriculum at its place in a run."""

    name: str
    at: int
    """The first sample of the stage."""
    weights: Mapping[str, float]
    """Positive weights by domain."""
    ramp: str
    """How the shares move from the stage before to this one."""


@dataclass(frozen=True)
class Ramp:
    """Shares from one stage to the next: (1 - pacing) before + pacing after."""

    begin: int
    """First sample that the ramp is used for."""
    end: int | None
    """First sample after it; None: it holds to the end of the run."""
    origin: int
    """The sample from which the pacing counts."""
    before: Mapping[str, int]
    """Shares in units of 1 / GRID; positive ones only."""
    after: Mapping[str, int]
    pacing: Pacing


def resolve_stages(curriculum: Curriculum, sizes: RunSizes) -> tuple[PlannedStage, ...]:
    """Return the curriculum's stages in samples.

    Raises:
        ConfigError: in this run a stage does not begin after the stage above it.
    """
    per_unit = {
        "samples": Fraction(1),
        "iterations": Fraction(sizes.global_batch_size),
        "tokens": Fraction(1, sizes.seq_length),
    }[curriculum.clock]
    stages: list[PlannedStage] = []
    for stage in curriculum.stages:
        at = stage.sample(per_unit, sizes.num_samples)
        if stages and at <= stages[-1].at:
            raise ConfigError(
                f"{curriculum.source}: stages ({stage.name}).at: in a run of {sizes.num_samples} "
                f"samples it begins at sample {at} and the stage above it, "
                f"{stages[-1].name!r}, at sample {stages[-1].at}; move one of them, or "
                f"lengthen the run"
            )
        weights = {name: weight for name, weight in stage.weights.items() if weight > 0}
        stages.append(PlannedStage(stage.name, at, weights, stage.ramp))
    return tuple(stages)


def stages_from(stages: tuple[PlannedStage, ...], start: int) -> tuple[PlannedStage, ...]:
    """Return the stages from the one in force at sample `start` on."""
    return stages[max(i for i, stage in enumerate(stages) if stage.at <= start) :]


def stages_until(stages: tuple[PlannedStage, ...], stop: int) -> tuple[PlannedStage, ...]:
    """Return the stages that decide anything before sample `stop`.

    These are the ones that begin before it, and the one after that the shares move to.
    """
    return stages[
        : 1 + next((i for i, stage in enumerate(stages) if stage.at >= stop), len(stages))
    ]


def stage_ramps(stages: Sequence[PlannedStage], start: int, stop: int | None) -> Iterator[Ramp]:
    """Yield the ramps that cover samples start .. stop - 1 (to the end where `stop` is None)."""
    shares = None  # of this stage, where the ramp before it has computed them
    for i, stage in enumerate(stages):
        following = stages[i + 1] if i + 1 < len(stages) else None
        begin = max(stage.at, start)
        ends = [end for end in (stop, following.at if following else None) if end is not None]
        end = min(ends) if ends else None
        if end is not None and end <= begin:
            shares = None
            continue
        before = shares or grid_shares(stage.weights)
        shares = grid_shares(following.weights) if following else None
        after = shares if following and shares and following.ramp != "step" else before
        moving = after != before
        yield Ramp(
            begin,
            end,
            stage.at,
            before,
            after,
            pacing(following.ramp, following.at - stage.at) if following and moving else CONSTANT,
        )


def grid_shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Return weights as shares in units of 1 / GRID that add up to GRID exactly.

    A positive weight gets at least one unit; the largest one takes what rounding leaves.
    """
    weights = {name: weight for name, weight in sorted(weights.items()) if weight > 0}
    largest = max(weights, key=weights.__getitem__)
    scaled = {name: weight / weights[largest] for name, weight in weights.items()}
    total = math.fsum(scaled.values())
    shares = {name: max(1, round(value / total * GRID)) for name, value in scaled.items()}
    shares[largest] += GRID - sum(shares.values())
    return shares
