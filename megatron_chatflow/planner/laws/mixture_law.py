"""The mixture law: the held-out loss as a function of the shares of many domains.

For runs of one size and length, with x_j the share of domain j and K domains,

    L(x) = c + exp(sum_j T_j x_j - sum_j u_j log(1 + x_j / s) / log(1 + 1 / s)),   u_j >= 0

With u = 0 it is the exponential-linear law of Ye et al. (arXiv 2403.16952); their factor k is in T,
because shares add up to 1. The term in u is this project's: the first tokens of a domain lower the
loss most, which an exponential of the share cannot say. Both are convex in x. The form and the
strength of the ridge on T and u are chosen by cross-validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SATURATION = 0.01
"""s of the law: the share at which the effect of more text of a domain begins to saturate."""
FORMS = ("exponential", "saturating")
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
DRAWS = 200
LEAVE_ONE_OUT = 40
"""Up to this number of runs, errors of prediction leave out one run at a time; else a tenth."""

_STARTS = (0.3, 0.6, 0.9)
_SELECTION_FOLDS = 5
_LARGEST_EXPONENT = 30.0
_EXACT = 1e-7


@dataclass(frozen=True)
class MixtureLaw:
    """A fitted law of one held-out language or set. Arrays are over `domains`: [K]."""

    target: str
    """The held-out language or set."""
    domains: tuple[str, ...]
    floor: float
    """c, in the unit of the losses."""
    rates: np.ndarray
    """T: float64 [K]."""
    saturation: np.ndarray
    """u: float64 [K]; zeros in the exponential form."""
    form: str
    ridge: float
    """Relative strength of the ridge."""
    residuals: np.ndarray
    """Measured less predicted loss of each run, by a law fitted without it: float64 [N]."""
    draws: np.ndarray
    """Bootstrap refits as (c, T, u): float64 [DRAWS, 1 + 2 K]."""

    @property
    def error(self) -> float:
        """Return the root mean square of `residuals`."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def parameters(self) -> np.ndarray:
        """Return (c, T, u): float64 [1 + 2 K]."""
        return np.concatenate([[self.floor], self.rates, self.saturation])

    def predict(self, shares: np.ndarray) -> np.ndarray:
        """Return the loss of mixtures; shares [..., K] that add up to 1, result [...]."""
        return _losses(self.parameters, np.asarray(shares, float))

    def value_and_gradient(
        self, shares: np.ndarray, effective: np.ndarray, slope: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient where some text is repeated.

        Args:
            shares: x, adding up to 1: float64 [K].
            effective: the share of new text that each domain's text is worth, at most x: [K].
            slope: d effective / d x: [K].

        Text that is worth nothing counts as that of the domain with the largest rate, so the law
        stays convex.
        """
        worst = self.rates.max()
        # exponent = T0 + sum (T - T0) e - sum u g(e); T <= T0 and e concave: convex
        relative = self.rates - worst
        curve = np.log1p(effective / SATURATION) / np.log1p(1 / SATURATION)
        exponent = worst * shares.sum() + relative @ effective - self.saturation @ curve
        bent = self.saturation / ((SATURATION + effective) * np.log1p(1 / SATURATION))
        size = np.exp(min(exponent, _LARGEST_EXPONENT))
        return self.floor + size, size * (worst + (relative - bent) * slope)

    def interval(
        self, shares: np.ndarray, effective: np.ndarray | None = None, level: float = 0.95
    ) -> tuple[float, float]:
        """Return the interval of the loss of a new run, from the bootstrap and the residuals.

        Args:
            shares: the mixture: [K].
            effective: as in `value_and_gradient`; None: nothing is repeated.
            level: of the interval.
        """
        effective = shares if effective is None else effective
        noise = np.random.default_rng(0).choice(self.residuals, len(self.draws))
        size = len(self.domains)
        losses = [
            replace(
                self, floor=draw[0], rates=draw[1 : 1 + size], saturation=draw[1 + size :]
            ).value_and_gradient(shares, effective, np.ones(size))[0]
            for draw in self.draws
        ]
        low, high = np.quantile(np.array(losses) + noise, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit_mixture_law(
    target: str, domains: Sequence[str], shares: np.ndarray, losses: np.ndarray
) -> MixtureLaw:
    """Fit the law of one held-out language.

    Form and ridge are those with the least error on runs that were left out; the saturating form
    only where it is better by more than a standard error.

    Args:
        target: the language, for messages.
        domains: names [K].
        shares: of the runs, rows add up to 1: float64 [N, K]. `check_mixtures` has accepted them.
        losses: of the runs: float64 [N].
    """
    size = len(domains)
    folds = _folds(shares, _SELECTION_FOLDS, 0)
    best: dict[str, tuple[np.ndarray, float]] = {}
    for form in FORMS:
        if form == "saturating" and len(losses) < 2 * size + 3:
            continue
        for ridge in RIDGES:
            errors = _left_out(shares, losses, folds, form, ridge) ** 2
            if form not in best or errors.mean() < best[form][0].mean():
                best[form] = errors, ridge
    form = "exponential"
    if "saturating" in best:
        squares = best["exponential"][0]
        gain = squares - best["saturating"][0]
        exact = np.sqrt(squares.mean()) < _EXACT * losses.mean()
        if gain.mean() > gain.std() / np.sqrt(len(losses)) and not exact:
            form = "saturating"
    ridge = best[form][1]
    fitted = _fit(shares, losses, form, ridge, starts=len(_STARTS))
    return MixtureLaw(
        target,
        tuple(domains),
        fitted[0],
        fitted[1 : 1 + size],
        fitted[1 + size :],
        form,
        ridge,
        _left_out(shares, losses, leave_out_folds(shares), form, ridge),
        _bootstrap(shares, losses, form, ridge, fitted),
    )


def leave_out_folds(shares: np.ndarray) -> np.ndarray:
    """Return the fold of each run: int64 [N]; every mixture alone, or a tenth of many.

    Runs of one mixture, e.g. of several seeds, are left out together.
    """
    return _folds(shares, 10 if len(shares) > LEAVE_ONE_OUT else len(shares), 1)


def _folds(shares: np.ndarray, count: int, seed: int) -> np.ndarray:
    mixtures, numbers = np.unique(np.round(shares, 9), axis=0, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(mixtures))
    return order[numbers.ravel()] % min(count, len(mixtures))


def _left_out(
    shares: np.ndarray, losses: np.ndarray, folds: np.ndarray, form: str, ridge: float
) -> np.ndarray:
    """Return measured less predicted loss, each run predicted without its fold: [N]."""
    residuals = np.empty(len(losses))
    for fold in range(folds.max() + 1):
        out = folds == fold
        fitted = _fit(shares[~out], losses[~out], form, ridge)
        residuals[out] = losses[out] - _losses(fitted, shares[out])
    return residuals


def _features(shares: np.ndarray) -> np.ndarray:
    """Return the factors of (T, u) in the exponent: float64 [..., 2 K]."""
    return np.concatenate(
        [shares, -np.log1p(shares / SATURATION) / np.log1p(1 / SATURATION)], axis=-1
    )


def _losses(parameters: np.ndarray, shares: np.ndarray) -> np.ndarray:
    exponents = _features(shares) @ parameters[1:]
    return parameters[0] + np.exp(np.minimum(exponents, _LARGEST_EXPONENT))


def _penalty(losses: np.ndarray, size: int, ridge: float) -> np.ndarray:
    """Return the square root of the ridge on (T less its mean, u): float64 [2 K, 2 K]."""
    strength = np.sqrt(ridge * len(losses) * losses.var())
    centered = np.eye(size) - 1 / size
    zero = np.zeros((size, size))
    return strength * np.block([[centered, zero], [zero, np.eye(size)]])


def _fit(
    shares: np.ndarray,
    losses: np.ndarray,
    form: str,
    ridge: float,
    *,
    starts: int = 1,
    begin: np.ndarray | None = None,
) -> np.ndarray:
    """Return (c, T, u) by least squares with a ridge: float64 [1 + 2 K].

    Starts are log-linear: with c given, log(L - c) is linear in T. The best `starts` of them are
    refined; `begin` replaces them.
    """
    from scipy.optimize import least_squares

    size = shares.shape[1]
    used = 1 + size * (2 if form == "saturating" else 1)
    features = _features(shares)[:, : used - 1]
    penalty = _penalty(losses, size, ridge)[: used - 1, : used - 1]
    if not ridge:
        penalty = penalty[:0]

    def residuals(p: np.ndarray) -> np.ndarray:
        fitted = p[0] + np.exp(np.minimum(features @ p[1:], _LARGEST_EXPONENT))
        return np.concatenate([fitted - losses, penalty @ p[1:]])

    def jacobian(p: np.ndarray) -> np.ndarray:
        slopes = np.exp(np.minimum(features @ p[1:], _LARGEST_EXPONENT))[:, None] * features
        top = np.hstack([np.ones((len(losses), 1)), slopes])
        return np.vstack([top, np.hstack([np.zeros((len(penalty), 1)), penalty])])

    low = np.full(used, -np.inf)
    low[0], low[1 + size :] = 0.0, 0.0  # c >= 0 and u >= 0
    if begin is not None:
        begins = [np.maximum(begin[:used], low + 1e-9)]
    else:
        begins = [_start(shares, losses, part, used) for part in _STARTS]
        begins.sort(key=lambda p: float(np.sum(residuals(p) ** 2)))
    precise = 1e-6 if starts == 1 else 1e-14
    found = [
        least_squares(
            residuals,
            start,
            jac=jacobian,  # pyright: ignore[reportArgumentType] (scipy accepts a function)
            bounds=(low, np.inf),
            x_scale="jac",
            ftol=precise,
            xtol=precise,
            gtol=precise,
            max_nfev=40 if starts == 1 else 400,
        )
        for start in begins[:starts]
    ]
    fitted = np.zeros(1 + 2 * size)
    fitted[:used] = min(found, key=lambda result: result.cost).x
    return fitted


def _start(shares: np.ndarray, losses: np.ndarray, part: float, used: int) -> np.ndarray:
    """Return a start with c a part of the smallest loss and T from a log-linear ridge fit."""
    size = shares.shape[1]
    floor = part * losses.min()
    logs = np.log(losses - floor)
    mean = shares.mean(axis=0)
    design = shares - mean
    ridge = 1e-3 * len(losses) * np.eye(size)
    tilt = np.linalg.solve(design.T @ design + ridge, design.T @ (logs - logs.mean()))
    start = np.full(used, 0.01)
    start[0], start[1 : 1 + size] = floor, logs.mean() + tilt - mean @ tilt
    return start


def _bootstrap(
    shares: np.ndarray, losses: np.ndarray, form: str, ridge: float, fitted: np.ndarray
) -> np.ndarray:
    """Return refits to the fitted losses plus resampled residuals: float64 [DRAWS, 1 + 2 K].

    Residuals are divided by sqrt(1 - leverage), so they have the size of the noise.
    """
    size = shares.shape[1]
    used = 1 + size * (2 if form == "saturating" else 1)
    expected = _losses(fitted, shares)
    jacobian = np.hstack(
        [
            np.ones((len(losses), 1)),
            (expected - fitted[0])[:, None] * _features(shares)[:, : used - 1],
        ]
    )
    held = np.zeros((used, used))
    held[1:, 1:] = _penalty(losses, size, ridge)[: used - 1, : used - 1]
    leverage = np.einsum(
        "ij,ji->i", jacobian, np.linalg.pinv(jacobian.T @ jacobian + held.T @ held) @ jacobian.T
    )
    residuals = (losses - expected) / np.sqrt(np.maximum(1 - leverage, 0.05))
    residuals -= residuals.mean()
    rng = np.random.default_rng(2)
    draws = np.empty((DRAWS, 1 + 2 * size))
    for i in range(DRAWS):
        drawn = np.maximum(expected + rng.choice(residuals, len(losses)), 1e-6)
        draws[i] = _fit(shares, drawn, form, ridge, begin=fitted)
    return draws
