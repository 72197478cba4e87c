"""The blend as a pure function: sample number -> (domain, ordinal), and back to counts."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from megatron_chatflow.curriculum.intervals import Interval, Segment, build_intervals
from megatron_chatflow.curriculum.ramps import valid_ramp
from megatron_chatflow.curriculum.schedule import PlannedStage, grid_shares, resolve_stages
from megatron_chatflow.curriculum.schema import (
    KINDS,
    MOST_SAMPLES,
    ON_EXHAUSTED,
    Curriculum,
    Domain,
    Stage,
)
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.utils.user_files import load_json, valid_name, visible

PLAN_VERSION = 2
"""Raised by every change that moves the order of samples. Ledgers of `READ_VERSIONS` keep the order
that they began with, amendments included.
"""
READ_VERSIONS = (1, 2)
_FORMAT = "megatron_chatflow plan"
_CHUNK = 1 << 16


class BlendPlan:
    """Which sample of which domain is sample n of the run, for every n, without a table and without
    state.

    The plan is a list of segments: the curriculum it was made from and the amendments, none of
    which moves the past. See README.md beside this file.

    Args:
        curriculum: what share each domain has, when.
        num_samples: length of the run. With knots in absolute units it decides nothing before the
        end. global_batch_size: samples an iteration; read by `clock: iterations` alone. seq_length:
        tokens a sample; read by `clock: tokens` alone. capacities: samples that each domain can
        give in all; read by `on_exhausted: redistribute` alone. None: nothing runs out.

    Attributes:
        num_samples, global_batch_size, seq_length: as given.
        domain_names: the names that the numbers in `locate` stand for: sorted; domains that join
        later follow. domains: name -> `Domain`, in that order. on_exhausted: as the latest
        curriculum says. segments: tuple of `Segment`. version: of the order: `PLAN_VERSION` for a
        new plan, that of the ledger for one that was read.

    Raises:
        ValueError: a size is not positive, stages fall on one sample, or every domain runs out
        (`redistribute`).
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
        sizes = _sizes(num_samples, global_batch_size, seq_length)
        self._set(
            {}, curriculum, sizes, (_segment(curriculum, 0, sizes, capacities),), (), PLAN_VERSION
        )

    def _set(
        self,
        domains: Mapping[str, Domain],
        curriculum: Curriculum,
        sizes: tuple[int, int, int],
        segments: tuple[Segment, ...],
        past: Sequence[Interval],
        version: int,
    ) -> BlendPlan:
        """Fills the plan in: `past` are the pieces before the last segments that are known
        already.
        """
        self.version = version
        self.num_samples, self.global_batch_size, self.seq_length = sizes
        self.domains = {
            **domains,
            **{name: curriculum.domains[name] for name in sorted(curriculum.domains)},
        }
        self.domain_names = tuple(self.domains)
        self.on_exhausted = curriculum.on_exhausted
        self.segments = segments
        self._pieces = list(past)
        for i, segment in enumerate(segments):
            if past and segment.start < past[-1].end:
                continue
            stop = segments[i + 1].start if i + 1 < len(segments) else self.num_samples
            self._pieces += build_intervals(
                segment,
                self.domain_names,
                stop,
                self._pieces[-1] if self._pieces else None,
                version,
            )
        self._begins = [piece.begin for piece in self._pieces]
        return self

    def __repr__(self) -> str:
        stages = ", ".join(f"{name} from {first}" for name, first in self.stages)
        return f"BlendPlan({self.num_samples} samples of {', '.join(self.domain_names)}: {stages})"

    @property
    def curriculum(self) -> Curriculum:
        """The curriculum in force at the end of the run, with its stages in samples."""
        return _curriculum(self.domains, self.segments[-1].knots, self.on_exhausted)

    @property
    def stages(self) -> list[tuple[str, int]]:
        """(name, first sample) of every stage of the run, across all segments."""
        stages: list[tuple[str, int]] = []
        for i, segment in enumerate(self.segments):
            stop = self.segments[i + 1].start if i + 1 < len(self.segments) else self.num_samples
            for knot in segment.knots:
                if knot.at < stop and not (stages and stages[-1][0] == knot.name):
                    stages.append((knot.name, max(knot.at, segment.start)))
        return stages

    def stage_at(self, n: int) -> str:
        """The name of the stage that sample n is in."""
        self._check(n)
        segment = self.segments[bisect.bisect_right([s.start for s in self.segments], n) - 1]
        return next(knot.name for knot in reversed(segment.knots) if knot.at <= n)

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples start .. stop - 1.

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
        for piece in self._pieces[first : bisect.bisect_left(self._begins, stop)]:
            parts.append(piece.locate(max(start, piece.begin), min(stop, piece.end)))
        domains, ordinals = zip(*parts, strict=True)
        return np.concatenate(domains), np.concatenate(ordinals)

    def counts(self, n: int) -> np.ndarray:
        """How many of the first n samples each domain gets: int64 [K], adding up to n. Raises
        IndexError beyond the run.
        """
        return self._padded(self._piece(n).counts(n))

    def shares(self, n: int) -> np.ndarray:
        """The scheduled share of each domain at sample n: float64 [K], adding up to 1. Raises
        IndexError beyond the run.
        """
        return self._padded(self._piece(n).shares(n))

    def integral(self, n: int) -> np.ndarray:
        """The integral of the scheduled shares from 0 to n, which `counts(n)` follows: float64 [K],
        in samples. Raises IndexError beyond the run.
        """
        return self._padded(self._piece(n).integral_at(n))

    def amend(
        self,
        *,
        at: int,
        curriculum: Curriculum,
        num_samples: int | None = None,
        global_batch_size: int | None = None,
        capacities: Mapping[str, int] | None = None,
    ) -> BlendPlan:
        """The plan with the same past and another future.

        Args:
            at: the first sample that may change, 0 .. num_samples of this plan. Amendments that
            were to begin there or later are dropped. curriculum: what holds from there on. Its
            knots are absolute (percentages are of the run's whole length); what it says before `at`
                is not read. It may name new domains, and leave out old ones.
            num_samples, global_batch_size: when they change as well; `at` or more, positive.
            capacities: as for a new plan, counted from the start of the run; None: those of this
            plan.

        Raises:
            ValueError: `at` is not within the run, the run would end before it, or as for a new
            plan.
        """
        sizes = _sizes(
            self.num_samples if num_samples is None else num_samples,
            self.global_batch_size if global_batch_size is None else global_batch_size,
            self.seq_length,
        )
        capacities = self.segments[-1].capacities if capacities is None else capacities
        return self._amended(
            at, curriculum, sizes, lambda start: _segment(curriculum, start, sizes, capacities)
        )

    def amend_with(self, *, at: int, plan: BlendPlan) -> BlendPlan:
        """`amend`, with curriculum, sizes and capacities of another plan: its last segment, from
        sample `at` on.

        Raises:
            ValueError: the plans differ in seq_length, or as `amend`.
        """
        if plan.seq_length != self.seq_length:
            raise ConfigError(
                f"seq_length: {plan.seq_length}, and it was {self.seq_length}: samples "
                f"would be other tokens; keep {self.seq_length}"
            )
        sizes, segment = (
            (plan.num_samples, plan.global_batch_size, plan.seq_length),
            plan.segments[-1],
        )
        return self._amended(
            at,
            plan.curriculum,
            sizes,
            lambda start: replace(segment, start=start, knots=_in_force(segment.knots, start)),
        )

    def follow(self, plan: BlendPlan) -> BlendPlan:
        """This plan, its last segment replaced by what another plan says from there on: what a file
        stands for in a run that was amended.
        """
        return self.amend_with(at=self.segments[-1].start, plan=plan)

    def first_difference(self, other: BlendPlan, stop: int) -> int | None:
        """The first sample before `stop` for which two plans say another domain (by name) or
        ordinal; None: they agree. A run's end is a difference.

        Pieces that are defined alike are not looked at one by one, so this is quick whatever `stop`
        is; the rest is searched in order.
        """
        stop, end = operator.index(stop), min(stop, self.num_samples, other.num_samples)
        found = {name: i for i, name in enumerate(other.domain_names)}
        numbers = np.array([found.get(name, -1) for name in self.domain_names], np.int64)
        n = 0
        while n < end:
            mine, theirs = self._piece(n), other._piece(n)
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
        """The ledger: everything the plan is, in a size that does not depend on the length of the
        run. `from_json` reads it back.
        """
        ledger = {
            "format": _FORMAT,
            "version": self.version,
            "num_samples": self.num_samples,
            "global_batch_size": self.global_batch_size,
            "seq_length": self.seq_length,
            "on_exhausted": self.on_exhausted,
            "domains": {
                name: {k: v for k, v in asdict(domain).items() if k != "name"}
                for name, domain in self.domains.items()
            },
            "segments": [
                {
                    "start": segment.start,
                    "stages": [
                        {"name": k.name, "at": k.at, "ramp": k.ramp, "weights": dict(k.weights)}
                        for k in segment.knots
                    ],
                    **(
                        {}
                        if segment.capacities is None
                        else {"capacities": dict(segment.capacities)}
                    ),
                }
                for segment in self.segments
            ],
        }
        return json.dumps(ledger, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> BlendPlan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: the text is no plan, is damaged, or is of another version, which would order
            the samples differently.
        """
        try:
            ledger = load_json(text)
        except ChatflowError:
            raise ConfigError(
                "the plan is not valid JSON; restore plan.json from the checkpoint"
            ) from None
        if not isinstance(ledger, dict) or ledger.get("format") != _FORMAT:
            raise ConfigError(
                f"format: {_FORMAT!r} is expected in a plan; give the plan.json of a run"
            )
        if ledger.get("version") not in READ_VERSIONS:
            raise ConfigError(
                f"version: the plan is of version {ledger.get('version')!r} and this "
                f"program orders samples by versions "
                f"{' and '.join(map(str, READ_VERSIONS))}; continue with the release that "
                f"wrote it, or start a new run"
            )
        try:
            sizes = _sizes(ledger["num_samples"], ledger["global_batch_size"], ledger["seq_length"])
            domains = {name: Domain(name, **entry) for name, entry in ledger["domains"].items()}
            segments = tuple(
                Segment(
                    s["start"],
                    tuple(PlannedStage(**knot) for knot in s["stages"]),
                    s.get("capacities"),
                )
                for s in ledger["segments"]
            )
            _check_domains(domains.values())
            _check_segments(segments, sizes[0], domains, ledger["on_exhausted"])
            curriculum = _curriculum(domains, segments[-1].knots, ledger["on_exhausted"])
            return cls.__new__(cls)._set(
                domains, curriculum, sizes, segments, (), ledger["version"]
            )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            problem = (
                f"the plan is damaged ({type(error).__name__}: {error}); restore plan.json from "
                f"the checkpoint"
            )
            raise ConfigError(visible(problem)) from None

    def fingerprint(self) -> str:
        """SHA-256 of what decides the order of the samples, as hex. Two plans of one fingerprint
        are the same function.

        Paths, the order in which files list domains, names of stages, the scale of the weights and
        `global_batch_size` play no part in it.
        """
        content = [
            self.version,
            self.num_samples,
            self.seq_length,
            [
                [
                    s.start,
                    [
                        [k.at, grid_shares(k.weights), k.ramp if i else ""]
                        for i, k in enumerate(s.knots)
                    ],
                    s.capacities and dict(s.capacities),
                ]
                for s in self.segments
            ],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _amended(
        self,
        at: int,
        curriculum: Curriculum,
        sizes: tuple[int, int, int],
        segment: Callable[[int], Segment],
    ) -> BlendPlan:
        at = operator.index(at)
        if not 0 <= at <= self.num_samples:
            raise ConfigError(
                f"at: sample {at} is not within the plan's {self.num_samples}; amend at a "
                f"sample of the run"
            )
        if sizes[0] < at or sizes[0] < 1:
            raise ConfigError(
                f"num_samples: {sizes[0]} is before sample {at}, from which the plan is "
                f"amended; give at least {max(at, 1)}"
            )
        past = [
            piece if piece.end <= at else replace(piece, end=at)
            for piece in self._pieces
            if piece.begin < at
        ]
        kept = [s for s in self.segments if s.start < at]
        if kept:
            kept[-1] = replace(kept[-1], knots=_until(kept[-1].knots, at))
        return BlendPlan.__new__(BlendPlan)._set(
            self.domains, curriculum, sizes, (*kept, segment(at)), past, self.version
        )

    def _check(self, n: int) -> None:
        if not 0 <= operator.index(n) <= self.num_samples:
            raise IndexError(f"sample {n} is not within the run's {self.num_samples}")

    def _piece(self, n: int) -> Interval:
        self._check(n)
        return self._pieces[bisect.bisect_right(self._begins, n) - 1]

    def _padded(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [values, np.zeros(len(self.domain_names) - len(values), values.dtype)]
        )


def _sizes(num_samples: int, global_batch_size: int, seq_length: int) -> tuple[int, int, int]:
    sizes = {
        "num_samples": num_samples,
        "global_batch_size": global_batch_size,
        "seq_length": seq_length,
    }
    for key, value in sizes.items():
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ConfigError(f"{key}: {value!r} is not a positive whole number; give at least 1")
        if value > MOST_SAMPLES:
            raise ConfigError(f"{key}: {value} is more than 2^53; give a smaller number")
    return tuple(operator.index(value) for value in sizes.values())


def _segment(
    curriculum: Curriculum,
    start: int,
    sizes: tuple[int, int, int],
    capacities: Mapping[str, int] | None,
) -> Segment:
    knots = resolve_stages(
        curriculum, num_samples=sizes[0], global_batch_size=sizes[1], seq_length=sizes[2]
    )
    if curriculum.on_exhausted != "redistribute" or capacities is None:
        return Segment(start, _in_force(knots, start))
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
        _in_force(knots, start),
        {
            name: min(operator.index(capacities[name]), MOST_SAMPLES)
            for name in sorted(curriculum.domains)
        },
    )


def _in_force(knots: tuple[PlannedStage, ...], start: int) -> tuple[PlannedStage, ...]:
    """The knots from the one in force at sample `start` on."""
    return knots[max(i for i, knot in enumerate(knots) if knot.at <= start) :]


def _until(knots: tuple[PlannedStage, ...], stop: int) -> tuple[PlannedStage, ...]:
    """The knots that decide anything before sample `stop`: those before it, and the one after that
    they move to.
    """
    return knots[: 1 + next((i for i, knot in enumerate(knots) if knot.at >= stop), len(knots))]


def _check_domains(domains: Iterable[Domain]) -> None:
    """Raises KeyError where a ledger says what no plan writes."""
    for domain in domains:
        sound = (
            valid_name(domain.name)
            and isinstance(domain.path, str)
            and domain.kind in KINDS
            and isinstance(domain.valid, str | None)
            and isinstance(domain.train_on_prompt, bool)
            and (
                domain.max_epochs is None
                or (type(domain.max_epochs) in (int, float) and 0 < domain.max_epochs <= 1e300)
            )
        )
        if not sound:
            raise KeyError(domain.name)


def _check_segments(
    segments: Sequence[Segment], num_samples: int, domains: Mapping[str, Domain], on_exhausted: str
) -> None:
    """Raises KeyError where a ledger says what no plan writes."""
    starts = [segment.start for segment in segments]
    knots = [knot for segment in segments for knot in segment.knots]
    sound = (
        on_exhausted in ON_EXHAUSTED
        and starts[0] == 0
        and all(a < b for a, b in itertools.pairwise(starts))
        and starts[-1] <= num_samples
        and all(segment.knots[0].at <= segment.start for segment in segments)
        and all(a.at < b.at for segment in segments for a, b in itertools.pairwise(segment.knots))
        and all(type(place) is int for place in (*starts, *(knot.at for knot in knots)))
        and all(
            valid_ramp(knot.ramp) and knot.weights and domains.keys() >= knot.weights.keys()
            for knot in knots
        )
        and all(
            type(weight) in (int, float) and 0 < weight <= 1e300
            for knot in knots
            for weight in knot.weights.values()
        )
        and all(isinstance(knot.name, str) for knot in knots)
        and all(
            segment.capacities is None
            or (
                domains.keys() >= segment.capacities.keys()
                and all(
                    type(value) is int and 0 <= value <= MOST_SAMPLES
                    for value in segment.capacities.values()
                )
            )
            for segment in segments
        )
    )
    if not sound:
        raise KeyError("segments")


def _curriculum(
    domains: Mapping[str, Domain], knots: Sequence[PlannedStage], on_exhausted: str
) -> Curriculum:
    stages = tuple(Stage(knot.name, knot.at, knot.weights, knot.ramp) for knot in knots)
    return Curriculum("samples", domains, stages, on_exhausted, "plan")
