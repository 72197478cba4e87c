"""The fitted laws of a table, one per held-out language, as the proposal reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.planner.laws.dcpt import DcptLaw, check_design, fit_dcpt
from megatron_chatflow.planner.laws.interpolation import Comparison, compare, interpolate
from megatron_chatflow.planner.laws.mixture_law import MixtureLaw, fit_mixture_law
from megatron_chatflow.planner.laws.mixture_table import (
    MixtureTable,
    check_mixtures,
    in_one_unit,
    largest_group,
    mixture_table,
)
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import load_json, read_text

FORMS = ("mixture", "dcpt")
_FORMAT = "megatron_chatflow loss models"


@dataclass(frozen=True)
class DcptAt:
    """A D-CPT law at one size and length, as a function of the mixture."""

    law: DcptLaw
    number: int
    """Of the language among the domains: the law reads its own share only."""
    params: int
    tokens: int

    @property
    def error(self) -> float:
        """Return the root mean square of log(measured / predicted)."""
        return float(np.sqrt(np.mean(self.law.residuals**2)))

    def value_and_gradient(
        self, shares: np.ndarray, effective: np.ndarray, slope: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient, as `MixtureLaw.value_and_gradient`."""
        share = float(effective[self.number])
        gradient = np.zeros(len(shares))
        rate = self.law.slope(self.params, self.tokens, share)
        gradient[self.number] = rate * slope[self.number]
        return float(self.law.predict(self.params, self.tokens, share)), gradient

    def interval(
        self, shares: np.ndarray, effective: np.ndarray | None = None, level: float = 0.95
    ) -> tuple[float, float]:
        """Return the interval of the loss of a new run."""
        own = (shares if effective is None else effective)[self.number]
        return self.law.interval(self.params, self.tokens, float(own), level)


@dataclass(frozen=True)
class LossModels:
    """What predicts the losses of a mixture."""

    source: str
    """The table that the laws were fitted to."""
    form: str
    """mixture | dcpt."""
    domains: tuple[str, ...]
    measured: np.ndarray
    """The mixture of each run: float64 [N, K]."""
    models: Mapping[str, MixtureLaw | DcptAt]
    comparisons: Mapping[str, Comparison]
    """{language: the law against straight interpolation}; none for D-CPT laws."""
    unit: str
    params: int | None
    tokens: int | None
    """Of the runs (mixture), or of the prediction (dcpt); None: not known."""
    notes: tuple[str, ...] = ()

    def inside(self, shares: np.ndarray) -> bool:
        """Return whether a mixture is inside of the measured range (the convex hull)."""
        return interpolate(self.measured, np.zeros(len(self.measured)), shares) is not None

    def outside(self, shares: np.ndarray) -> list[str]:
        """Return the domains whose share is beyond every measured one, with the measured range."""
        low, high = self.measured.min(axis=0), self.measured.max(axis=0)
        return [
            f"{name} {x:.4g} (measured {a:.4g} to {b:.4g})"
            for name, x, a, b in zip(self.domains, shares, low, high, strict=True)
            if not a - 1e-6 <= x <= b + 1e-6
        ]

    def at(self, params: int | None, tokens: int | None) -> LossModels:
        """Return D-CPT laws at another size and length; None: unchanged."""
        if self.form != "dcpt":
            return self
        params, tokens = params or self.params, tokens or self.tokens
        models: dict[str, MixtureLaw | DcptAt] = {
            language: replace(model, params=params, tokens=tokens)
            for language, model in self.models.items()
            if isinstance(model, DcptAt)
        }
        return replace(self, models=models, params=params, tokens=tokens)


def fit_mixtures(
    table: MixtureTable,
    languages: Sequence[str],
    report: Callable[[str], None] = lambda _: None,
    notes: Sequence[str] = (),
) -> LossModels:
    """Fit a mixture law for each language.

    Args:
        table: runs of one size and length.
        languages: those to fit.
        report: called with what is being fitted.
        notes: of reading the table.

    Raises:
        ConfigError: the table cannot determine a law.
    """
    for language in languages:
        check_mixtures(table, language)
    models, comparisons = {}, {}
    for number, language in enumerate(languages, 1):
        report(f"fitting the law of {language} ({number} of {len(languages)})")
        shares, losses = table.of(language)
        models[language] = fit_mixture_law(language, table.domains, shares, losses)
        comparisons[language] = compare(models[language], shares, losses)
    return LossModels(
        table.source,
        "mixture",
        table.domains,
        table.shares,
        models,
        comparisons,
        table.unit,
        table.params,
        table.tokens,
        tuple(notes),
    )


def fit_records(
    source: str,
    records: Sequence[RunRecord],
    languages: Sequence[str],
    form: str | None,
    report: Callable[[str], None] = lambda _: None,
) -> LossModels:
    """Fit the laws of a table of runs.

    Args:
        source: what messages call the table.
        records: with their mixtures.
        languages: those to fit.
        form: mixture or dcpt; None: dcpt where the runs of every language determine it.
        report: called with what is being fitted.

    Raises:
        ConfigError: the table cannot determine the laws.
    """
    records, unit = in_one_unit(records)
    notes = []
    continued = [record for record in records if record.kind == "continued"]
    if continued and len(continued) < len(records):
        left = len(records) - len(continued)
        notes.append(f"{left} results of runs from scratch are not used, only continued runs")
        records = continued
    by_language = {
        language: [
            replace(record, share=record.mixture.get(language, 0.0))
            for record in records
            if record.language == language
        ]
        for language in languages
    }
    if form != "mixture":
        try:
            for language, runs in by_language.items():
                if not any(language in run.mixture for run in runs):
                    raise ConfigError(
                        f"{source}: {language}: no domain of the mixtures has this name, and a "
                        f"D-CPT law reads the language's own share"
                    )
                check_design(source, language, runs)
            form = "dcpt"
        except ConfigError:
            if form == "dcpt":
                raise
    if form != "dcpt":
        group, note = largest_group(records)
        return fit_mixtures(
            mixture_table(source, group, unit),
            languages,
            report,
            [*notes, *([note] if note else [])],
        )
    domains = tuple(dict.fromkeys(name for record in records for name in record.mixture))
    params = max(record.params for record in records)
    tokens = max(record.tokens for record in records)
    models = {}
    for number, (language, runs) in enumerate(by_language.items(), 1):
        report(f"fitting the law of {language} ({number} of {len(languages)})")
        law = fit_dcpt(source, language, runs)
        models[language] = DcptAt(law, domains.index(language), params, tokens)
    runs = {
        (r.name, r.params, r.tokens, r.seed): [r.mixture.get(name, 0.0) for name in domains]
        for r in records
    }
    return LossModels(
        source,
        "dcpt",
        domains,
        np.array(list(runs.values())),
        models,
        {},
        unit,
        params,
        tokens,
        (*notes, *(["a D-CPT law reads the own share of a language only"] * (len(domains) > 2))),
    )


def write_models(path: str | Path, models: LossModels) -> None:
    """Write laws as JSON, which `read_models` reads back.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(Path(path), json.dumps(to_plain(models), ensure_ascii=False))


def to_plain(models: LossModels) -> dict[str, Any]:
    """Return laws as JSON has them."""
    text = json.dumps({"format": _FORMAT, **asdict(models)}, default=lambda array: array.tolist())
    return json.loads(text)


def read_models(path: str | Path) -> LossModels:
    """Read the laws that `write_models` wrote, or `chatflow fit --form mixture --output`.

    Raises:
        ConfigError: the file cannot be read or is not of this kind.
    """
    advice = (
        "give a file of --save-laws or of `chatflow fit --form mixture --output`, or a table of "
        "runs"
    )
    try:
        content = load_json(read_text(path))
    except ChatflowError as error:
        raise ConfigError(f"{path}: {error}; {advice}") from None
    parts: list[Any] = [content]
    if isinstance(content, dict) and isinstance(content.get("laws"), list):
        parts = [law.get("models") if isinstance(law, dict) else None for law in content["laws"]]
    if not parts or any(not isinstance(p, dict) or p.get("format") != _FORMAT for p in parts):
        raise ConfigError(f"{path}: it has no laws of mixtures; {advice}")
    try:
        first, *others = [_models(part) for part in parts]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: it is damaged ({type(error).__name__}: {error}); {advice}"
        ) from None
    for other in others:
        if (other.form, other.domains, other.unit) != (first.form, first.domains, first.unit):
            raise ConfigError(f"{path}: its laws are of several forms, units or domains; {advice}")
        first = replace(
            first,
            models={**first.models, **other.models},
            comparisons={**first.comparisons, **other.comparisons},
        )
    return first


def _models(content: Mapping[str, Any]) -> LossModels:
    fields = {key: value for key, value in content.items() if key != "format"}
    build = _dcpt_at if content["form"] == "dcpt" else _mixture_law
    fields["models"] = {language: build(entry) for language, entry in content["models"].items()}
    fields["comparisons"] = {k: Comparison(**entry) for k, entry in content["comparisons"].items()}
    fields["domains"] = tuple(content["domains"])
    fields["measured"] = np.array(content["measured"], float)
    fields["notes"] = tuple(content["notes"])
    return LossModels(**fields)


def _arrays(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**entry, **{name: np.array(entry[name], float) for name in names}}


def _mixture_law(entry: Mapping[str, Any]) -> MixtureLaw:
    fields = _arrays(entry, "rates", "saturation", "residuals", "draws")
    fields["domains"] = tuple(entry["domains"])
    return MixtureLaw(**fields)


def _dcpt_at(entry: Mapping[str, Any]) -> DcptAt:
    fields = _arrays(entry["law"], "inner", "residuals", "draws")
    fields |= {name: tuple(fields[name]) for name in ("center", "shares")}
    return DcptAt(**{**entry, "law": DcptLaw(**fields)})
