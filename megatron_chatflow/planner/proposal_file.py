"""The curriculum file of a proposal, with comments that say where each number is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_chatflow.planner.proposal import Problem, Solution

_DIGITS = 6


def proposal_text(
    base: Mapping[str, Any],
    problem: Problem,
    solution: Solution,
    *,
    head: Sequence[str],
    reasons: Mapping[str, str],
    max_epochs: Mapping[str, float],
) -> str:
    """Return a curriculum file.

    Args:
        base: the file whose domains and other keys are kept (`Curriculum.to_mapping`).
        problem: what was minimized.
        solution: the proposed shares.
        head: lines of the comment at the top.
        reasons: {domain: comment on its share}.
        max_epochs: {domain: cap to write where `base` has none}.
    """
    lines = [f"# {line}" for line in head]
    lines += [f"clock: {base['clock']}", "domains:"]
    for name, entry in base["domains"].items():
        entry, comment = dict(entry), ""
        if "max_epochs" not in entry and name in max_epochs:
            entry["max_epochs"], comment = max_epochs[name], "  # max_epochs: --max-epochs"
        lines.append(f"  {_flow(name)}: {_flow(entry)}{comment}")
    lines.append("stages:")
    at = 0.0
    for stage, shares in zip(problem.stages, solution.shares, strict=True):
        lines.append(f"  - name: {_flow(stage.name)}")
        lines.append(f"    at: {f'{100 * at:.10g}%' if at else 0}")
        if at:
            lines.append("    ramp: step")
        lines.append("    weights:")
        for name, share in zip(problem.domains, shares, strict=True):
            weight = round(float(share), _DIGITS)
            if name in base["domains"] and weight > 0:
                lines.append(f"      {_flow(name)}: {weight:.{_DIGITS}f}  # {reasons[name]}")
        at = round(at + stage.length, 12)
    lines.append(f"on_exhausted: {base['on_exhausted']}")
    if "validation" in base:
        lines.append("validation:")
        lines += [f"  {_flow(name)}: {_flow(entry)}" for name, entry in base["validation"].items()]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
