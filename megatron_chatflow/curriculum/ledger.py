"""The ledger of a run, `plan.json`: the segments of a plan as JSON, written and checked on reading.

Its size does not depend on the length of the run. A ledger keeps the version of the order that it
began with, so a run that has begun never changes its order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_chatflow.curriculum.intervals import Segment
from megatron_chatflow.curriculum.presets import read_preset
from megatron_chatflow.curriculum.ramps import valid_ramp
from megatron_chatflow.curriculum.schedule import PlannedStage, RunSizes
from megatron_chatflow.curriculum.schema import (
    KINDS,
    MOST_SAMPLES,
    ON_EXHAUSTED,
    Domain,
    Preset,
)
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.utils.user_files import load_json, valid_name, visible

PLAN_VERSION = 2
"""Raised by every change that moves the order of samples.

Ledgers of `READ_VERSIONS` keep the order that they began with, amendments included.
"""
READ_VERSIONS = (1, 2)
_FORMAT = "megatron_chatflow plan"


@dataclass(frozen=True)
class Ledger:
    """What a plan is made of."""

    version: int
    sizes: RunSizes
    on_exhausted: str
    domains: Mapping[str, Domain]
    segments: tuple[Segment, ...]
    preset: Preset | None = None
    """What the curriculum in force was expanded from, so that a resumed run keeps the expansion."""

    def to_json(self) -> str:
        """Return the ledger as JSON, which `read_ledger` reads back."""
        content = {
            "format": _FORMAT,
            "version": self.version,
            **self.sizes._asdict(),
            "on_exhausted": self.on_exhausted,
            "domains": {
                name: {k: v for k, v in asdict(domain).items() if k != "name"}
                for name, domain in self.domains.items()
            },
            "segments": [
                {
                    "start": segment.start,
                    "stages": [
                        {"name": s.name, "at": s.at, "ramp": s.ramp, "weights": dict(s.weights)}
                        for s in segment.stages
                    ],
                    **(
                        {}
                        if segment.capacities is None
                        else {"capacities": dict(segment.capacities)}
                    ),
                }
                for segment in self.segments
            ],
            **({"preset": asdict(self.preset)} if self.preset else {}),
        }
        return json.dumps(content, ensure_ascii=False)


def read_ledger(text: str) -> Ledger:
    """Return the ledger that `Ledger.to_json` wrote.

    Raises:
        ConfigError: the text is not a ledger, is damaged, or is of a version that this program
            would order differently.
    """
    try:
        content = load_json(text)
    except ChatflowError:
        raise ConfigError(
            "the plan is not valid JSON; restore plan.json from the checkpoint"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"format: {_FORMAT!r} is expected in a plan; give the plan.json of a run")
    if content.get("version") not in READ_VERSIONS:
        raise ConfigError(
            f"version: the plan is of version {content.get('version')!r} and this "
            f"program orders samples by versions "
            f"{' and '.join(map(str, READ_VERSIONS))}; continue with the release that "
            f"wrote it, or start a new run"
        )
    try:
        sizes = RunSizes.checked(
            content["num_samples"], content["global_batch_size"], content["seq_length"]
        )
        domains = {name: Domain(name, **entry) for name, entry in content["domains"].items()}
        segments = tuple(
            Segment(
                s["start"],
                tuple(PlannedStage(**stage) for stage in s["stages"]),
                s.get("capacities"),
            )
            for s in content["segments"]
        )
        _check_domains(domains.values())
        _check_segments(segments, sizes.num_samples, domains, content["on_exhausted"])
        preset = content.get("preset")
        return Ledger(
            content["version"],
            sizes,
            content["on_exhausted"],
            domains,
            segments,
            None if preset is None else read_preset(preset, domains),
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        problem = (
            f"the plan is damaged ({type(error).__name__}: {error}); restore plan.json from "
            f"the checkpoint"
        )
        raise ConfigError(visible(problem)) from None


def _check_domains(domains: Iterable[Domain]) -> None:
    """Raise KeyError for a domain that no plan writes."""
    for domain in domains:
        valid = (
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
        if not valid:
            raise KeyError(domain.name)


def _check_segments(
    segments: Sequence[Segment], num_samples: int, domains: Mapping[str, Domain], on_exhausted: str
) -> None:
    """Raise KeyError for segments that no plan writes."""
    starts = [segment.start for segment in segments]
    stages = [stage for segment in segments for stage in segment.stages]
    valid = (
        on_exhausted in ON_EXHAUSTED
        and starts[0] == 0
        and all(a < b for a, b in itertools.pairwise(starts))
        and starts[-1] <= num_samples
        and all(segment.stages[0].at <= segment.start for segment in segments)
        and all(a.at < b.at for segment in segments for a, b in itertools.pairwise(segment.stages))
        and all(type(place) is int for place in (*starts, *(stage.at for stage in stages)))
        and all(
            valid_ramp(stage.ramp) and stage.weights and domains.keys() >= stage.weights.keys()
            for stage in stages
        )
        and all(
            type(weight) in (int, float) and 0 < weight <= 1e300
            for stage in stages
            for weight in stage.weights.values()
        )
        and all(isinstance(stage.name, str) for stage in stages)
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
    if not valid:
        raise KeyError("segments")
