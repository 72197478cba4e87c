"""What a plan will draw from each domain, when a domain runs out, and whether that is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from megatron_chatflow.curriculum.plan import BlendPlan
from megatron_chatflow.curriculum.schema import MOST_SAMPLES, Curriculum, Domain
from megatron_chatflow.errors import ConfigError

MANY_EPOCHS = 4
"""Beyond this many epochs, repeated text is worth much less than new text.

Muennighoff et al. 2023, arXiv 2305.16264.
"""


class DomainForecast(NamedTuple):
    """One domain over the complete run."""

    name: str
    samples: int
    tokens: int
    epochs: float
    """Samples divided by samples per epoch; inf where the domain has none."""
    max_epochs: float | None
    exhausted_at: int | None
    """The first sample that it cannot serve; None: it lasts.

    Under redistribute: the sample from which its share goes to the others.
    """


class StageForecast(NamedTuple):
    """One domain within one stage."""

    stage: str
    start: int
    """First sample of the stage."""
    stop: int
    """First sample after it."""
    domain: str
    share: float
    """Scheduled share, averaged over the stage."""
    share_start: float
    """Scheduled share at the stage's first sample."""
    share_end: float
    """Scheduled share at its last sample."""
    samples: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class RunForecast:
    """What a plan will draw."""

    domains: tuple[DomainForecast, ...]
    stages: tuple[StageForecast, ...]
    end: int
    """Samples that the run will have.

    It is `num_samples`, or fewer where a domain runs out under `on_exhausted: stop`.
    """
    warnings: tuple[str, ...]


def capacities(curriculum: Curriculum, epoch_samples: Mapping[str, int]) -> dict[str, int]:
    """Return the samples that each domain can give in all, for `BlendPlan(capacities=...)`.

    That is `max_epochs` times its epoch, or one epoch without `max_epochs`.

    Args:
        curriculum: names and limits.
        epoch_samples: samples in one epoch of each domain.
    """
    return {
        name: _epochs(domain.max_epochs or 1, epoch_samples[name])
        for name, domain in curriculum.domains.items()
    }


def forecast(plan: BlendPlan, epoch_samples: Mapping[str, int]) -> RunForecast:
    """Return what each domain will give, in all and in each stage, and when it runs out.

    Args:
        plan: the plan of the run.
        epoch_samples: samples in one epoch of each domain.
    """
    limits = {
        name: _limit(plan, domain, epoch_samples[name]) for name, domain in plan.domains.items()
    }
    exhausted = {
        name: _exhausted_at(plan, i, limits[name]) for i, name in enumerate(plan.domain_names)
    }
    early = [n for n in exhausted.values() if n is not None] if plan.on_exhausted == "stop" else []
    end = min([plan.num_samples, *early])
    domains = []
    for name, samples in zip(plan.domain_names, plan.counts(end).tolist(), strict=True):
        cap = plan.domains[name].max_epochs
        domains.append(
            DomainForecast(
                name,
                samples,
                samples * plan.seq_length,
                _ratio(samples, epoch_samples[name]),
                cap,
                exhausted[name],
            )
        )
    stages = []
    edges = [(name, first) for name, first in plan.stages if first < end] + [("", end)]
    reached = [(name, n, plan.counts(n), plan.integral(n)) for name, n in edges]
    for (stage, start, count, area), (_, stop, count_after, area_after) in itertools.pairwise(
        reached
    ):
        drawn = (count_after - count).tolist()
        share = ((area_after - area) / (stop - start)).tolist()
        at_start, at_end = plan.shares(start).tolist(), plan.shares(stop - 1).tolist()
        for i, name in enumerate(plan.domain_names):
            tokens, epochs = drawn[i] * plan.seq_length, _ratio(drawn[i], epoch_samples[name])
            stages.append(
                StageForecast(
                    stage,
                    start,
                    stop,
                    name,
                    share[i],
                    at_start[i],
                    at_end[i],
                    drawn[i],
                    tokens,
                    epochs,
                )
            )
    return RunForecast(tuple(domains), tuple(stages), end, tuple(_warnings(plan, domains, end)))


def check_exhaustion(plan: BlendPlan, epoch_samples: Mapping[str, int]) -> None:
    """Refuse a plan that asks a domain for more than it may give.

    What was read before the last amendment is done, and is not counted against it.

    Args:
        plan: the plan of the run.
        epoch_samples: samples in one epoch of each domain.

    Raises:
        ConfigError: under `repeat`, a domain is read more often than its max_epochs; under `error`,
            more often than that, or than once without it; under `redistribute`, the plan was made
            without capacities; or a domain that is drawn from is empty.
    """
    totals = zip(
        plan.domain_names,
        plan.counts(plan.num_samples).tolist(),
        plan.counts(plan.segments[-1].start).tolist(),
        strict=True,
    )
    for name, samples, before in totals:
        epoch, cap = epoch_samples[name], plan.domains[name].max_epochs
        if samples and not epoch:
            raise ConfigError(
                f"domains.{name}: the plan draws {samples} samples from it and its corpus "
                f"holds none; give it more text, or weight 0"
            )
        if plan.on_exhausted == "stop":
            continue
        limit = _limit(plan, plan.domains[name], epoch)
        if limit is None or samples <= max(limit, before):
            continue
        if plan.on_exhausted == "redistribute":
            raise ConfigError(
                f"domains.{name}: the plan draws {samples} samples and it can give {limit}; "
                f"make the plan with capacities, so that others take over"
            )
        if cap is None:
            allowed, advice = (
                "on_exhausted is error, so it may be read once",
                "give it a max_epochs",
            )
        else:
            allowed, advice = f"max_epochs is {cap:g}", "raise max_epochs"
        raise ConfigError(
            f"domains.{name}: the run reads it {samples / epoch:.4g} times ({samples} "
            f"samples of {epoch} an epoch), and {allowed}; {advice}, "
            "lower its weights, shorten the run, or write on_exhausted: redistribute or stop"
        )


def share_curve(plan: BlendPlan, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return the scheduled shares over the run, for a plot.

    Args:
        plan: the plan of the run.
        points: how many samples to evaluate, in addition to both sides of every stage's start.

    Returns:
        Sample numbers int64 [n], increasing, and shares float64 [n, K].
    """
    last = plan.num_samples - 1
    edges = [n for _, first in plan.stages for n in (first - 1, first) if n >= 0]
    samples = np.unique(
        np.concatenate([np.linspace(0, last, points).astype(np.int64), edges, [last]]).astype(
            np.int64
        )
    )
    return samples, np.stack([plan.shares(int(n)) for n in samples])


def _limit(plan: BlendPlan, domain: Domain, epoch: int) -> int | None:
    if domain.max_epochs is None and plan.on_exhausted == "repeat":
        return None
    return _epochs(domain.max_epochs or 1, epoch)


def _epochs(times: float, epoch: int) -> int:
    return min(int(Fraction(str(times)) * epoch), MOST_SAMPLES)


def _exhausted_at(plan: BlendPlan, domain: int, limit: int | None) -> int | None:
    """Return the first sample since the last amendment that asks for more than the limit.

    Where the plan itself hands the share on, return the sample after the last one given.
    """
    if limit is None:
        return None
    hands_on = plan.segments[-1].capacities is not None
    wanted = (
        limit if hands_on else max(limit, int(plan.counts(plan.segments[-1].start)[domain])) + 1
    )
    low, high = -1, plan.num_samples
    if plan.counts(high)[domain] < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if plan.counts(middle)[domain] >= wanted else (middle, high)
    return high if hands_on else high - 1


def _warnings(plan: BlendPlan, domains: list[DomainForecast], end: int) -> list[str]:
    found = []
    if end < plan.num_samples:
        first = min(
            (d for d in domains if d.exhausted_at is not None),
            key=lambda d: math.inf if d.exhausted_at is None else d.exhausted_at,
        )
        found.append(
            f"the run ends at sample {end} of {plan.num_samples}: {first.name} runs out "
            f"there (on_exhausted: stop)"
        )
    for domain in domains:
        if not domain.samples:
            found.append(f"{domain.name} gets no sample")
        elif domain.epochs == float("inf"):
            found.append(f"{domain.name} holds no sample, and {domain.samples} are drawn from it")
        elif domain.exhausted_at is not None and plan.on_exhausted in ("repeat", "error"):
            found.append(
                f"{domain.name} runs out at sample {domain.exhausted_at}: the run would be "
                f"refused (on_exhausted: {plan.on_exhausted})"
            )
        elif (
            domain.exhausted_at is not None
            and plan.on_exhausted == "redistribute"
            and domain.exhausted_at < end
        ):
            found.append(
                f"{domain.name} runs out at sample {domain.exhausted_at}: from there its "
                f"share goes to the others"
            )
        elif domain.epochs > MANY_EPOCHS:
            found.append(
                f"{domain.name} is read {domain.epochs:.1f} times: beyond {MANY_EPOCHS} "
                f"epochs, repeated text is worth much less than new"
            )
    found += [
        f"stage {stage.name} begins at sample {stage.at}, after the run's end"
        for stage in plan.segments[-1].stages
        if stage.at >= end
    ]
    return found


def _ratio(samples: int, epoch: int) -> float:
    return samples / epoch if epoch else (float("inf") if samples else 0.0)
