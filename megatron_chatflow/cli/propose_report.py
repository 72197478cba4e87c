"""What `chatflow propose` prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from megatron_chatflow.curriculum import check_exhaustion, parse_curriculum
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.interpolation import Comparison
from megatron_chatflow.planner.laws.loss_models import LossModels
from megatron_chatflow.planner.proposal import (
    KL_WEIGHT,
    Problem,
    Solution,
    effective_shares,
)
from megatron_chatflow.planner.proposal_file import proposal_text
from megatron_chatflow.report import columns, console
from megatron_chatflow.utils.files import write_atomically


def law_lines(models: LossModels, tokens: int | None) -> Iterator[str]:
    """Yield what the laws are of, and whether they are better than straight interpolation."""
    at = f" at {models.params:,} parameters and {models.tokens:,} tokens" if models.params else ""
    yield (
        f"{models.form} laws of {models.source}{at}: {len(models.measured)} runs, losses in "
        f"{models.unit}"
    )
    if models.form == "mixture" and tokens and models.tokens and tokens != models.tokens:
        yield (
            f"note: the runs have {models.tokens:,} tokens and this one {tokens:,}: compare "
            f"mixtures by the law, and do not expect its losses"
        )
    for line in models.notes:
        yield f"note: {line}"
    for language, found in models.comparisons.items():
        yield f"  {language}: {_verdict(found)}"


def _verdict(found: Comparison) -> str:
    if not found.runs:
        return (
            "no run is inside of the measured range of the others, so straight interpolation "
            "cannot be compared"
        )
    which = (
        "straight interpolation between the runs is as good as the law"
        if found.straight_is_as_good
        else "the law is better than straight interpolation"
    )
    return (
        f"{which} inside of the measured range, by the {found.runs} left-out runs that are inside "
        f"of that of the others (root mean square error: law {found.law:.3g}, interpolation "
        f"{found.straight:.3g})" + ("; too few to rely on" if found.runs < 5 else "")
    )


def prediction_lines(
    models: LossModels, shares: np.ndarray, available: Mapping[str, float], tokens: int | None
) -> Iterator[str]:
    """Yield the predicted loss of each language for a mixture [K], with its interval."""
    mixture = ", ".join(
        f"{name} {x:.4g}" for name, x in zip(models.domains, shares, strict=True) if x > 0
    )
    yield f"mixture: {mixture}"
    yield from _position(models, shares)
    effective = effective_shares(shares, _new_text(models, available, tokens))[0]
    lost = float((shares - effective).sum())
    if lost > 1e-9:
        yield f"repeated text: {lost:.1%} of the tokens are worth nothing new"
    yield from _loss_table(models, [("predicted", shares, effective)])


def say_proposal(
    models: LossModels,
    problem: Problem,
    solution: Solution,
    available: Mapping[str, float],
    tokens: int | None,
) -> None:
    """Print the shares, the predicted losses and what limits them."""
    for stage, shares in zip(problem.stages, solution.shares, strict=True):
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in stage.weights.items())
        if len(problem.stages) > 1:
            console.say(f"stage {stage.name}, {stage.length:.1%} of the run (weights: {weights})")
        else:
            console.say(f"proposed shares (weights: {weights})")
        low, high = models.measured.min(axis=0), models.measured.max(axis=0)
        rows = [("domain", "share", "floor", "cap", "prior", "epochs", "measured")]
        for j, name in enumerate(problem.domains):
            epochs = "-"
            if tokens and available.get(name):
                epochs = f"{shares[j] * stage.length * tokens / available[name]:.2f}"
            rows.append(
                (
                    name,
                    f"{shares[j]:.4f}",
                    f"{problem.floors[j]:.4g}" if problem.floors[j] else "-",
                    f"{problem.caps[j]:.4g}" if problem.caps[j] < 1 else "-",
                    f"{problem.prior[j]:.4f}",
                    epochs,
                    f"{low[j]:.3g} to {high[j]:.3g}",
                )
            )
        _say_rows(rows)
        new = problem.new_text if len(problem.stages) == 1 else np.full(len(shares), np.inf)
        mixtures = [
            (label, x, effective_shares(x, new)[0])
            for label, x in (("predicted", shares), ("at the prior", problem.prior))
        ]
        for line in (*_position(models, shares), *_loss_table(models, mixtures)):
            console.say(line)
    if len(problem.stages) > 1:
        console.say(
            "note: the laws are of runs with one mixture: the losses of a stage are those of a run "
            "that had its shares throughout, without the repetition discount"
        )
    for what, names in (("cap", solution.at_cap), ("floor", solution.at_floor)):
        if names:
            console.say(f"at the {what}: {', '.join(names)}")


def write_proposal(
    args: argparse.Namespace,
    config: Any,
    models: LossModels,
    problem: Problem,
    solution: Solution,
    inputs: Any,
    tokens: int | None,
) -> None:
    """Write the curriculum file, after checking that the run can follow it.

    Raises:
        ConfigError: a domain cannot give what the file asks for.
    """
    from megatron_chatflow.training.data_setup import make_plan

    unknown = [name for name in inputs.curriculum.domains if name not in problem.domains]
    text = proposal_text(
        inputs.curriculum.to_mapping(),
        problem,
        solution,
        head=list(_head(models, problem, solution, unknown, tokens)),
        reasons={name: _reason(models, problem, solution, name) for name in problem.domains},
        max_epochs={name: args.max_epochs for name in problem.domains},
    )
    curriculum = parse_curriculum(
        yaml.safe_load(text), source=str(args.output), folder=args.output.parent
    )
    check_exhaustion(make_plan(config, curriculum, inputs.epoch_samples), inputs.epoch_samples)
    try:
        write_atomically(args.output, text)
    except OSError as error:
        raise ConfigError(f"{args.output}: {error.strerror}; give another --output") from None
    console.say(
        f"{args.output}: {len(problem.stages)} stage{'s' * (len(problem.stages) > 1)} of "
        f"{len(problem.domains)} domains written; `chatflow plan --curriculum {args.output}` "
        f"shows it"
    )


def _head(
    models: LossModels,
    problem: Problem,
    solution: Solution,
    unknown: Sequence[str],
    tokens: int | None,
) -> Iterator[str]:
    yield f"Proposed by chatflow propose from {models.source} ({models.form} laws,"
    yield f"{len(models.measured)} runs), for a run of {tokens:,} tokens. The shares minimize"
    yield f"the weighted predicted losses + {KL_WEIGHT} KL(shares || prior), arXiv 2602.12237."
    for stage, shares in zip(problem.stages, solution.shares, strict=True):
        for language, weight in stage.weights.items():
            new = problem.new_text if len(problem.stages) == 1 else np.full(len(shares), np.inf)
            effective, slope = effective_shares(shares, new)
            model = models.models[language]
            loss = model.value_and_gradient(shares, effective, slope)[0]
            low, high = model.interval(shares, effective)
            yield (
                f"{stage.name}: {language} (weight {weight:.3g}) {loss:.4f} predicted, "
                f"{low:.4f} to {high:.4f} (95%), {models.unit}"
            )
        yield from (f"{stage.name}: {line}" for line in _position(models, shares))
    if unknown:
        yield f"Not in the table of runs, so without a share: {', '.join(unknown)}."


def _reason(models: LossModels, problem: Problem, solution: Solution, name: str) -> str:
    j = problem.domains.index(name)
    low, high = models.measured[:, j].min(), models.measured[:, j].max()
    parts = [f"measured {low:.3g} to {high:.3g}", f"prior {problem.prior[j]:.3g}"]
    if name in solution.at_floor:
        parts.insert(0, f"at its floor of {problem.floors[j]:g} (--floors)")
    if name in solution.at_cap:
        parts.insert(0, f"at its cap: {problem.reasons.get(name, '')}")
    return ", ".join(parts)


def _position(models: LossModels, shares: np.ndarray) -> list[str]:
    """Return a line that says whether a mixture is inside of the measured range."""
    beyond = models.outside(shares)
    if beyond:
        return [f"outside of the measured range: {', '.join(beyond)}"]
    if not models.inside(shares):
        return ["outside of the measured range: each share was measured, this mixture was not"]
    return ["inside of the measured range"]


def _new_text(models: LossModels, available: Mapping[str, float], tokens: int | None) -> np.ndarray:
    if not tokens:
        return np.full(len(models.domains), np.inf)
    return np.array([available.get(name, np.inf) / tokens for name in models.domains])


def _loss_table(
    models: LossModels, mixtures: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> Iterator[str]:
    """Yield rows of losses; each mixture is a label, shares and effective shares."""
    head = ["loss"]
    for label, _, _ in mixtures:
        head += [label, "95% interval"]
    rows = [tuple(head)]
    for language, model in models.models.items():
        cells = [language or "loss"]
        for _, shares, effective in mixtures:
            loss = model.value_and_gradient(shares, effective, np.ones(len(shares)))[0]
            low, high = model.interval(shares, effective)
            cells += [f"{loss:.4f}", f"{low:.4f} to {high:.4f}"]
        rows.append(tuple(cells))
    widths = columns.widths(rows)
    yield from (columns.line(row, widths) for row in rows)


def _say_rows(rows: Sequence[Sequence[str]]) -> None:
    widths = columns.widths(rows)
    for row in rows:
        console.say(columns.line(row, widths))
