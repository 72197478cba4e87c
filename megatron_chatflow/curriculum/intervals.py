"""The plan's intervals: runs of samples among which the same domains take turns.

An interval ends where a domain joins or leaves, at every stage, at every amendment, and where a
domain has given its capacity. How far each domain is behind or ahead at that moment is carried
over, so nothing is lost; a domain whose share is 0 is not a member of the interval and gets no
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_chatflow.curriculum.apportion import Apportionment
from megatron_chatflow.curriculum.merge_tree import MergeTree
from megatron_chatflow.curriculum.ramps import CONSTANT, Pacing, without
from megatron_chatflow.curriculum.schedule import (
    GRID,
    PlannedStage,
    Ramp,
    grid_shares,
    stage_ramps,
)
from megatron_chatflow.errors import ConfigError


@dataclass(frozen=True)
class Segment:
    """A part of the plan that was fixed at one time: by the first plan, or by an amendment."""

    start: int
    """Its first sample."""
    stages: tuple[PlannedStage, ...]
    """From the one in force at `start` on."""
    capacities: Mapping[str, int] | None = None
    """Samples that each domain can give in all, under `on_exhausted: redistribute`; else None."""


@dataclass(frozen=True)
class Interval:
    """Samples begin .. end - 1. Arrays are over the plan's domains, by number: [K]."""

    begin: int
    end: int
    origin: int
    """The sample from which the pacing counts."""
    pacing: Pacing
    before: np.ndarray
    """Scheduled shares where the pacing is 0: float64 [K]."""
    after: np.ndarray
    """Scheduled shares where the pacing is 1: float64 [K]."""
    members: np.ndarray
    """Numbers of the domains that take turns, in order of their names: int64 [M]."""
    given: np.ndarray
    """Samples that each domain gave before this interval: int64 [K]."""
    integral: np.ndarray
    """The integral of each domain's share before this interval: float64 [K]."""
    version: int
    """The plan's version: 1 orders samples by a tree of due times, 2 apportions them."""

    @cached_property
    def order(self) -> Apportionment | MergeTree:
        """The order of the interval's samples."""
        behind = (self.integral - self.given)[self.members]
        kind = MergeTree if self.version == 1 else Apportionment
        return kind(
            self.before[self.members],
            self.after[self.members],
            self.pacing,
            self.begin - self.origin,
            behind - _mean(behind),
        )

    def shares(self, n: int) -> np.ndarray:
        """Return the scheduled shares at sample n: float64 [K]."""
        p = self.pacing.at(np.asarray(float(n - self.origin)))
        return (1 - p) * self.before + p * self.after

    def integral_at(self, n: int) -> np.ndarray:
        """Return the integral of the shares from 0 to n: float64 [K]."""
        first, last = self.pacing.area(
            np.array([self.begin - self.origin, n - self.origin], np.float64)
        ).tolist()
        area = last - first
        return self.integral + self.before * (n - self.begin - area) + self.after * area

    def counts(self, n: int) -> np.ndarray:
        """Return the number of samples of each domain before sample n: int64 [K]."""
        counts = self.given.copy()
        counts[self.members] += self.order.counts(n - self.begin)
        return counts

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return domain number and ordinal of samples start .. stop - 1: int64 [n] each."""
        members, ordinals = self.order.locate(start - self.begin, stop - self.begin)
        domains = self.members[members]
        return domains, ordinals + self.given[domains]

    def same_order(self, other: Interval, numbers: np.ndarray) -> bool:
        """Return whether another plan's interval orders samples alike, as far as both reach.

        Args:
            other: the interval of the other plan.
            numbers: the other plan's number of each domain of this plan, or -1: int64 [K].
        """
        mine, theirs = self.members, other.members
        return (
            (self.version, self.begin, self.origin) == (other.version, other.begin, other.origin)
            and np.array_equal(numbers[mine], theirs)
            and np.array_equal(self.given[mine], other.given[theirs])
            and np.array_equal(self.before[mine], other.before[theirs])
            and np.array_equal(self.after[mine], other.after[theirs])
            and np.array_equal(self.pacing.knots, other.pacing.knots)
            and np.array_equal(self.pacing.values, other.pacing.values)
            and np.array_equal(self.integral[mine], other.integral[theirs])
        )


def build_intervals(
    segment: Segment, names: Sequence[str], stop: int, previous: Interval | None, version: int
) -> Iterator[Interval]:
    """Yield the intervals of a segment up to sample `stop`.

    Args:
        segment: what is scheduled.
        names: the plan's domains, in order of their numbers.
        stop: where the segment ends.
        previous: the last interval before the segment, which ends where the segment starts; None
            for the first segment.
        version: the plan's version.

    Raises:
        ConfigError: every domain that is scheduled has given its capacity before `stop`.
    """
    number = {name: i for i, name in enumerate(names)}
    capacity = (
        None
        if segment.capacities is None
        else np.array([segment.capacities.get(name, 0) for name in names], np.int64)
    )
    for ramp in stage_ramps(segment.stages, segment.start, stop):
        begin, end = ramp.begin, stop if ramp.end is None else ramp.end
        while begin < end:
            # Counts and integrals so far, int64 and float64 [K]; domains that join now have 0.
            given, integral = np.zeros(len(names), np.int64), np.zeros(len(names))
            if previous is not None:
                known = len(previous.given)
                given[:known] = previous.counts(begin)
                integral[:known] = previous.integral_at(begin)
            # Exhausted domains pass their shares on to the others.
            before, after, pace = ramp.before, ramp.after, ramp.pacing
            if capacity is not None:
                alive = {
                    name
                    for name in {**before, **after}
                    if given[number[name]] < capacity[number[name]]
                }
                before, after, pace = _remaining(ramp, alive, begin)
            # At the first sample of a ramp, a domain that it brings in still has the share 0.
            joins_later = begin == ramp.origin and not before.keys() >= after.keys()
            members = sorted(before if joins_later else {**before, **after})
            interval = Interval(
                begin,
                begin + 1 if joins_later else end,
                ramp.origin,
                pace,
                _vector(before, number),
                _vector(after, number),
                np.array([number[name] for name in members], np.int64),
                given,
                integral,
                version,
            )
            if capacity is not None:
                interval = _until_exhausted(interval, capacity)
            yield interval
            previous, begin = interval, interval.end


def _remaining(
    ramp: Ramp, alive: set[str], begin: int
) -> tuple[Mapping[str, int], Mapping[str, int], Pacing]:
    """Return shares before and after and their pacing when only the domains in `alive` are left.

    The shares of the others go to them in proportion.
    """
    if not alive:
        names = ", ".join(sorted({**ramp.before, **ramp.after}))
        raise ConfigError(
            f"on_exhausted: redistribute: at sample {begin} every domain that is scheduled "
            f"({names}) has given all it has; shorten the run, "
            "raise max_epochs, or write on_exhausted: repeat"
        )
    if len(alive) == len({**ramp.before, **ramp.after}):
        return ramp.before, ramp.after, ramp.pacing
    before, after = (
        {name: share for name, share in shares.items() if name in alive}
        for shares in (ramp.before, ramp.after)
    )
    if not before or not after:
        left = grid_shares(before or after)
        return left, left, CONSTANT
    pace = without(ramp.pacing, sum(before.values()) / GRID, sum(after.values()) / GRID)
    return grid_shares(before), grid_shares(after), pace


def _until_exhausted(interval: Interval, capacity: np.ndarray) -> Interval:
    """Return the interval cut where one of its domains has given its capacity: int64 [K]."""

    def exhausted(n: int) -> bool:
        return bool((interval.counts(n) >= capacity)[interval.members].any())

    low, high = interval.begin, interval.end
    if not exhausted(high):
        return interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exhausted(middle) else (middle, high)
    return replace(interval, end=high)


def _vector(shares: Mapping[str, int], number: Mapping[str, int]) -> np.ndarray:
    values = np.zeros(len(number))
    for name, share in shares.items():
        values[number[name]] = share / GRID
    return values


def _mean(values: np.ndarray) -> float:
    """Return the mean, added up in the order of the values on every machine."""
    return float(np.cumsum(values)[-1]) / len(values)
