"""Whether runs determine the constants of a law, and which further runs would determine most.

A sum of two powers is in theory determined by runs on a line D = c N, but not at any noise that
runs have, and nothing says which power belongs to N. Such designs are refused before a fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.forms import (
    LENGTH,
    SIZE,
    Array,
    Basis,
    Form,
    Variable,
    basis_of,
    losses_of,
)
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.planner.laws.solver import starts
from megatron_chatflow.report.law_table import short

_SAME = 0.02
"""Logarithms closer than this are one level of a variable: batches round lengths by a percent."""
_THIN = 0.05
"""Logarithms that deviate less than this (root mean square) from a level or a line are on it."""
_SINGULAR = 1e-7
"""Singular values of the scaled Jacobian below this are zero."""
_NOISE = 0.003
"""Standard deviation of log loss that designs are compared at."""
_PRIOR = {"coefficient": 2.0, "exponent": 0.3}
"""Standard deviations that stand in for what the runs do not determine."""


class DesignError(ConfigError):
    """The runs do not determine a constant of the law."""


@dataclass(frozen=True)
class Proposal:
    """A run that would determine the law better."""

    run: RunRecord
    shrinks: float
    """By which factor it shrinks the volume of the confidence ellipsoid."""


def check_design(form: Form, runs: Sequence[RunRecord], metric: str = "loss") -> None:
    """Refuse runs that do not determine the constants of a form.

    Args:
        form: the law.
        runs: with losses.
        metric: ``loss`` or ``bits_per_byte``.

    Raises:
        DesignError: which constants cannot be determined, and why.
    """
    found = next(problems(form, runs, metric), None)
    if found is not None:
        raise DesignError(found)


def problems(form: Form, runs: Sequence[RunRecord], metric: str = "loss") -> Iterator[str]:
    """Yield what the runs do not determine, the plainest reason first."""
    missing = [kind for kind in form.kinds if all(run.kind != kind for run in runs)]
    if missing:
        names = [
            name
            for term in form.terms
            if term.kind in missing
            for name in (term.coefficient, *(p.exponent for p in term.powers))
            if name in form.constants
        ]
        if names:
            yield f"no run is {missing[0]}, so {_list(names)} cannot be determined"
            return
    yield from _levels(form, runs)
    yield from _lines(form, runs)
    if len(runs) <= len(form.constants):
        yield (
            f"{len(runs)} runs for the {len(form.constants)} constants of the {form.name} form "
            f"({_list(form.constants)}); {len(form.constants) + 1} are the least"
        )
    else:
        yield from _rank(form, runs, metric)


def _levels(form: Form, runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the exponents whose variable has one value in all runs of their terms."""
    for term in form.terms:
        active = [run for run in runs if term.active(run)]
        for power in term.powers:
            if power.exponent not in form.constants:
                continue
            values = np.array([power.variable.log(run) for run in active])
            if values.std() < _THIN:
                what = f"{term.kind} run" if term.kind else "run"
                value = f"{power.variable.name} = {short(math.exp(values.mean()))}"
                yield (
                    f"every {what} has one {power.variable.what} ({value}), so {power.exponent} "
                    f"and {term.coefficient} cannot be distinguished"
                )


def _lines(form: Form, runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the exponents of variables that are powers of each other in all runs."""
    groups: list[tuple[str | None, list[RunRecord]]] = [
        (kind, [run for run in runs if run.kind == kind]) for kind in form.kinds
    ] or [(None, list(runs))]
    on_line: list[str] = []
    for kind, group in groups:
        terms = [t for t in form.terms if group and t.active(group[0])]
        powers = {p.exponent: p for t in terms for p in t.powers if p.exponent in form.constants}
        line = _line(group, {p.variable.name: p.variable for p in powers.values()})
        if line is None:
            continue
        own = [t for t in terms if t.kind is not None or not form.kinds]
        mixed = [
            [p.exponent for p in t.powers if p.exponent in form.constants]
            for t in own
            if len({p.variable.name for p in t.powers if p.exponent in form.constants}) > 1
        ]
        what = f"every {kind} run has" if kind else "every run has"
        names = _list(mixed[0] if mixed else list(powers))
        on_line.append(f"{what} {line}, so {names} cannot be distinguished")
        if mixed:
            yield on_line[-1]
            return
    # The terms that all kinds share are determined if the runs of one kind are not on a line.
    if on_line and len(on_line) == len(groups):
        yield on_line[0]


def _line(runs: Sequence[RunRecord], variables: dict[str, Variable]) -> str | None:
    """Return the relation between the variables of the runs, e.g. ``D = 20 N``, or None."""
    if len(variables) < 2 or not runs:
        return None
    logs = {name: np.array([v.log(run) for run in runs]) for name, v in variables.items()}
    names = [name for name, values in logs.items() if values.std() >= _THIN]
    for i, x in enumerate(names):
        for y in names[i + 1 :]:
            centered = np.stack([logs[x] - logs[x].mean(), logs[y] - logs[y].mean()])
            _, sizes, axes = np.linalg.svd(centered.T, full_matrices=False)
            if sizes[1] / math.sqrt(len(runs)) < _THIN:
                slope = -axes[1][0] / axes[1][1]
                factor = math.exp(float(logs[y].mean() - slope * logs[x].mean()))
                if abs(slope - 1) < _SAME:
                    factor = math.exp(float((logs[y] - logs[x]).mean()))
                    return f"{y} = {short(factor)} {x}"
                return f"{y} = {short(factor)} {x}^{slope:.2f}"
    return None


def _rank(form: Form, runs: Sequence[RunRecord], metric: str) -> Iterator[str]:
    """Yield the constants in the null space of the Jacobian at plausible constants."""
    basis = basis_of(form, runs)
    theta = nominal(basis, losses_of(runs, metric))
    j = basis.log_jacobian(theta)
    scale = np.linalg.norm(j, axis=0)
    null = [name for name, size in zip(form.constants, scale, strict=True) if size < 1e-12]
    if not null:
        _, sizes, axes = np.linalg.svd(j / scale, full_matrices=False)
        if sizes[-1] > _SINGULAR * sizes[0]:
            return
        null = [n for n, part in zip(form.constants, axes[-1], strict=True) if abs(part) > 0.1]
    counts = [(_count(runs, v), v.what) for v in (SIZE, LENGTH)]
    levels = " and ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts)
    yield (
        f"{len(runs)} runs of {levels} do not determine the {form.name} form: "
        f"{_list(null)} cannot be {'distinguished' if len(null) > 1 else 'determined'}"
    )


def nominal(basis: Basis, losses: Array) -> Array:
    """Return plausible constants of a law for runs that may not determine them: [constants].

    Exponents are in the middle of their grids; coefficients are the best there.
    """
    form = basis.form
    middle = {p.exponent: p.grid[len(p.grid) // 2] for p in form.powers}
    theta = starts(basis, losses, exponents=[tuple(middle[p.exponent] for p in form.powers)])[0]
    part = np.log(np.mean(losses) / len(form.terms) / 4)
    coefficient = basis.is_log
    return np.where(coefficient, np.maximum(theta, part), theta)


def best_candidates(
    basis: Basis,
    theta: Array,
    runs: Sequence[RunRecord],
    candidates: Sequence[RunRecord],
    count: int,
) -> list[Proposal]:
    """Choose runs that determine the constants most, one after the other (D-optimal, greedy).

    Args:
        basis: the law on the runs.
        theta: constants at which designs are compared: an estimate, or `nominal`.
        runs: those that exist.
        candidates: those that could be added.
        count: how many to choose.
    """
    prior = np.where(basis.is_log, _PRIOR["coefficient"], _PRIOR["exponent"])
    j = basis.log_jacobian(theta)
    information = j.T @ j / _NOISE**2 + np.diag(prior**-2.0)
    rows = basis_of(basis.form, candidates, like=basis).log_jacobian(theta) / _NOISE
    found: list[Proposal] = []
    taken: set[int] = set()
    for _ in range(min(count, len(candidates))):
        gains = np.einsum("cp,pq,cq->c", rows, np.linalg.inv(information), rows)
        gains[list(taken)] = -1.0
        best = int(np.argmax(gains))
        taken.add(best)
        information = information + np.outer(rows[best], rows[best])
        found.append(Proposal(candidates[best], float(np.sqrt(1 + gains[best]))))
    return found


def grid_of_candidates(form: Form, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return runs around the given ones that cost at most as much as the most expensive of them."""
    sizes = _around([run.params for run in runs])
    lengths = _around([run.tokens for run in runs])
    most = max(run.params * run.tokens for run in runs)
    ratios = [run.tokens / run.params for run in runs]
    least, highest = min(2.0, *ratios), max(1000.0, *ratios)
    kinds = form.kinds or tuple(dict.fromkeys(run.kind for run in runs))
    existing = {(run.params, run.tokens, run.kind) for run in runs}
    return [
        RunRecord(f"{short(n)} x {short(d)}", n, d, None, kind=kind)
        for kind in kinds
        for n in sizes
        for d in lengths
        if n * d <= most * 1.001 and least <= d / n <= highest and (n, d, kind) not in existing
    ]


def _around(values: Sequence[int]) -> list[int]:
    """Return the levels of values, half the lowest and twice the highest."""
    logs = np.log(values)
    levels = [math.exp(x) for x in _levels_of(logs)]
    low, high = levels[0], levels[-1]
    few = levels if len(levels) <= 12 else list(np.geomspace(low, high, 12))
    return sorted({_round(x) for x in (low / 2, *few, high * 2) if x >= 1})


def _round(value: float) -> int:
    digits = max(0, math.floor(math.log10(value)) - 1)
    return max(1, round(value / 10**digits) * 10**digits)


def _levels_of(logs: Array) -> list[float]:
    found: list[float] = []
    for value in np.sort(logs):
        if not found or value - found[-1] > _SAME:
            found.append(float(value))
    return found


def _count(runs: Sequence[RunRecord], variable: Variable) -> int:
    return len(_levels_of(np.array([variable.log(run) for run in runs])))


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
