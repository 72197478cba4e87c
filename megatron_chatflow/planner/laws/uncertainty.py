"""How well a fit is determined: intervals, bootstrap, condition, influence of runs, held-out error.

Intervals are 95%. Those of coefficients are symmetric in the logarithm, because coefficients are
skewed: at 0.3% noise B is known within a factor of two while beta is known to 0.02.

scipy is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.planner.laws.forms import Array, Form
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.planner.laws.solver import Fit, fit_law, refine

LEVEL = 0.95
_SAME_SIZE = 0.02
_REFITS = 5
_DRAW_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Interval:
    """A 95% interval; both ends are nan where the runs do not determine it."""

    low: float
    high: float


def jacobian(fit: Fit) -> Array:
    """Return the derivatives of the log losses at the estimate: [runs, constants].

    Columns of constants that no loss depends on, those of terms that vanished, are zero.
    """
    result = fit.basis.log_jacobian(fit.theta)
    return np.where(np.abs(result).max(0) > 1e-6, result, 0.0)


def residual_deviation(fit: Fit) -> float:
    """Return the standard deviation of log loss, sqrt(sum of squares / (n - p))."""
    return float(np.sqrt((fit.residuals**2).sum() / fit.degrees_of_freedom))


def covariance(fit: Fit) -> Array:
    """Return the covariance of theta: [constants, constants].

    With Huber's function it is that of the M-estimator, mean(psi^2) / mean(psi')^2 (J'J)^-1
    (Huber and Ronchetti, Robust Statistics, equation 7.40). Rows of constants that the runs do not
    determine are nan.
    """
    j = jacobian(fit)
    free = (j != 0).any(0)
    residuals = fit.residuals
    if fit.huber is None:
        variance = residual_deviation(fit) ** 2
    else:
        inside = np.abs(residuals) <= fit.huber
        psi = np.clip(residuals, -fit.huber, fit.huber)
        slope = max(float(inside.mean()), 1 / len(inside))
        variance = float((psi**2).sum()) / fit.degrees_of_freedom / slope**2
    result = np.full((len(free), len(free)), np.nan)
    result[np.ix_(free, free)] = variance * np.linalg.pinv(j[:, free].T @ j[:, free])
    return result


def t_intervals(fit: Fit) -> dict[str, Interval]:
    """Return the interval of each fitted constant, from the covariance and Student's t."""
    from scipy.stats import t

    basis, c = fit.basis, covariance(fit)
    known = ~np.isnan(np.diag(c))
    center = basis.to_reported @ fit.theta
    variance = np.einsum(
        "ij,jk,ik->i", basis.to_reported, np.where(np.isnan(c), 0.0, c), basis.to_reported
    )
    # A constant is known if all that it is computed from is.
    uses = (basis.to_reported != 0)[:, ~known].any(1)
    half = np.where(uses, np.nan, np.sqrt(variance)) * t.ppf(
        (1 + LEVEL) / 2, fit.degrees_of_freedom
    )
    ends = [np.where(basis.is_log, np.exp(e), e) for e in (center - half, center + half)]
    return {
        name: Interval(float(low), float(high))
        for name, low, high in zip(fit.form.constants, *ends, strict=True)
    }


def condition_number(fit: Fit) -> float:
    """Return the condition number of the Jacobian with its columns scaled to length 1."""
    j = jacobian(fit)
    lengths = np.linalg.norm(j, axis=0)
    return float(np.linalg.cond(j[:, lengths > 0] / lengths[lengths > 0]))


def leverages(fit: Fit) -> Array:
    """Return the diagonal of the hat matrix, 0 to 1: [runs]."""
    j = jacobian(fit)
    return np.einsum("np,pq,nq->n", j, np.linalg.pinv(j.T @ j), j)


def bootstrap(fit: Fit, draws: int, seed: int = 0, resample: str = "residuals") -> Array:
    """Refit resampled tables, runs of all kinds together, from the estimate on.

    Args:
        fit: the estimate.
        draws: number of refits.
        seed: of the resampling.
        resample: ``residuals`` adds to the fitted log losses residuals drawn with replacement, each
            divided by sqrt(1 - leverage) and centered (Davison and Hinkley, Bootstrap Methods,
            section 6.3); ``runs`` draws runs of each kind, for noise that differs between runs.

    Returns:
        theta of each refit: [draws, constants].
    """
    rng = np.random.default_rng([seed, draws])
    n, logs = len(fit.runs), fit.basis.log_loss(fit.theta)
    if resample == "residuals":
        scaled = -fit.residuals / np.sqrt(np.maximum(1 - leverages(fit), 1e-3))
        scaled -= scaled.mean()
    kinds = np.array([run.kind for run in fit.runs])
    groups = [np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds)]
    result = np.empty((draws, len(fit.theta)))
    for i in range(draws):
        if resample == "residuals":
            basis, losses = fit.basis, np.exp(logs + scaled[rng.integers(n, size=n)])
        else:
            rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
            basis, losses = fit.basis.take(rows), fit.losses[rows]
        result[i], _ = refine(basis, losses, fit.theta, fit.huber, tolerance=_DRAW_TOLERANCE)
    return result


def percentiles(draws: Array) -> list[Interval]:
    """Return the central 95% of values: [draws, columns], one interval per column."""
    tail = (1 - LEVEL) / 2
    finite = np.where(np.isfinite(draws), draws, np.nan)
    if np.isnan(finite).all(0).any():
        return [
            percentiles(column[:, None])[0]
            if not np.isnan(column).all()
            else Interval(*[np.nan] * 2)
            for column in finite.T
        ]
    low, high = np.nanquantile(finite, [tail, 1 - tail], axis=0)
    return [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]


@dataclass(frozen=True)
class Influence:
    """What leaving out one run does."""

    run: RunRecord
    residual: float
    """Logarithm of predicted over measured loss."""
    leverage: float
    """0 to 1: how much the run determines its own prediction."""
    distance: float
    """Cook's distance."""
    without: dict[str, float]
    """The constants without the run: refitted for the most influential runs, else by one step."""
    refitted: bool


def influences(fit: Fit) -> list[Influence]:
    """Return the influence of each run, largest first.

    The first few are refits; the others one Gauss-Newton step,
    theta_i - theta = (J'J)^-1 J_i r_i / (1 - h_i).
    """
    j, r, h = jacobian(fit), fit.residuals, leverages(fit)
    inverse = np.linalg.pinv(j.T @ j)
    left = np.maximum(1 - h, 1e-6)
    steps = (j @ inverse) * (r / left)[:, None]
    variance = max(residual_deviation(fit) ** 2, 1e-300)
    distance = r**2 * h / (left**2 * variance * len(fit.theta))
    found = []
    for rank, i in enumerate(np.argsort(-distance)):
        theta, exact = fit.theta + steps[i], rank < _REFITS
        if exact:
            theta = without_runs(fit, [int(i)])
        found.append(
            Influence(
                fit.runs[i],
                float(r[i]),
                float(h[i]),
                float(distance[i]),
                fit.basis.constants(theta),
                exact,
            )
        )
    return found


def without_runs(fit: Fit, rows: Sequence[int]) -> Array:
    """Return theta of a refit without some runs, from the estimate on: [constants]."""
    kept = np.setdiff1d(np.arange(len(fit.runs)), rows)
    theta, _ = refine(fit.basis.take(kept), fit.losses[kept], fit.theta, fit.huber)
    return theta


@dataclass(frozen=True)
class LeftOut:
    """The error of a fit on the largest size, which it has not seen."""

    params: int
    """The largest size."""
    runs: int
    """Runs of that size."""
    rms: float
    """Root mean square of log of predicted over measured loss."""
    worst: float
    """Largest absolute value of it."""


def largest_size(runs: Sequence[RunRecord]) -> Array:
    """Return which runs are of the largest size, within 2%: [runs]."""
    logs = np.log([run.params for run in runs])
    return logs > logs.max() - _SAME_SIZE


def left_out_error(
    form: Form, runs: Sequence[RunRecord], metric: str, huber: float | None
) -> LeftOut:
    """Fit without the runs of the largest size, and compare the law with them.

    Raises:
        ConfigError: too few runs are left.
    """
    large = largest_size(runs)
    rest = [run for run, left in zip(runs, large, strict=True) if not left]
    largest = [run for run, left in zip(runs, large, strict=True) if left]
    fit = fit_law(form, rest, metric, huber)
    measured = np.array([getattr(run, metric) for run in largest])
    errors = np.log(fit.predict(largest) / measured)
    return LeftOut(
        max(run.params for run in largest),
        len(largest),
        float(np.sqrt((errors**2).mean())),
        float(np.abs(errors).max()),
    )


def aicc(fit: Fit) -> float:
    """Return Akaike's corrected criterion of least squares on log loss; lower is better."""
    n, p = len(fit.runs), len(fit.theta)
    deviance = n * np.log(max((fit.residuals**2).mean(), 1e-300))
    return float(deviance + 2 * p + 2 * p * (p + 1) / max(n - p - 1, 1e-9))
