"""The D-CPT law (arXiv 2406.01375): the loss of continued training by size, length and share.

    L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma

N is the number of parameters, D that of training tokens and r the share of the language in them,
on whose held-out text L is measured. Where all runs have one size, E contains A / N^alpha.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.run_table import RunRecord

DRAWS = 200
NAMES = ("E", "A", "alpha", "B", "eta", "beta", "C", "eps", "gamma")

# Parameters inside: E, log(A / N0^alpha), alpha, log(B / D0^beta), eta, beta, log C, log eps, gamma
_LOW = np.array([0.0, -40.0, 0.01, -40.0, 0.01, 0.01, -40.0, np.log(1e-4), 0.01])
_HIGH = np.array([np.inf, 20.0, 3.0, 20.0, 5.0, 3.0, 20.0, np.log(2.0), 5.0])
_SIZE = (1, 2)  # the terms that only runs of several sizes determine
_REFINED = 6


@dataclass(frozen=True)
class DcptLaw:
    """A fitted law of one held-out language."""

    language: str
    inner: np.ndarray
    """Parameters in the logarithmic form above: float64 [9]."""
    center: tuple[float, float]
    """(N0, D0), the geometric means of the runs."""
    one_size: int | None
    """The size of all runs, if it is one; E then contains the term in N."""
    residuals: np.ndarray
    """log(measured / predicted) of each run: float64 [N]."""
    draws: np.ndarray
    """Bootstrap refits of `inner`: float64 [DRAWS, 9]."""
    shares: tuple[float, float]
    """Smallest and largest measured share."""

    @property
    def constants(self) -> dict[str, float]:
        """Return {name: value} of the printed form."""
        return _constants(self.inner, self.center, self.one_size is not None)

    def constant_intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Return {name: (low, high)} from the bootstrap."""
        rows = [_constants(draw, self.center, self.one_size is not None) for draw in self.draws]
        ends = [(1 - level) / 2, (1 + level) / 2]
        return {
            name: tuple(np.quantile([row[name] for row in rows], ends).tolist())
            for name in self.constants
        }

    def predict(self, params: float, tokens: float, share: np.ndarray | float) -> np.ndarray:
        """Return the loss at N, D and shares [...]: float64 [...]."""
        n, d = params / self.center[0], tokens / self.center[1]
        return _losses(self.inner, n, d, np.asarray(share, float))

    def slope(self, params: float, tokens: float, share: float) -> float:
        """Return d L / d r."""
        p, d = self.inner, tokens / self.center[1]
        rise = np.exp(p[3]) * d ** -p[5] * p[4] * max(share, 1e-9) ** (p[4] - 1)
        fall = p[8] * np.exp(p[6]) * (share + np.exp(p[7])) ** (-p[8] - 1)
        return float(rise - fall)

    def interval(
        self, params: float, tokens: float, share: float, level: float = 0.95
    ) -> tuple[float, float]:
        """Return the interval of the loss of a new run, from the bootstrap and the residuals."""
        n, d = params / self.center[0], tokens / self.center[1]
        spread = len(self.residuals) / max(len(self.residuals) - len(NAMES), 1)
        noise = np.random.default_rng(0).choice(self.residuals, len(self.draws)) * spread**0.5
        losses = np.array([_losses(draw, n, d, np.asarray(share, float)) for draw in self.draws])
        ends = np.quantile(losses * np.exp(noise), [(1 - level) / 2, (1 + level) / 2])
        return float(ends[0]), float(ends[1])


def check_design(source: str, language: str, runs: Sequence[RunRecord]) -> None:
    """Refuse runs that cannot determine the law.

    Raises:
        ConfigError: which quantity cannot be determined, and which runs would help.
    """
    where = f"{source}: {language or 'the language'}"
    if any(run.share is None for run in runs):
        nameless = next(run.name for run in runs if run.share is None)
        raise ConfigError(
            f"{where}: run {nameless} has no share; fill the column `share` (of the language in "
            f"the training tokens)"
        )
    counts = {
        "sizes": ({run.params for run in runs}, 3, "A and alpha"),
        "lengths": ({run.tokens for run in runs}, 3, "B and beta"),
        "shares": ({run.share for run in runs}, 4, "eta, C, eps and gamma"),
    }
    for what, (values, least, unknown) in counts.items():
        if len(values) < least and not (what == "sizes" and len(values) == 1):
            raise ConfigError(
                f"{where}: runs of {len(values)} {what} cannot determine {unknown}; add runs until "
                f"there are {least} {what}"
            )
    logs = [np.log([run.params for run in runs]), np.log([run.tokens for run in runs])]
    several = [values - values.mean() for values in logs if np.ptp(values) > 0]
    if len(several) == 2 and np.linalg.svd(np.stack(several))[1][-1] < 0.05 * len(runs) ** 0.5:
        raise ConfigError(
            f"{where}: the length of every run is in proportion to its size, so alpha and beta "
            f"cannot be separated; add a run of the smallest size with the largest length"
        )
    least = len(NAMES) + 2 - (len(_SIZE) if len(several) == 1 else 0)
    if len(runs) < least:
        raise ConfigError(
            f"{where}: {len(runs)} runs cannot determine the {least - 2} constants; add runs until "
            f"there are {least}"
        )


def fit_dcpt(source: str, language: str, runs: Sequence[RunRecord]) -> DcptLaw:
    """Fit the law of one language by least squares of log L.

    Starts come from a grid over the exponents, with the linear constants by non-negative least
    squares.

    Args:
        source: what messages call the table.
        language: the held-out language.
        runs: with params, tokens, share and loss.

    Raises:
        ConfigError: the runs cannot determine the law.
    """
    check_design(source, language, runs)
    n = np.array([float(run.params) for run in runs])
    d = np.array([float(run.tokens) for run in runs])
    r = np.array([run.share for run in runs], float)
    losses = np.array([run.loss if run.loss is not None else run.bits_per_byte for run in runs])
    center = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d).mean()))
    n, d = n / center[0], d / center[1]
    one = bool(np.ptp(n) == 0)
    starts = _grid_starts(n, d, r, losses, one)
    refined = [_refine(start, n, d, r, losses, one, 1e-14, 2000) for start in starts]
    inner = min(refined, key=lambda found: found[1])[0]
    predicted = _losses(inner, n, d, r)
    residuals = np.log(losses / predicted)
    free = len(NAMES) - (len(_SIZE) if one else 0)
    scaled = residuals * (len(runs) / max(len(runs) - free, 1)) ** 0.5
    rng = np.random.default_rng(0)
    draws = np.empty((DRAWS, len(NAMES)))
    for i in range(DRAWS):
        drawn = predicted * np.exp(rng.choice(scaled, len(runs)))
        draws[i] = _refine(inner, n, d, r, drawn, one, 1e-8, 40)[0]
    size = int(runs[0].params) if one else None
    return DcptLaw(
        language, inner, center, size, residuals, draws, (float(r.min()), float(r.max()))
    )


def _terms(p: np.ndarray, n: np.ndarray | float, d: np.ndarray | float, r: np.ndarray):
    """Return the three terms of the law after E."""
    size = np.exp(p[1]) * np.power(n, -p[2])
    length = np.exp(p[3]) * np.power(r, p[4]) * np.power(d, -p[5])
    return size, length, np.exp(p[6]) * np.power(r + np.exp(p[7]), -p[8])


def _losses(
    p: np.ndarray, n: np.ndarray | float, d: np.ndarray | float, r: np.ndarray
) -> np.ndarray:
    return p[0] + sum(_terms(p, n, d, r))


def _refine(
    start: np.ndarray,
    n: np.ndarray,
    d: np.ndarray,
    r: np.ndarray,
    losses: np.ndarray,
    one: bool,
    tolerance: float,
    most: int,
) -> tuple[np.ndarray, float]:
    """Return (parameters, cost) of a least-squares fit of log L from a start."""
    from scipy.optimize import least_squares

    free = np.array([i for i in range(len(NAMES)) if not (one and i in _SIZE)])

    def full(p: np.ndarray) -> np.ndarray:
        found = start.copy()
        found[free] = p
        return found

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.log(_losses(full(p), n, d, r) / losses)

    def jacobian(p: np.ndarray) -> np.ndarray:
        q = full(p)
        size, length, share = _terms(q, n, d, r)
        edge = r + np.exp(q[7])
        columns = [
            np.ones_like(n),
            size,
            -size * np.log(n),
            length,
            length * np.log(np.maximum(r, 1e-300)),
            -length * np.log(d),
            share,
            -q[8] * share * np.exp(q[7]) / edge,
            -share * np.log(edge),
        ]
        return (np.stack(columns, 1) / (q[0] + size + length + share)[:, None])[:, free]

    inside = np.clip(start, _LOW + 1e-9, _HIGH - 1e-9)[free]
    found = least_squares(
        residuals,
        inside,
        jac=jacobian,  # pyright: ignore[reportArgumentType] (scipy accepts a function)
        bounds=(_LOW[free], _HIGH[free]),
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=tolerance,
        max_nfev=most,
    )
    return full(found.x), float(found.cost)


def _grid_starts(
    n: np.ndarray, d: np.ndarray, r: np.ndarray, losses: np.ndarray, one: bool
) -> list[np.ndarray]:
    from scipy.optimize import nnls

    found = []
    exponents = (0.15, 0.3, 0.5, 0.8)
    grid = itertools.product(
        (1.0,) if one else exponents, exponents, (0.2, 0.6, 1.2), (0.01, 0.1), (0.3, 1.0, 2.0)
    )
    for alpha, beta, eta, eps, gamma in grid:
        columns = [np.ones_like(n), n**-alpha, r**eta * d**-beta, (r + eps) ** -gamma]
        columns[1] = columns[1] * (not one)
        linear, error = nnls(np.stack(columns, 1) / losses[:, None], np.ones_like(losses))
        e, a, b, c = np.maximum(linear, 1e-6)
        a = 1e-300 if one else a
        start = [e, np.log(a), alpha, np.log(b), eta, beta, np.log(c), np.log(eps), gamma]
        found.append((error, np.array(start)))
    found.sort(key=lambda pair: pair[0])
    return [start for _, start in found[:_REFINED]]


def _constants(inner: np.ndarray, center: tuple[float, float], one: bool) -> dict[str, float]:
    values: Mapping[str, float] = {
        "E": inner[0],
        "A": np.exp(inner[1]) * center[0] ** inner[2],
        "alpha": inner[2],
        "B": np.exp(inner[3]) * center[1] ** inner[5],
        "eta": inner[4],
        "beta": inner[5],
        "C": np.exp(inner[6]),
        "eps": np.exp(inner[7]),
        "gamma": inner[8],
    }
    return {k: float(v) for k, v in values.items() if not (one and k in ("A", "alpha"))}
