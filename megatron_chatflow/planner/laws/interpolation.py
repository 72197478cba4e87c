"""Straight interpolation between measured mixtures, the control that a law must not lose to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_chatflow.planner.laws.mixture_law import MixtureLaw, leave_out_folds

_ROUNDING = 1e-7


def interpolate(shares: np.ndarray, losses: np.ndarray, mixture: np.ndarray) -> float | None:
    """Return the loss of a mixture, straight between the measured ones around it.

    The weights of the runs are those that give the mixture exactly with the least weighted squared
    distance, which is interpolation on the Delaunay triangulation, in any number of dimensions.

    Args:
        shares: of the runs: float64 [N, K].
        losses: of the runs: float64 [N].
        mixture: [K].

    Returns:
        The loss; None where the mixture is outside of the measured range (the convex hull).
    """
    from scipy.optimize import linprog

    distance = np.sum((shares - mixture) ** 2, axis=1)
    solved = linprog(
        distance,
        A_eq=np.vstack([shares.T, np.ones(len(shares))]),
        b_eq=np.append(mixture, 1.0),
        bounds=(0, None),
        method="highs",
        options={"primal_feasibility_tolerance": _ROUNDING},
    )
    return float(solved.x @ losses) if solved.status == 0 else None


@dataclass(frozen=True)
class Comparison:
    """Errors of a law and of straight interpolation on the same runs, each left out."""

    runs: int
    """Runs inside of the measured range of the others."""
    law: float
    """Root mean square error of the law; nan where there are none."""
    straight: float

    @property
    def straight_is_as_good(self) -> bool:
        """Return whether interpolation errs no more than the law (5% is not a difference)."""
        return self.runs > 0 and self.straight <= 1.05 * self.law


def compare(law: MixtureLaw, shares: np.ndarray, losses: np.ndarray) -> Comparison:
    """Compare a law with straight interpolation on the runs that it was fitted to.

    Args:
        law: its residuals are of runs that were left out by `leave_out_folds`.
        shares: of the runs: float64 [N, K].
        losses: of the runs: float64 [N].
    """
    folds = leave_out_folds(shares)
    straight, of_law = [], []
    for i, fold in enumerate(folds):
        kept = folds != fold
        found = interpolate(shares[kept], losses[kept], shares[i])
        if found is not None:
            straight.append(losses[i] - found)
            of_law.append(law.residuals[i])
    if not straight:
        return Comparison(0, float("nan"), float("nan"))
    return Comparison(
        len(straight),
        float(np.sqrt(np.mean(np.square(of_law)))),
        float(np.sqrt(np.mean(np.square(straight)))),
    )
