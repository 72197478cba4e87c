"""The blend as a pure function: sample number -> (domain, ordinal), and back to counts."""

from __future__ import annotations

import bisect
import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chatflow.curriculum.intervals import Interval, Segment, build_intervals
from megatron_chatflow.curriculum.ledger import PLAN_VERSION, Ledger, read_ledger
from megatron_chatflow.curriculum.schedule import (
    PlannedStage,
    RunSizes,
    grid_shares,
    resolve_stages,
    stages_from,
    stages_until,
)
from megatron_chatflow.curriculum.schema import MOST_SAMPLES, Curriculum, Domain, Preset, Stage
from megatron_chatflow.errors import ConfigError

_CHUNK = 1 << 16


class BlendPlan:
    """Which sample of which domain is sample n of the run, for every n, without table or state.

    The plan is a list of segments: the curriculum it was made from and the amendments, none of
    which moves the past. See README.md in this folder.

    Args:
        curriculum: the shares of the domains over the run.
        num_samples: length of the run. With stages in absolute units it decides nothing before
            the end.
        global_batch_size: samples per iteration; read by `clock: iterations` only.
        seq_length: tokens per sample; read by `clock: tokens` only.
        capacities: samples that each domain can give in all; read by `on_exhausted: redistribute`
            only. None: nothing runs out.

    Attributes:
        num_samples, global_batch_size, seq_length: as given.
        domain_names: the names that the numbers in `locate` stand for: sorted; domains that join
            later follow.
        domains: name -> `Domain`, in that order.
        on_exhausted, preset: as in the latest curriculum.
        segments: tuple of `Segment`.
        version: of the order: `PLAN_VERSION` for a new plan, that of the ledger for one that was
            read.

    Raises:
        ConfigError: a size is not positive, two stages begin at one sample, or every domain runs
            out (`redistribute`).
    """

    def __init__(
        self,
        curriculum: Curriculum,
        *,
        num_samples: int,
        global_batch_size: int,
        seq_length: int,
        capacities: Mapping[str, int] | None = None,
    ) -> None:
        sizes = RunSizes.checked(num_samples, global_batch_size, seq_length)
        self._set(
            {}, curriculum, sizes, (_segment(curriculum, 0, sizes, capacities),), (), PLAN_VERSION
        )

    def _set(
        self,
        domains: Mapping[str, Domain],
        curriculum: Curriculum,
        sizes: RunSizes,
        segments: tuple[Segment, ...],
        past: Sequence[Interval],
        version: int,
    ) -> BlendPlan:
        """Set all attributes; `past` are the known intervals, up to the start of a segment."""
        self.version = version
        self.num_samples, self.global_batch_size, self.seq_length = sizes
        self.domains = {
            **domains,
            **{name: curriculum.domains[name] for name in sorted(curriculum.domains)},
        }
        self.domain_names = tuple(self.domains)
        self.on_exhausted = curriculum.on_exhausted
        self.preset = curriculum.preset
        self.segments = segments
        self._intervals = list(past)
        for i, segment in enumerate(segments):
            if past and segment.start < past[-1].end:
                continue
            stop = segments[i + 1].start if i + 1 < len(segments) else self.num_samples
            self._intervals += build_intervals(
                segment,
                self.domain_names,
                stop,
                self._intervals[-1] if self._intervals else None,
                version,
            )
        self._begins = [interval.begin for interval in self._intervals]
        return self

    def __repr__(self) -> str:
        stages = ", ".join(f"{name} from {first}" for name, first in self.stages)
        return f"BlendPlan({self.num_samples} samples of {', '.join(self.domain_names)}: {stages})"

    @property
    def curriculum(self) -> Curriculum:
        """The curriculum in force at the end of the run, with its stages in samples."""
        return _curriculum(self.domains, self.segments[-1].stages, self.on_exhausted, self.preset)

    @property
    def stages(self) -> list[tuple[str, int]]:
        """(name, first sample) of every stage of the run, across all segments."""
        found: list[tuple[str, int]] = []
        for i, segment in enumerate(self.segments):
            stop = self.segments[i + 1].start if i + 1 < len(self.segments) else self.num_samples
            for stage in segment.stages:
                if stage.at < stop and not (found and found[-1][0] == stage.name):
                    found.append((stage.name, max(stage.at, segment.start)))
        return found

    def stage_at(self, n: int) -> str:
        """Return the name of the stage that sample n is in."""
        self._check(n)
        segment = self.segments[bisect.bisect_right([s.start for s in self.segments], n) - 1]
        return next(stage.name for stage in reversed(segment.stages) if stage.at <= n)

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return domain and ordinal of samples start .. stop - 1.

        Returns:
            Domain (number in `domain_names`) and ordinal (position within the domain: 0, 1, 2, ...)
            of each: int64 [stop - start] both.

        Raises:
            IndexError: the range is not within the run.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(
                f"samples {start} to {stop} are not within the run's {self.num_samples}"
            )
        first = bisect.bisect_right(self._begins, start) - 1
        parts = [(np.zeros(0, np.int64),) * 2]
        for interval in self._intervals[first : bisect.bisect_left(self._begins, stop)]:
            parts.append(interval.locate(max(start, interval.begin), min(stop, interval.end)))
        domains, ordinals = zip(*parts, strict=True)
        return np.concatenate(domains), np.concatenate(ordinals)

    def counts(self, n: int) -> np.ndarray:
        """Return how many of the first n samples each domain gets: int64 [K], adding up to n.

        Raises:
            IndexError: n is beyond the run.
        """
        return self._padded(self._interval(n).counts(n))

    def shares(self, n: int) -> np.ndarray:
        """Return the scheduled share of each domain at sample n: float64 [K], adding up to 1.

        Raises:
            IndexError: n is beyond the run.
        """
        return self._padded(self._interval(n).shares(n))

    def integral(self, n: int) -> np.ndarray:
        """Return the integral of the scheduled shares from 0 to n, in samples: float64 [K].

        `counts(n)` follows it.

        Raises:
            IndexError: n is beyond the run.
        """
        return self._padded(self._interval(n).integral_at(n))

    def amend(
        self,
        *,
        at: int,
        curriculum: Curriculum,
        num_samples: int | None = None,
        global_batch_size: int | None = None,
        capacities: Mapping[str, int] | None = None,
    ) -> BlendPlan:
        """Return the plan with the same past and another future.

        Args:
            at: the first sample that may change, 0 .. num_samples of this plan. Amendments that
                were to begin there or later are dropped.
            curriculum: what holds from there on. Its stages are absolute (percentages are of the
                run's full length); what it says before `at` is not read. It may name new domains,
                and leave out old ones.
            num_samples: the new length of the run, at least `at`; None: unchanged.
            global_batch_size: the new batch size; None: unchanged.
            capacities: as for a new plan, counted from the start of the run; None: those of this
                plan.

        Raises:
            ConfigError: `at` is not within the run, the run would end before it, or as for a new
                plan.
        """
        sizes = RunSizes.checked(
            self.num_samples if num_samples is None else num_samples,
            self.global_batch_size if global_batch_size is None else global_batch_size,
            self.seq_length,
        )
        capacities = self.segments[-1].capacities if capacities is None else capacities
        return self._amended(
            at, curriculum, sizes, lambda start: _segment(curriculum, start, sizes, capacities)
        )

    def amend_with(self, *, at: int, plan: BlendPlan) -> BlendPlan:
        """Return this plan, continued from sample `at` on by the last segment of another one.

        Curriculum, sizes and capacities are those of the other plan.

        Raises:
            ConfigError: the plans differ in seq_length, or as `amend`.
        """
        if plan.seq_length != self.seq_length:
            raise ConfigError(
                f"seq_length: {plan.seq_length}, and it was {self.seq_length}: samples "
                f"would be other tokens; keep {self.seq_length}"
            )
        sizes = RunSizes(plan.num_samples, plan.global_batch_size, plan.seq_length)
        segment = plan.segments[-1]
        return self._amended(
            at,
            plan.curriculum,
            sizes,
            lambda start: replace(segment, start=start, stages=stages_from(segment.stages, start)),
        )

    def follow(self, plan: BlendPlan) -> BlendPlan:
        """Return this plan with its last segment replaced by what another plan says from there on.

        It is what a curriculum file means in a run that was amended.
        """
        return self.amend_with(at=self.segments[-1].start, plan=plan)

    def first_difference(self, other: BlendPlan, stop: int) -> int | None:
        """Return the first sample before `stop` for which two plans differ, or None.

        They differ where the domain (by name) or the ordinal does, and where one of them ends.
        Intervals that are defined alike are skipped, so this is quick for any `stop`; the rest is
        searched in order.
        """
        stop, end = operator.index(stop), min(stop, self.num_samples, other.num_samples)
        found = {name: i for i, name in enumerate(other.domain_names)}
        numbers = np.array([found.get(name, -1) for name in self.domain_names], np.int64)
        n = 0
        while n < end:
            mine, theirs = self._interval(n), other._interval(n)
            until = min(mine.end, theirs.end, end)
            if mine.same_order(theirs, numbers):
                n = until
                continue
            until = min(until, n + _CHUNK)
            (a, i), (b, j) = self.locate(n, until), other.locate(n, until)
            differs = np.flatnonzero((numbers[a] != b) | (i != j))
            if len(differs):
                return n + int(differs[0])
            n = until
        return end if end < stop and self.num_samples != other.num_samples else None

    def to_json(self) -> str:
        """Return the ledger: all that defines the plan, which `from_json` reads back."""
        sizes = RunSizes(self.num_samples, self.global_batch_size, self.seq_length)
        return Ledger(
            self.version, sizes, self.on_exhausted, self.domains, self.segments, self.preset
        ).to_json()

    @classmethod
    def from_json(cls, text: str) -> BlendPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            ConfigError: the text is not a plan, is damaged, or is of another version, which would
                order the samples differently.
        """
        ledger = read_ledger(text)
        stages = ledger.segments[-1].stages
        curriculum = _curriculum(ledger.domains, stages, ledger.on_exhausted, ledger.preset)
        return cls.__new__(cls)._set(
            ledger.domains, curriculum, ledger.sizes, ledger.segments, (), ledger.version
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of what decides the order of the samples.

        Two plans with the same fingerprint are the same function. Paths, the order in which files
        list domains, names of stages, the scale of the weights and `global_batch_size` are not
        part of it.
        """
        content = [
            self.version,
            self.num_samples,
            self.seq_length,
            [
                [
                    segment.start,
                    [
                        [stage.at, grid_shares(stage.weights), stage.ramp if i else ""]
                        for i, stage in enumerate(segment.stages)
                    ],
                    segment.capacities and dict(segment.capacities),
                ]
                for segment in self.segments
            ],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _amended(
        self,
        at: int,
        curriculum: Curriculum,
        sizes: RunSizes,
        segment: Callable[[int], Segment],
    ) -> BlendPlan:
        at = operator.index(at)
        if not 0 <= at <= self.num_samples:
            raise ConfigError(
                f"at: sample {at} is not within the plan's {self.num_samples}; amend at a "
                f"sample of the run"
            )
        if sizes.num_samples < at or sizes.num_samples < 1:
            raise ConfigError(
                f"num_samples: {sizes.num_samples} is before sample {at}, from which the plan is "
                f"amended; give at least {max(at, 1)}"
            )
        past = [
            interval if interval.end <= at else replace(interval, end=at)
            for interval in self._intervals
            if interval.begin < at
        ]
        kept = [s for s in self.segments if s.start < at]
        if kept:
            kept[-1] = replace(kept[-1], stages=stages_until(kept[-1].stages, at))
        return BlendPlan.__new__(BlendPlan)._set(
            self.domains, curriculum, sizes, (*kept, segment(at)), past, self.version
        )

    def _check(self, n: int) -> None:
        if not 0 <= operator.index(n) <= self.num_samples:
            raise IndexError(f"sample {n} is not within the run's {self.num_samples}")

    def _interval(self, n: int) -> Interval:
        self._check(n)
        return self._intervals[bisect.bisect_right(self._begins, n) - 1]

    def _padded(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [values, np.zeros(len(self.domain_names) - len(values), values.dtype)]
        )


def _segment(
    curriculum: Curriculum, start: int, sizes: RunSizes, capacities: Mapping[str, int] | None
) -> Segment:
    stages = stages_from(resolve_stages(curriculum, sizes), start)
    if curriculum.on_exhausted != "redistribute" or capacities is None:
        return Segment(start, stages)
    for name in curriculum.domains:
        if name not in capacities:
            raise ConfigError(
                f"capacities: domain {name!r} is missing, and on_exhausted: redistribute "
                f"reads it; give the samples it holds in all"
            )
        if capacities[name] < 0:
            raise ConfigError(
                f"capacities: {capacities[name]} of domain {name!r} is negative; give 0 or "
                f"more samples"
            )
    return Segment(
        start,
        stages,
        {
            name: min(operator.index(capacities[name]), MOST_SAMPLES)
            for name in sorted(curriculum.domains)
        },
    )


def _curriculum(
    domains: Mapping[str, Domain],
    stages: Sequence[PlannedStage],
    on_exhausted: str,
    preset: Preset | None,
) -> Curriculum:
    plain = tuple(Stage(stage.name, stage.at, stage.weights, stage.ramp) for stage in stages)
    return Curriculum("samples", domains, plain, on_exhausted, "plan", preset=preset)
