"""The laws of shares as forms of `chatflow fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.dcpt import DcptLaw
from megatron_chatflow.planner.laws.loss_models import DcptAt, LossModels, fit_records, to_plain
from megatron_chatflow.planner.laws.mixture_law import MixtureLaw
from megatron_chatflow.planner.laws.registry import FitSettings, Report
from megatron_chatflow.planner.laws.run_table import RunRecord

_READ = ("metric", "notes", "proposals")
_FLAGS = "--huber, --bootstrap, --resample, --seed, --flops, --params, --predict, --candidates"


def analyze(name: str, runs: Sequence[RunRecord], settings: FitSettings) -> Report:
    """Return the report of a mixture or D-CPT law of one held-out language.

    Its key `models` is what `chatflow propose` reads.

    Raises:
        ConfigError: the runs cannot determine the law, or a setting has no effect on it.
    """
    plain = FitSettings()
    unread = [
        field.name
        for field in dataclasses.fields(FitSettings)
        if field.name not in _READ and getattr(settings, field.name) != getattr(plain, field.name)
    ]
    if unread:
        raise ConfigError(
            f"--form {name}: {_FLAGS} have no effect on it, and one is given; drop it "
            f"(chatflow propose --what-if predicts losses)"
        )
    language = runs[0].language
    if settings.metric == "loss":
        runs = [dataclasses.replace(run, bits_per_byte=None) for run in runs]
    try:
        models = fit_records("runs", runs, [language], name)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix(f"runs: {language}: ")) from None
    model = models.models[language]
    report = _dcpt(model.law) if isinstance(model, DcptAt) else _mixture(models, model)
    return {
        "form": name,
        "metric": settings.metric,
        "runs": len(model.law.residuals if isinstance(model, DcptAt) else model.residuals),
        "models": to_plain(models),
        "warnings": [f"note: {note}" for note in models.notes],
        **report,
    }


def _mixture(models: LossModels, law: MixtureLaw) -> Report:
    formula = "c + exp(sum_j T_j x_j)"
    names = ["c", *(f"T {domain}" for domain in law.domains)]
    if law.form == "saturating":
        formula = "c + exp(sum_j T_j x_j - sum_j u_j log(1 + x_j / 0.01) / log(101))"
        names += [f"u {domain}" for domain in law.domains]
    low, high = np.quantile(law.draws, [0.025, 0.975], axis=0)
    constants = zip(names, law.parameters, low, high, strict=False)
    found = models.comparisons[law.target]
    lines = [f"ridge {law.ridge:g}, error on runs that were left out {law.error:.4g} rms"]
    if found.runs:
        lines.append(
            f"inside of the measured range ({found.runs} runs): law {found.law:.4g}, straight "
            f"interpolation {found.straight:.4g}"
        )
    return {"formula": formula, "constants": _constants(constants), "lines": lines}


def _dcpt(law: DcptLaw) -> Report:
    ends = law.constant_intervals()
    constants = [(name, value, *ends[name]) for name, value in law.constants.items()]
    size = "" if law.one_size else " + A/N^alpha"
    deviation = float(np.sqrt(np.mean(law.residuals**2)))
    return {
        "formula": f"E{size} + B r^eta/D^beta + C/(r + eps)^gamma",
        "constants": _constants(constants),
        "lines": [f"residuals {deviation:.2%} of the loss"],
    }


def _constants(rows: Any) -> dict[str, dict[str, float]]:
    return {
        name: {"estimate": float(value), "low": float(low), "high": float(high)}
        for name, value, low, high in rows
    }
