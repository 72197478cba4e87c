"""Fit a law to the runs of one held-out language, and report how well it is determined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.design import (
    DesignError,
    best_candidates,
    check_design,
    grid_of_candidates,
    nominal,
)
from megatron_chatflow.planner.laws.forms import (
    EXTENDED,
    JOINT,
    PLAIN,
    Array,
    Basis,
    Form,
    basis_of,
    frozen_form,
    losses_of,
)
from megatron_chatflow.planner.laws.plans import plans
from megatron_chatflow.planner.laws.registry import FitSettings, Report
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.planner.laws.solver import Fit, fit_law
from megatron_chatflow.planner.laws.uncertainty import (
    Interval,
    LeftOut,
    aicc,
    bootstrap,
    condition_number,
    influences,
    largest_size,
    left_out_error,
    percentiles,
    residual_deviation,
    t_intervals,
    without_runs,
)
from megatron_chatflow.report.law_table import short

_BETTER = 0.9
"""A form with more constants is chosen if its error on the largest size is below this times the
other's.
"""
_NO_ERROR = 1e-7
_SHOWN = 5
"""Influential runs that are reported."""
_REPEATS_DIFFER = 0.05
"""Losses of equal runs that differ by more than this are of different held-out sets."""
_ILL_CONDITIONED = 1e3
FROZEN_WARNING = (
    "intervals of B', beta' and gamma are too narrow: they take the constants from scratch for "
    "exact. In simulations the 95% intervals covered the truth in 47, 78 and 20%; use --form joint"
)


@dataclass(frozen=True)
class Candidate:
    """A form that was tried."""

    fit: Fit
    left_out: LeftOut | None
    why_not: str
    """Why there is no error on the largest size; empty where there is one."""


def analyze(name: str, runs: Sequence[RunRecord], settings: FitSettings) -> Report:
    """Fit one of the forms of `forms` and report everything about the fit.

    Args:
        name: ``auto``, ``plain``, ``extended``, ``joint`` or ``frozen``.
        runs: of one held-out language.
        settings: what is asked.

    Raises:
        DesignError: the runs do not determine the form's constants.
        ConfigError: the form is of other kinds of runs, or the table mixes held-out sets.
    """
    _check_repeats(runs, settings.metric)
    tried, base = _try_forms(name, runs, settings)
    best = _choose(tried)
    fit = best.fit
    draws = bootstrap(fit, settings.draws, settings.seed, settings.resample)
    constants = _draws_of_constants(fit.basis, draws)
    report: Report = {
        "form": fit.form.name,
        "formula": fit.form.formula,
        "metric": settings.metric,
        "runs": len(runs),
        "degrees_of_freedom": fit.degrees_of_freedom,
        "constants": _constants(fit, draws, base),
        "residual_deviation": residual_deviation(fit),
        "condition_number": condition_number(fit),
        "bootstrap": {"draws": settings.draws, "resample": settings.resample},
        "forms": [_tried(candidate, candidate is best) for candidate in tried],
        "left_out": _left_out(best),
        "influence": _influence(fit),
        "points": _points(fit),
    }
    report |= plans(fit, constants, settings)
    report["proposals"] = propose_runs(fit.basis, fit.theta, runs, settings)
    report["warnings"] = _warnings(fit, report, runs)
    report["draws"] = {n: np.asarray(v).tolist() for n, v in constants.items()}
    return plain_values(report)


def propose_runs(
    basis: Basis, theta: Array, runs: Sequence[RunRecord], settings: FitSettings
) -> list[dict[str, Any]]:
    """Return the runs that would determine the law most."""
    candidates = list(settings.candidates) or grid_of_candidates(basis.form, runs)
    kinds = basis.form.kinds
    candidates = [run for run in candidates if not kinds or run.kind in kinds]
    found = best_candidates(basis, theta, runs, candidates, settings.proposals)
    return [
        {
            "name": proposal.run.name,
            "params": proposal.run.params,
            "tokens": proposal.run.tokens,
            "kind": proposal.run.kind,
            "shrinks": proposal.shrinks,
        }
        for proposal in found
    ]


def _try_forms(
    name: str, runs: Sequence[RunRecord], settings: FitSettings
) -> tuple[list[Candidate], Fit | None]:
    """Fit the forms in question; the second value is the fit from scratch of a frozen form."""
    kinds = {run.kind for run in runs}
    both = len(kinds) > 1
    if name in ("plain", "extended") and both:
        raise ConfigError(
            f"--form {name}: the runs are of two kinds, {' and '.join(sorted(kinds))}; choose one "
            f"with --where kind=scratch, or fit both with --form joint"
        )
    base = None
    if name == "frozen":
        scratch = [run for run in runs if run.kind == "scratch"]
        continued = [run for run in runs if run.kind == "continued"]
        _check(PLAIN, scratch, runs, settings)
        base = fit_law(PLAIN, scratch, settings.metric, settings.huber)
        forms, runs = [frozen_form(base.constants)], continued
    elif name == "joint" or (name == "auto" and both):
        forms = [JOINT]
    elif name == "auto":
        forms = [PLAIN, EXTENDED]
    else:
        forms = [PLAIN if name == "plain" else EXTENDED]
    _check(forms[0], runs, runs, settings)
    usable = [forms[0], *(form for form in forms[1:] if _determined(form, runs, settings.metric))]
    return [_candidate(form, runs, settings) for form in usable], base


def _check(
    form: Form, runs: Sequence[RunRecord], all_runs: Sequence[RunRecord], settings: FitSettings
) -> None:
    """Refuse a design, with the runs that would repair it."""
    try:
        check_design(form, runs, settings.metric)
    except DesignError as error:
        if not {run.kind for run in runs} >= set(form.kinds) - _fixed_kinds(form):
            raise
        basis = basis_of(form, runs)
        theta = nominal(basis, losses_of(runs, settings.metric))
        added = ", ".join(
            f"{run['kind']} N = {short(run['params'])} D = {short(run['tokens'])}"
            for run in propose_runs(basis, theta, runs, settings)
        )
        raise DesignError(f"{error}; add runs, the most informative first: {added}") from None


def _fixed_kinds(form: Form) -> set[str]:
    return {t.kind for t in form.terms if t.kind is not None and t.coefficient in form.fixed}


def _determined(form: Form, runs: Sequence[RunRecord], metric: str) -> bool:
    try:
        check_design(form, runs, metric)
    except DesignError:
        return False
    return True


def _candidate(form: Form, runs: Sequence[RunRecord], settings: FitSettings) -> Candidate:
    fit = fit_law(form, runs, settings.metric, settings.huber)
    rest = [run for run, left in zip(runs, largest_size(runs), strict=True) if not left]
    try:
        check_design(form, rest, settings.metric)
    except DesignError as error:
        return Candidate(fit, None, f"without the largest size, {error}")
    return Candidate(fit, left_out_error(form, runs, settings.metric, settings.huber), "")


def _choose(tried: Sequence[Candidate]) -> Candidate:
    """Return the form of the smallest error on the largest size, of AICc where there is none.

    More constants must reduce the error clearly.
    """
    best = tried[0]
    for other in tried[1:]:
        if best.left_out is not None and other.left_out is not None:
            errors = best.left_out.rms, other.left_out.rms
            better = errors[1] < _BETTER * errors[0] and errors[0] > _NO_ERROR
        else:
            better = aicc(other.fit) < aicc(best.fit) - 2
        best = other if better else best
    return best


def _check_repeats(runs: Sequence[RunRecord], metric: str) -> None:
    losses = losses_of(runs, metric)
    groups: dict[tuple[object, ...], list[float]] = {}
    for run, loss in zip(runs, losses, strict=True):
        key = run.params, run.tokens, run.kind, run.share, run.replay, tuple(run.mixture.items())
        groups.setdefault(key, []).append(float(loss))
    for (params, tokens, *_), values in groups.items():
        if math.log(max(values) / min(values)) > _REPEATS_DIFFER:
            raise ConfigError(
                f"{metric}: {len(values)} runs of N = {short(params)} and D = "  # pyright: ignore[reportArgumentType]
                f"{short(tokens)} have losses from {min(values):.4g} to {max(values):.4g}, "  # pyright: ignore[reportArgumentType]
                f"so the table mixes held-out sets or settings; choose one with --where "
                f"COLUMN=VALUE, or fit each with --columns language=COLUMN"
            )


def _draws_of_constants(basis: Basis, draws: Array) -> dict[str, Any]:
    values = basis.values(draws)
    fixed = {n: np.full(len(draws), value) for n, value in basis.form.fixed.items()}
    return fixed | {name: values[:, i] for i, name in enumerate(basis.form.constants)}


def _constants(fit: Fit, draws: Array, base: Fit | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in (base, fit):
        if part is None:
            continue
        intervals = t_intervals(part)
        resampled = percentiles(part.basis.values(draws)) if part is fit and len(draws) else None
        for i, name in enumerate(part.form.constants):
            zero = name in part.vanished
            found[name] = {
                "estimate": 0.0 if zero else part.constants[name],
                "low": intervals[name].low,
                "high": intervals[name].high,
            }
            if resampled is not None:
                found[name] |= {
                    "bootstrap_low": resampled[i].low,
                    "bootstrap_high": resampled[i].high,
                }
            if part is base:
                found[name]["fixed"] = True
    return found


def _tried(candidate: Candidate, chosen: bool) -> dict[str, Any]:
    return {
        "form": candidate.fit.form.name,
        "constants": len(candidate.fit.form.constants),
        "residual_deviation": residual_deviation(candidate.fit),
        "aicc": aicc(candidate.fit),
        "left_out_rms": candidate.left_out.rms if candidate.left_out else None,
        "chosen": chosen,
    }


def _left_out(candidate: Candidate) -> dict[str, Any]:
    left = candidate.left_out
    if left is None:
        return {"why_not": candidate.why_not}
    return {"params": left.params, "runs": left.runs, "rms": left.rms, "worst": left.worst}


def _influence(fit: Fit) -> dict[str, Any]:
    found = influences(fit)
    index = {id(run): i for i, run in enumerate(fit.runs)}
    top = found[: min(_SHOWN, fit.degrees_of_freedom - 1)]
    rows = [index[id(entry.run)] for entry in top]
    return {
        "runs": [
            {
                "name": entry.run.name,
                "params": entry.run.params,
                "tokens": entry.run.tokens,
                "kind": entry.run.kind,
                "residual": entry.residual,
                "leverage": entry.leverage,
                "cook": entry.distance,
                "refitted": entry.refitted,
                "constants_without": entry.without,
            }
            for entry in found
        ],
        "without_top": {
            "names": [entry.run.name for entry in top],
            "constants": fit.basis.constants(without_runs(fit, rows)) if rows else None,
        },
    }


def _points(fit: Fit) -> list[dict[str, Any]]:
    predicted = fit.basis.loss(fit.theta)
    return [
        {
            "name": run.name,
            "params": run.params,
            "tokens": run.tokens,
            "kind": run.kind,
            "measured": float(loss),
            "predicted": float(value),
        }
        for run, loss, value in zip(fit.runs, fit.losses, predicted, strict=True)
    ]


def _warnings(fit: Fit, report: Report, runs: Sequence[RunRecord]) -> list[str]:
    found = [FROZEN_WARNING] if fit.form.fixed else []
    for name in fit.vanished:
        found.append(f"{name} is zero within rounding: these runs do not show this term")
    for power in fit.form.powers:
        interval = report["constants"][power.exponent]
        if power.positive and not interval["low"] > 0 and not math.isnan(interval["low"]):
            found.append(f"the interval of {power.exponent} includes zero")
    if report["condition_number"] > _ILL_CONDITIONED:
        found.append(
            f"the condition number is {report['condition_number']:.2g}: constants are hardly "
            f"distinguishable; the proposed runs would help"
        )
    shares = {run.share for run in runs if run.kind == "continued"} - {None}
    if len({round(share, 2) for share in shares if share is not None}) > 1:
        found.append(
            f"continued runs have {len(shares)} shares of the target language, which the "
            f"{fit.form.name} form ignores; choose one with --where"
        )
    return found


def plain_values(value: Any) -> Any:
    """Return a report with nan and infinities as None, so that it is valid JSON."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Interval):
        return {"low": plain_values(value.low), "high": plain_values(value.high)}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
