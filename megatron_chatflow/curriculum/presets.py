"""Presets: curricula of published recipes, written with roles instead of the names of domains.

A file that says `preset: {name: replay-30, source: en, target: zh}` has the stages that the preset
means, with the domains in place of the roles. The ledger of a run keeps these stages, so a later
change of a definition here does not change a run that has begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_chatflow.curriculum.checks import Fail, check_choice, kind_name, suggestion
from megatron_chatflow.curriculum.ramps import valid_ramp
from megatron_chatflow.curriculum.schema import Curriculum, Domain, Preset, Stage

ROLES = ("source", "target", "parallel", "instruct")


@dataclass(frozen=True)
class Definition:
    """What a preset means, with roles in place of domains."""

    paper: str
    stages: tuple[Stage, ...]
    published: str
    """Which of its numbers and properties are the paper's."""
    ours: str
    """Which are this project's, because the paper gives none."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Return the roles that it reads, which a file must give."""
        return tuple(r for r in ROLES if any(r in stage.weights for stage in self.stages))


PRESETS: Mapping[str, Definition] = {
    "chatflow": Definition(
        "arXiv 2405.10626",
        (
            Stage("source", 0, {"source": 0.65, "parallel": 0.30, "target": 0.05}),
            Stage(
                "bilingual",
                40,
                {"source": 0.25, "parallel": 0.20, "target": 0.55},
                "root2",
                relative=True,
            ),
            Stage(
                "instruct",
                80,
                {"source": 0.15, "parallel": 0.10, "target": 0.35, "instruct": 0.40},
                relative=True,
            ),
        ),
        "one run in which source and parallel text have high shares at first, and target and "
        "instruction text grow",
        "all shares, knots and ramps: the paper gives neither its shares nor the equation of its "
        "sampler; its growth is complete after 5M samples, here at 80% of the run",
    ),
    "english-first-10": Definition(
        "arXiv 2506.00288",
        (
            Stage("source", 0, {"source": 0.2, "target": 0.8}),
            Stage("target", 10, {"target": 1.0}, "step", relative=True),
        ),
        "source text in the first 10% of the steps only",
        "its share of 0.2 there: that of the paper's runs with source text throughout",
    ),
    "replay-30": Definition(
        "arXiv 2407.02118",
        (Stage("replay", 0, {"source": 0.3, "target": 0.7}),),
        "replay of 5 to 30% of source text is recommended",
        "the choice of 30%, the upper end",
    ),
}


def parse_preset(entry: Any, domains: Mapping[str, Domain], fail: Fail) -> Preset:
    """Check the key `preset` of a curriculum file and expand it; `fail` raises what is wrong."""
    if not isinstance(entry, Mapping):
        fail(
            "preset",
            f"a mapping is expected, found {kind_name(entry)}",
            "write `{name: replay-30, source: en, target: zh}`",
        )
    if "name" not in entry:
        fail("preset.name", "it is missing", f"write one of {', '.join(PRESETS)}")
    name = check_choice(entry["name"], tuple(PRESETS), "preset.name", fail)
    definition = PRESETS[name]
    roles: dict[str, str] = {}
    for role, domain in entry.items():
        if role == "name":
            continue
        key = f"preset.{role}"
        if role not in ROLES:
            advice = f"the roles are {', '.join(ROLES)}"
            fail(key, f"unknown role{suggestion(role, ROLES)}", advice)
        if not isinstance(domain, str) or domain not in domains:
            near = suggestion(domain, domains)
            fail(
                key,
                f"domain {domain!r} is unknown{near}",
                "name it under domains, or correct the name",
            )
        other = next((r for r, d in roles.items() if d == domain), None)
        if other:
            fail(key, f"domain {domain!r} is already the {other}", "give each role its own domain")
        roles[role] = domain
    missing = [role for role in definition.roles if role not in roles]
    if missing:
        fail(
            f"preset.{missing[0]}",
            f"it is missing, and preset {name} reads {', '.join(definition.roles)}",
            f"write `{missing[0]}: DOMAIN` with a domain of this file",
        )
    return Preset(name, roles, expand(definition, roles))


def expand(definition: Definition, roles: Mapping[str, str]) -> tuple[Stage, ...]:
    """Return the stages of a definition with the domains in place of the roles."""
    return tuple(
        replace(stage, weights={roles[role]: weight for role, weight in stage.weights.items()})
        for stage in definition.stages
    )


def keep_expansion(curriculum: Curriculum, kept: Preset | None) -> Curriculum:
    """Return the curriculum of a resumed run: the preset's stages are those of its ledger.

    Args:
        curriculum: the file.
        kept: the preset of the ledger.

    Returns:
        The curriculum unchanged, unless it uses the same preset with the same roles; then the
        stages that this preset meant when the run began to follow it.
    """
    wanted = curriculum.preset
    if wanted is None or kept is None or (wanted.name, wanted.roles) != (kept.name, kept.roles):
        return curriculum
    return replace(curriculum, stages=kept.stages, preset=kept)


def preset_lines(preset: Preset) -> Iterator[str]:
    """Yield lines that show what a preset means, and which of its numbers are the paper's."""
    definition = PRESETS.get(preset.name)
    paper = f" ({definition.paper})" if definition else ""
    yield f"preset {preset.name}{paper}: {_shown(preset.roles)}"
    for i, stage in enumerate(preset.stages):
        weights = ", ".join(f"{domain}: {weight:g}" for domain, weight in stage.weights.items())
        ramp = f", ramp: {stage.ramp}" if i else ""
        at = f"{stage.at:g}{'%' * stage.relative}"
        yield f"  - {{name: {stage.name}, at: {at}, weights: {{{weights}}}{ramp}}}"
    if definition is None or expand(definition, preset.roles) != preset.stages:
        yield "  the run keeps these stages; this release defines the preset otherwise"
        return
    yield f"  of the paper: {definition.published}"
    yield f"  ours: {definition.ours}"
    unread = {r: d for r, d in preset.roles.items() if r not in definition.roles}
    if unread:
        yield f"  without a share in this preset: {_shown(unread)}"


def read_preset(content: Any, domains: Mapping[str, Domain]) -> Preset:
    """Return the preset that a ledger holds.

    Raises:
        KeyError, TypeError, AttributeError: no ledger holds this.
    """
    stages = tuple(Stage(**stage) for stage in content["stages"])
    valid = (
        set(content["roles"]) <= set(ROLES)
        and set(content["roles"].values()) <= set(domains)
        and isinstance(content["name"], str)
        and stages
        and all(
            isinstance(stage.name, str)
            and type(stage.at) in (int, float)
            and 0 <= stage.at <= 1e300
            and isinstance(stage.relative, bool)
            and valid_ramp(stage.ramp)
            and set(stage.weights) <= set(domains)
            and all(type(w) in (int, float) and 0 < w <= 1e300 for w in stage.weights.values())
            for stage in stages
        )
    )
    if not valid:
        raise KeyError("preset")
    return Preset(content["name"], content["roles"], stages)


def _shown(roles: Mapping[str, str]) -> str:
    return ", ".join(f"{role} {domain}" for role, domain in roles.items())
