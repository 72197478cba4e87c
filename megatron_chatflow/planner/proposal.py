"""Shares that minimize predicted losses, within caps and floors.

With laws L_i convex in the shares x, weights w_i and a prior p (Olmix, arXiv 2602.12237),

    minimize   sum_i w_i L_i(e(x)) + 0.05 KL(x || p)
    subject to sum_j x_j = 1,  floor_j <= x_j <= cap_j,  cap_j = epochs * tokens_j / run_tokens

e(x) is the share of new text that x is worth: text that is read again is worth less, by
U + U R* (1 - exp(-R / R*)) with U the tokens of the domain, R the repetitions and R* = 15.4
(Muennighoff et al., arXiv 2305.16264). With stages, the sum is over stages weighted by their
lengths and a cap bounds the average share over the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megatron_chatflow.errors import ConfigError

KL_WEIGHT = 0.05
REPEATS = 15.4
"""R* of the repetition discount."""
MAX_EPOCHS = 4.0
"""The default cap: up to 4 epochs, repeated text is worth almost as much as new text."""

_TOLERANCE = 1e-5
"""Of the conditions of optimality, relative to the gradient."""
_LEAST = 1e-6
"""The smallest share of a domain that has one: below it, the KL term is too steep to solve."""
_NO_CHOICE = 1e-4
"""Where floors and caps leave less than this, there is nothing to choose."""
_ACTIVE = 1e-7
_TINY = 1e-12


class LossModel(Protocol):
    """A predicted loss as a function of the shares."""

    def value_and_gradient(
        self, shares: np.ndarray, effective: np.ndarray, slope: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient, as `MixtureLaw.value_and_gradient`."""
        ...


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own weights of the losses."""

    name: str
    length: float
    """Part of the run, 0 to 1."""
    weights: Mapping[str, float]
    """{language: weight of its loss}; they add up to 1."""


@dataclass(frozen=True)
class Problem:
    """What is minimized. Arrays are over `domains`: [K]."""

    domains: tuple[str, ...]
    laws: Mapping[str, LossModel]
    """{language: predicted loss}."""
    stages: tuple[Stage, ...]
    prior: np.ndarray
    """Shares that add up to 1; a domain with 0 gets no share."""
    floors: np.ndarray
    caps: np.ndarray
    """Largest average share over the run; 1 where there is none."""
    new_text: np.ndarray
    """Tokens of each domain / tokens of the run; inf where nothing is repeated."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """{domain: where its cap is from}, for messages."""


@dataclass(frozen=True)
class Solution:
    """The proposed shares."""

    shares: np.ndarray
    """Of each stage: float64 [S, K]."""
    objective: float
    optimality: float
    """How far the conditions of Karush, Kuhn and Tucker are from met, relative to the gradient."""
    at_cap: tuple[str, ...]
    at_floor: tuple[str, ...]

    def average(self, problem: Problem) -> np.ndarray:
        """Return the average shares over the run: float64 [K]."""
        return np.array([stage.length for stage in problem.stages]) @ self.shares


def effective_shares(shares: np.ndarray, new_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what shares are worth in new text, and the slope: float64 [K] both.

    Args:
        shares: x: [K].
        new_text: tokens of the domain / tokens of the run: [K]; inf: nothing is repeated.
    """
    new = np.maximum(new_text, _TINY)
    repeats = np.maximum(shares / new - 1, 0.0)
    fading = np.exp(-repeats / REPEATS)
    with np.errstate(invalid="ignore"):
        repeated = new * (1 + REPEATS * (1 - fading))
    return np.where(repeats > 0, repeated, shares), fading


def check_feasible(problem: Problem) -> None:
    """Refuse caps and floors that no shares satisfy.

    Raises:
        ConfigError: names the caps and floors that contradict each other.
    """
    floors, caps, domains = problem.floors, problem.caps, problem.domains
    for name, floor, cap, prior in zip(domains, floors, caps, problem.prior, strict=True):
        if floor > cap + 1e-12:
            reason = problem.reasons.get(name, "")
            raise ConfigError(
                f"floor {name}={floor:g} is above its cap of {cap:.4g}{reason and f' ({reason})'}; "
                f"lower the floor, raise --max-epochs, shorten the run or give more {name} text"
            )
        if floor > 0 and prior == 0:
            raise ConfigError(
                f"floor {name}={floor:g} and prior {name}=0 contradict each other; drop the floor "
                f"or give {name} a positive prior"
            )
    if floors.sum() > 1 + 1e-12:
        listed = " + ".join(f"{d}={f:g}" for d, f in zip(domains, floors, strict=True) if f > 0)
        raise ConfigError(f"the floors {listed} add up to {floors.sum():g}, above 1; lower them")
    usable = np.where(problem.prior > 0, caps, 0.0)
    if usable.sum() < 1 - 1e-12:
        listed = ", ".join(f"{d} {c:.4g}" for d, c in zip(domains, usable, strict=True))
        raise ConfigError(
            f"the caps allow shares of {usable.sum():.4g} in all ({listed}), and the run needs 1; "
            f"raise --max-epochs, shorten the run or give more text"
        )


def solve(problem: Problem) -> Solution:
    """Return the shares that minimize the objective.

    Raises:
        ConfigError: no shares satisfy the caps and floors.
        RuntimeError: the solver did not find a minimum, which is a bug.
    """
    check_feasible(problem)
    lengths = np.array([stage.length for stage in problem.stages])
    caps = np.minimum(problem.caps, np.where(problem.prior > 0, 1.0, 0.0))
    free = np.flatnonzero(caps - problem.floors > _NO_CHOICE)
    fixed = np.where(caps - problem.floors > _NO_CHOICE, 0.0, problem.floors)
    rest = 1 - fixed.sum()
    floors, caps = problem.floors[free], caps[free]
    shares = np.tile(fixed, (len(lengths), 1))
    optimality = 0.0
    if min(rest - floors.sum(), caps.sum() - rest) < _NO_CHOICE:
        shares[:, free] = _interior(floors, caps, rest)
    else:
        shares[:, free], optimality = _minimize(problem, free, shares, floors, caps, rest)
    average = lengths @ shares
    named = list(enumerate(problem.domains))
    return Solution(
        shares,
        _objective(problem, shares)[0],
        optimality,
        tuple(d for j, d in named if problem.caps[j] < 1 and average[j] > problem.caps[j] - 1e-6),
        tuple(
            d
            for j, d in named
            if problem.floors[j] > 0 and shares[:, j].min() < problem.floors[j] + 1e-6
        ),
    )


def _minimize(
    problem: Problem,
    free: np.ndarray,
    shares: np.ndarray,
    floors: np.ndarray,
    caps: np.ndarray,
    rest: float,
) -> tuple[np.ndarray, float]:
    """Return the shares of the free domains in each stage, and how far from optimal they are.

    Args:
        problem: what is minimized.
        free: numbers of the domains whose shares can vary: [F].
        shares: of all stages and domains, those of the free ones 0: [S, K].
        floors: of the free domains: [F].
        caps: likewise.
        rest: what the shares of the free domains add up to.
    """
    from scipy.optimize import minimize

    lengths = np.array([stage.length for stage in problem.stages])
    stages = len(lengths)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        complete = shares.copy()
        complete[:, free] = flat.reshape(stages, -1)
        value, gradient = _objective(problem, complete)
        return value, gradient[:, free].ravel()

    lowest = np.maximum(floors, _LEAST)
    start = np.tile(_interior(floors, caps, rest), stages)
    sums = np.kron(np.eye(stages), np.ones(len(free)))
    rows = np.kron(lengths, np.eye(len(free)))[caps < 1]
    constraints = [
        {"type": "eq", "fun": lambda flat: sums @ flat - rest, "jac": lambda _: sums},
        {"type": "ineq", "fun": lambda flat: caps[caps < 1] - rows @ flat, "jac": lambda _: -rows},
    ]
    best, point, message = None, start, ""
    for _ in range(4):  # SLSQP stops early where the objective is steep: continue from there
        found = minimize(
            objective,
            point,
            jac=True,
            method="SLSQP",
            bounds=[(low, 1.0) for low in np.tile(lowest, stages)],
            constraints=constraints[: 1 + bool(len(rows))],
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        proposed = _feasible(found.x.reshape(stages, -1), lengths, floors, caps, rest)
        optimality = _optimality(objective(proposed.ravel())[1], proposed, lengths, lowest, caps)
        message = found.message
        if best is None or optimality < best[1]:
            best = proposed, optimality
        if optimality < _TOLERANCE:
            break
        point = 0.999 * best[0].ravel() + 0.001 * start
    if best is None or best[1] > 100 * _TOLERANCE:
        raise RuntimeError(f"no minimum was found: {message}, optimality {best and best[1]}")
    return best


def _objective(problem: Problem, shares: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the objective of shares [S, K] and its gradient [S, K]."""
    value, gradient = 0.0, np.zeros(shares.shape)
    used = problem.prior > 0
    for s, (stage, x) in enumerate(zip(problem.stages, shares, strict=True)):
        # The discount is of the run's average; with several stages, nothing is discounted.
        new = problem.new_text if len(shares) == 1 else np.full(len(x), np.inf)
        effective, slope = effective_shares(x, new)
        for language, weight in stage.weights.items():
            loss, slopes = problem.laws[language].value_and_gradient(x, effective, slope)
            value += stage.length * weight * loss
            gradient[s] += stage.length * weight * slopes
        logs = np.log(np.maximum(x[used], _LEAST) / problem.prior[used])
        value += stage.length * KL_WEIGHT * float(x[used] @ logs)
        gradient[s, used] += stage.length * KL_WEIGHT * (logs + 1)
    return value, gradient


def _interior(floors: np.ndarray, caps: np.ndarray, rest: float) -> np.ndarray:
    """Return shares between floors and caps that add up to `rest`."""
    room = caps - floors
    return floors + (rest - floors.sum()) / max(room.sum(), _TINY) * room


def _feasible(
    shares: np.ndarray, lengths: np.ndarray, floors: np.ndarray, caps: np.ndarray, rest: float
) -> np.ndarray:
    """Return shares [S, F] with the solver's rounding removed: within floors and caps."""
    above = np.maximum(shares - floors, 0)
    shares = floors + above * (
        (rest - floors.sum()) / np.maximum(above.sum(axis=1, keepdims=True), _TINY)
    )
    average = lengths @ shares
    over = average > caps
    if over.any():
        # Move all stages toward shares within the caps, as far as the average needs.
        inner = _interior(floors, caps, rest)
        part = np.max((average - caps)[over] / np.maximum(average - inner, _TINY)[over])
        shares = shares + min(part, 1.0) * (inner - shares)
    return shares


def _optimality(
    gradient: np.ndarray,
    shares: np.ndarray,
    lengths: np.ndarray,
    lowest: np.ndarray,
    caps: np.ndarray,
) -> float:
    """Return the norm of the gradient that no multipliers explain, relative to the gradient.

    Those of active floors and caps are non-negative (by non-negative least squares).
    """
    from scipy.optimize import nnls

    stages, size = shares.shape
    unit = np.eye(stages * size).reshape(stages, size, -1)
    columns = []
    for s in range(stages):
        columns += [unit[s].sum(axis=0), -unit[s].sum(axis=0)]
        columns += [unit[s, j] for j in range(size) if shares[s, j] <= lowest[j] + _ACTIVE]
    for j in range(size):
        if caps[j] < 1 and lengths @ shares[:, j] >= caps[j] - _ACTIVE:
            columns.append(-lengths @ unit[:, j])
    _, error = nnls(np.stack(columns, 1), gradient)
    return float(error / max(np.linalg.norm(gradient), _TINY))
