"""The content of a curriculum file, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

CLOCKS = ("samples", "iterations", "tokens")
KINDS = ("text", "instruct")
ON_EXHAUSTED = ("repeat", "redistribute", "stop", "error")
MOST_SAMPLES = 1 << 53
"""Of a run: above it, float64 skips integers."""


@dataclass(frozen=True)
class Domain:
    """A named member of the blend."""

    name: str
    path: str
    """Prefix of its .bin/.idx."""
    kind: str = "text"
    """text | instruct."""
    max_epochs: float | None = None
    """How often it may be read at most; None: no limit."""
    valid: str | None = None
    """Prefix of its separate validation corpus; then all of `path` is trained on.

    None: the split cuts `path`.
    """
    train_on_prompt: bool = False
    """Whether prompts of conversations are trained on like the answers (kind instruct only)."""


@dataclass(frozen=True)
class Stage:
    """The weights from one point of the run on, unless the ramp of the next stage moves them."""

    name: str
    at: int | float
    """In the clock's unit; a percentage of the run where `relative`."""
    weights: Mapping[str, float]
    """As the user wrote them; a domain that is not named has weight 0."""
    ramp: str = "linear"
    """How the shares move from the stage before to this one."""
    relative: bool = False

    def sample(self, per_unit: Fraction, num_samples: int) -> int:
        """Return the sample at which the stage begins, rounded to the nearest (halves up)."""
        exact = Fraction(str(self.at))
        return int(
            exact * num_samples / 100 + Fraction(1, 2)
            if self.relative
            else exact * per_unit + Fraction(1, 2)
        )


@dataclass(frozen=True)
class Preset:
    """A preset as a curriculum file uses it, with the stages that it means there."""

    name: str
    roles: Mapping[str, str]
    """Domain by role: source, target, parallel, instruct."""
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Curriculum:
    """The content of a curriculum file, checked: the shares of the domains over the run."""

    clock: str
    """samples | iterations | tokens: the unit of `Stage.at`."""
    domains: Mapping[str, Domain]
    """In the file's order, which decides nothing."""
    stages: tuple[Stage, ...]
    on_exhausted: str = "repeat"
    """What happens when a domain runs out: repeat | redistribute | stop | error."""
    source: str = "curriculum"
    """What error messages call it: the file it came from."""
    validation: Mapping[str, Domain] = field(default_factory=dict)
    """Named validation sets, read in full and never trained on."""
    preset: Preset | None = field(default=None, compare=False)
    """The preset that `stages` was expanded from; None: the file has stages."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the curriculum as plain types, as in a YAML file, with a preset as its stages.

        `parse_curriculum` reads it back.
        """
        domains = {}
        for name, domain in self.domains.items():
            cap = {} if domain.max_epochs is None else {"max_epochs": domain.max_epochs}
            valid = {} if domain.valid is None else {"valid": domain.valid}
            prompts = {"train_on_prompt": True} if domain.train_on_prompt else {}
            domains[name] = {"path": domain.path, "kind": domain.kind, **cap, **valid, **prompts}
        stages = [
            {
                "name": s.name,
                "at": f"{s.at}%" if s.relative else s.at,
                "weights": dict(s.weights),
                **({"ramp": s.ramp} if i else {}),
            }
            for i, s in enumerate(self.stages)
        ]
        sets = {
            name: {"path": entry.path, "kind": entry.kind}
            for name, entry in self.validation.items()
        }
        held_out = {"validation": sets} if sets else {}
        return {
            "clock": self.clock,
            "domains": domains,
            "stages": stages,
            "on_exhausted": self.on_exhausted,
            **held_out,
        }
