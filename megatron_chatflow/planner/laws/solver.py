"""Fit a law: variable-projection starts, then scipy's least squares on logarithms of losses.

A start is a point of a grid over the exponents; the coefficients there are a non-negative linear
least-squares problem. The best starts are refined with the analytic Jacobian. With centered
logarithms this takes milliseconds, so that bootstraps and refits are affordable.

scipy is imported inside functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.forms import Array, Basis, Form, basis_of, losses_of
from megatron_chatflow.planner.laws.run_table import RunRecord

VANISHED = 1e-7
"""A term that is less than this part of every loss is zero."""

_REFINED = 6
_MOST_STARTS = 1000
_MOST_EVALUATIONS = 500
_LEAST_EXPONENT = 1e-3


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs."""

    runs: tuple[RunRecord, ...]
    metric: str
    """``loss`` or ``bits_per_byte``."""
    huber: float | None
    """Where the loss function of the residuals becomes linear; None for least squares."""
    basis: Basis
    losses: Array
    """Measured: [runs]."""
    theta: Array
    """See `Basis`: [constants]."""
    cost: float
    """Half of the sum of squares of the residuals, or of Huber's function of them."""

    @property
    def form(self) -> Form:
        """The law's form."""
        return self.basis.form

    @property
    def constants(self) -> dict[str, float]:
        """All constants by name."""
        return self.basis.constants(self.theta)

    @property
    def degrees_of_freedom(self) -> int:
        """Runs less constants."""
        return len(self.runs) - len(self.form.constants)

    @property
    def residuals(self) -> Array:
        """Logarithms of predicted over measured losses: [runs]."""
        return self.basis.log_loss(self.theta) - np.log(self.losses)

    @property
    def vanished(self) -> tuple[str, ...]:
        """Coefficients that are zero: their terms add nothing to any loss."""
        logs = self.basis.offset + self.basis.design @ self.theta
        parts = np.exp(logs - self.basis.log_loss(self.theta)).max(1)
        names = [term.coefficient for term in self.form.terms]
        return tuple(n for n, p in zip(names, parts, strict=True) if p < VANISHED)

    def predict(self, runs: Sequence[RunRecord]) -> Array:
        """Return the losses that the law gives for other runs: [runs]."""
        return self.basis_on(runs).loss(self.theta)

    def basis_on(self, runs: Sequence[RunRecord]) -> Basis:
        """Return the basis on other runs, for this fit's theta."""
        return basis_of(self.form, runs, like=self.basis)


def fit_law(
    form: Form,
    runs: Sequence[RunRecord],
    metric: str = "loss",
    huber: float | None = None,
) -> Fit:
    """Fit a form to runs.

    Args:
        form: the law.
        runs: more than the form has constants; `check_design` says whether they determine it.
        metric: ``loss`` or ``bits_per_byte``.
        huber: minimize Huber's function with this delta of the residuals, not their squares.

    Raises:
        ConfigError: there are too few runs, or a run lacks the metric.
    """
    names = form.constants
    if len(runs) <= len(names):
        raise ConfigError(
            f"form {form.name}: {len(runs)} runs for {len(names)} constants ({', '.join(names)}); "
            f"give at least {len(names) + 1} runs"
        )
    losses = losses_of(runs, metric)
    basis = basis_of(form, runs)
    first = starts(basis, losses)
    theta, cost = _best(basis, losses, first, huber)
    if (theta < _lower(basis)).any():
        theta, cost = _best(basis, losses, first, huber, bounded=True)
    return Fit(tuple(runs), metric, huber, basis, losses, theta, cost)


def starts(
    basis: Basis, losses: Array, exponents: Iterable[tuple[float, ...]] | None = None
) -> list[Array]:
    """Return the best points of the grid over the exponents: each [constants].

    Points at which a coefficient is zero come last: it may stay zero from there.

    Args:
        basis: the law on the runs.
        losses: measured: [runs].
        exponents: the points, in place of the grid of the form.
    """
    from scipy.optimize import nnls

    form = basis.form
    grids = [power.grid for power in form.powers]
    while np.prod([len(grid) for grid in grids]) > _MOST_STARTS:
        longest = max(range(len(grids)), key=lambda i: len(grids[i]))
        grids[longest] = grids[longest][::2]
    place = [form.constants.index(power.exponent) for power in form.powers]
    # A term's coefficient: the column of theta that is 1 in its design, -1 where it is fixed.
    columns = np.array(
        [
            form.constants.index(t.coefficient) if t.coefficient in form.constants else -1
            for t in form.terms
        ]
    )
    free = columns >= 0
    found: list[tuple[bool, float, Array]] = []
    for point in itertools.product(*grids) if exponents is None else exponents:
        theta = np.zeros(len(form.constants))
        theta[place] = point
        # Relative to the losses, so that residuals are those of the logarithms: [terms, runs].
        terms = np.exp(basis.offset + basis.design @ theta) / losses
        rest = 1.0 - terms[~free].sum(0)
        scale = np.sqrt((terms[free] ** 2).sum(1)) + 1e-300
        weights, error = nnls((terms[free] / scale[:, None]).T, rest)
        least = 1e-3 / np.maximum(terms[free].max(1), 1e-300)
        theta[columns[free]] = np.log(np.maximum(weights / scale, least))
        found.append((bool((weights == 0).any()), error, theta))
    found.sort(key=lambda result: result[:2])
    return [theta for _, _, theta in found[:_REFINED]]


def _best(
    basis: Basis, losses: Array, first: list[Array], huber: float | None, bounded: bool = False
) -> tuple[Array, float]:
    found = [refine(basis, losses, start, huber, bounded=bounded) for start in first]
    return min(found, key=lambda result: result[1])


def _lower(basis: Basis) -> Array:
    """Return the lower bounds of theta: [constants]."""
    positive = [power.exponent for power in basis.form.powers if power.positive]
    return np.where(np.isin(basis.form.constants, positive), _LEAST_EXPONENT, -np.inf)


def refine(
    basis: Basis,
    losses: Array,
    start: Array,
    huber: float | None = None,
    tolerance: float = 1e-15,
    bounded: bool = False,
) -> tuple[Array, float]:
    """Minimize from a start.

    Args:
        basis: the law on the runs.
        losses: measured: [runs].
        start: [constants].
        huber: see `fit_law`.
        tolerance: relative, of cost and theta.
        bounded: keep exponents that must be positive above zero.

    Returns:
        theta [constants] and the cost.
    """
    from scipy.optimize import least_squares

    measured = np.log(losses)
    result = least_squares(
        lambda theta: basis.log_loss(theta) - measured,
        start,
        jac=basis.log_jacobian,  # pyright: ignore[reportArgumentType] (scipy accepts a function)
        bounds=(_lower(basis), np.inf) if bounded else (-np.inf, np.inf),
        method="lm" if huber is None and not bounded else "trf",
        loss="linear" if huber is None else "huber",
        f_scale=1.0 if huber is None else huber,
        x_scale="jac",
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=_MOST_EVALUATIONS,
    )
    return result.x, float(result.cost)
