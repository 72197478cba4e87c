"""What a fitted law is for: allocation of compute, compute saved, data transferred, predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_chatflow.planner.laws.allocation import (
    FLOPS_PER_TOKEN_AND_PARAMETER,
    PowerLaw,
    compute_saved,
    law_of,
    transferred_tokens,
)
from megatron_chatflow.planner.laws.forms import Array
from megatron_chatflow.planner.laws.registry import FitSettings
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.planner.laws.solver import Fit
from megatron_chatflow.planner.laws.uncertainty import (
    LEVEL,
    covariance,
    percentiles,
    residual_deviation,
)

_BEYOND = 10
"""Budgets that are more than this times the largest run's are far extrapolations."""


def plans(fit: Fit, draws: Mapping[str, Array], settings: FitSettings) -> dict[str, Any]:
    """Return the parts of a report that follow from the law.

    Args:
        fit: the law.
        draws: {constant: values of the bootstrap's refits}: [draws].
        settings: budgets, sizes and predictions that are asked for.
    """
    largest = max(FLOPS_PER_TOKEN_AND_PARAMETER * run.params * run.tokens for run in fit.runs)
    budgets = settings.budgets or (float(largest), float(largest * _BEYOND))
    kinds = fit.form.kinds or tuple(dict.fromkeys(run.kind for run in fit.runs))
    laws = {kind: (law_of(fit.constants, kind), law_of(draws, kind)) for kind in kinds}
    found: dict[str, Any] = {
        "largest_flops": float(largest),
        "allocation": {},
        "given_sizes": {},
        "predictions": _predictions(fit, settings),
    }
    for kind, (law, drawn) in laws.items():
        if law is None or drawn is None:
            continue
        found["allocation"][kind] = _allocation(law, drawn, budgets)
        found["given_sizes"][kind] = [
            _at_size(law, drawn, size, budget) for size in settings.sizes for budget in budgets
        ]
    scratch, continued = laws.get("scratch"), laws.get("continued")
    if scratch is not None and continued is not None:
        found |= _gains(scratch, continued, budgets, settings)
    return found


def _allocation(law: PowerLaw, drawn: PowerLaw, budgets: tuple[float, ...]) -> dict[str, Any]:
    a, b = law.exponents
    rows = []
    for flops in budgets:
        params, tokens = law.best(flops)
        best = drawn.best(flops)
        # Each refit takes its turn as the truth: what does it say of our split?
        lost = drawn.given_away(params, flops)
        rows.append(
            {
                "flops": flops,
                "params": _with_interval(params, best[0]),
                "tokens": _with_interval(tokens, best[1]),
                "tokens_per_parameter": tokens / params,
                "loss": _with_interval(law.best_loss(flops), drawn.best_loss(flops)),
                "given_away": _upper(lost),
            }
        )
    exponents = drawn.exponents
    return {
        "size_exponent": _with_interval(a, exponents[0]),
        "length_exponent": _with_interval(b, exponents[1]),
        "budgets": rows,
    }


def _at_size(law: PowerLaw, drawn: PowerLaw, params: int, flops: float) -> dict[str, Any]:
    tokens = flops / (FLOPS_PER_TOKEN_AND_PARAMETER * params)
    lost = drawn.given_away(params, flops)
    return {
        "flops": flops,
        "params": params,
        "tokens": tokens,
        "loss": _with_interval(law.loss(params, tokens), drawn.loss(params, tokens)),
        "given_away": _with_interval(law.given_away(params, flops), lost),
    }


def _gains(
    scratch: tuple[PowerLaw | None, PowerLaw | None],
    continued: tuple[PowerLaw | None, PowerLaw | None],
    budgets: tuple[float, ...],
    settings: FitSettings,
) -> dict[str, Any]:
    (s, s_drawn), (c, c_drawn) = scratch, continued
    if s is None or s_drawn is None or c is None or c_drawn is None:
        return {}
    saved = [
        {
            "flops": flops,
            "saved": _with_interval(
                compute_saved(s, c, flops), compute_saved(s_drawn, c_drawn, flops)
            ),
        }
        for flops in budgets
    ]
    places = [c.best(flops) for flops in budgets]
    places += [
        (size, flops / (FLOPS_PER_TOKEN_AND_PARAMETER * size))
        for size in settings.sizes
        for flops in budgets
    ]
    transferred = [
        {
            "params": params,
            "tokens": tokens,
            "transferred": _with_interval(
                transferred_tokens(s, c, params, tokens),
                transferred_tokens(s_drawn, c_drawn, params, tokens),
            ),
        }
        for params, tokens in places
        if np.isfinite(params)
    ]
    return {"compute_saved": saved, "transferred_tokens": transferred}


def _predictions(fit: Fit, settings: FitSettings) -> list[dict[str, Any]]:
    """Return predicted losses with the interval in which a new run's loss is."""
    from scipy.stats import t

    kinds = fit.form.kinds or (fit.runs[0].kind,)
    runs = [
        RunRecord("", params, tokens, None, kind=kind)
        for kind in kinds
        for params, tokens in settings.predictions
    ]
    if not runs:
        return []
    basis = fit.basis_on(runs)
    losses, rows = basis.loss(fit.theta), basis.log_jacobian(fit.theta)
    spread = np.nan_to_num(covariance(fit))
    variance = np.einsum("np,pq,nq->n", rows, spread, rows) + residual_deviation(fit) ** 2
    half = t.ppf((1 + LEVEL) / 2, fit.degrees_of_freedom) * np.sqrt(variance)
    return [
        {
            "params": run.params,
            "tokens": run.tokens,
            "kind": run.kind,
            "loss": {
                "estimate": float(loss),
                "low": float(loss * np.exp(-h)),
                "high": float(loss * np.exp(h)),
            },
        }
        for run, loss, h in zip(runs, losses, half, strict=True)
    ]


def _with_interval(value: Any, drawn: Any) -> dict[str, Any]:
    found = {"estimate": float(value)}
    if np.ndim(drawn) and len(drawn):
        interval = percentiles(np.asarray(drawn)[:, None])[0]
        found |= {"low": interval.low, "high": interval.high}
    return found


def _upper(drawn: Any) -> float | None:
    """Return what is not exceeded in 95% of the refits."""
    values = np.asarray(drawn)
    values = values[np.isfinite(values)]
    return float(np.quantile(values, LEVEL)) if len(values) else None


def curves(report: Mapping[str, Any], points: int = 60) -> dict[str, dict[str, Array]]:
    """Return what plots show of a law: losses over sizes and lengths, and the best of each budget.

    Args:
        report: of a fit, with ``constants`` and ``points``.
        points: per axis.

    Returns:
        {kind of runs: ``params`` [points], ``tokens`` [points], ``losses`` [tokens, params],
        ``flops`` [points] from the cheapest run to ten times the most expensive, and
        ``best_params``, ``best_tokens``, ``best_losses`` [points]}.
    """
    constants = {name: value["estimate"] for name, value in report["constants"].items()}
    found = {}
    for kind in dict.fromkeys(point["kind"] for point in report["points"]):
        law = law_of(constants, kind)
        if law is None:
            continue
        runs = [point for point in report["points"] if point["kind"] == kind]
        params = np.array([run["params"] for run in runs], dtype=float)
        tokens = np.array([run["tokens"] for run in runs], dtype=float)
        cost = FLOPS_PER_TOKEN_AND_PARAMETER * params * tokens
        n = np.geomspace(params.min() / 2, params.max() * 4, points)
        d = np.geomspace(tokens.min() / 2, tokens.max() * 4, points)
        flops = np.geomspace(cost.min(), cost.max() * _BEYOND, points)
        best = law.best(flops)
        found[kind] = {
            "params": n,
            "tokens": d,
            "losses": law.loss(n[None, :], d[:, None]),
            "flops": flops,
            "best_params": best[0],
            "best_tokens": best[1],
            "best_losses": law.loss(*best),
        }
    return found
