"""Tables of mixtures and losses, and the refusal of those that cannot determine a mixture law."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.run_table import RunRecord
from megatron_chatflow.utils.user_files import read_text

_PREFIXES = ("train_the_pile_", "train_", "share:")
_LOSS_PREFIX, _LOSS_SUFFIX = "metric/the_pile_", "_val_loss"
_VARIES = 1e-6


@dataclass(frozen=True)
class MixtureTable:
    """Runs that differ in their mixture only."""

    source: str
    """What messages call it, e.g. the file."""
    names: tuple[str, ...]
    """Of the runs: [N]."""
    domains: tuple[str, ...]
    shares: np.ndarray
    """Rows add up to 1: float64 [N, K]."""
    losses: Mapping[str, np.ndarray]
    """{language: loss of each run, nan where it was not measured}: float64 [N] each."""
    unit: str = "nats per token"
    params: int | None = None
    tokens: int | None = None
    """Training tokens of each run; None: the table does not say."""

    def of(self, language: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (shares [M, K], losses [M]) of the runs that measured a language.

        Raises:
            ConfigError: no run measured it.
        """
        if language not in self.losses:
            raise ConfigError(
                f"{self.source}: no run measured {language!r}; the languages are "
                f"{', '.join(self.losses)}"
            )
        measured = np.isfinite(self.losses[language])
        return self.shares[measured], self.losses[language][measured]


def in_one_unit(records: Sequence[RunRecord]) -> tuple[list[RunRecord], str]:
    """Return the records with `loss` in one unit, and the unit.

    It is bits per byte where every record has them: losses per token of different languages cannot
    be weighed against each other.

    Raises:
        ConfigError: some records have only nats per token, others only bits per byte.
    """
    if all(record.bits_per_byte is not None for record in records):
        return [replace(record, loss=record.bits_per_byte) for record in records], "bits per byte"
    missing = next((record.name for record in records if record.loss is None), None)
    if missing is not None:
        raise ConfigError(
            f"run {missing} has bits per byte only and others have losses per token only; fill "
            f"one of the columns for all runs"
        )
    return list(records), "nats per token"


def mixture_table(source: str, records: Sequence[RunRecord], unit: str) -> MixtureTable:
    """Return the mixtures of runs of one size and length.

    Raises:
        ConfigError: a run has no mixture, or its shares do not add up to 1.
    """
    runs: dict[tuple[str, tuple[tuple[str, float], ...], int | None], dict[str, float]] = {}
    for record in records:
        if not record.mixture:
            raise ConfigError(
                f"{source}: run {record.name} has no mixture; add columns `share:DOMAIN`"
            )
        key = (record.name, tuple(sorted(record.mixture.items())), record.seed)
        if record.loss is not None:
            runs.setdefault(key, {})[record.language] = record.loss
    domains = tuple(dict.fromkeys(d for record in records for d in record.mixture))
    names = tuple(key[0] for key in runs)
    shares = np.array([[dict(key[1]).get(d, 0.0) for d in domains] for key in runs])
    languages = tuple(dict.fromkeys(language for losses in runs.values() for language in losses))
    return MixtureTable(
        source,
        names,
        domains,
        _normalized(source, names, shares),
        {
            language: np.array([found.get(language, math.nan) for found in runs.values()])
            for language in languages
        },
        unit,
        records[0].params,
        records[0].tokens,
    )


def largest_group(records: Sequence[RunRecord]) -> tuple[list[RunRecord], str]:
    """Return the runs of one size and length, and a note where others are left out.

    Of the groups with the most mixtures, it is the one with the most computation.
    """
    groups: dict[tuple[int, int], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.params, record.tokens), []).append(record)

    def rank(group: tuple[int, int]) -> tuple[int, int]:
        mixtures = {tuple(sorted(record.mixture.items())) for record in groups[group]}
        return len(mixtures), group[0] * group[1]

    params, tokens = best = max(groups, key=rank)
    left = len(records) - len(groups[best])
    note = (
        f"a mixture law is of runs of one size and length: {len(groups[best])} results of "
        f"{params:,} parameters and {tokens:,} tokens are used, {left} are not"
    )
    return groups[best], note if left else ""


def read_published(mixture: str | Path, losses: str | Path) -> MixtureTable:
    """Read two CSV files as RegMix (arXiv 2407.01492) publishes them, joined by their first column.

    Columns `train_the_pile_NAME` are shares, columns `metric/the_pile_NAME_val_loss` losses; other
    names are taken unchanged.

    Raises:
        ConfigError: a file cannot be read, or they do not fit together.
    """
    domains, rows = _read_numbers(mixture)
    languages, results = _read_numbers(losses, gaps=True)
    shared = [name for name in rows if name in results]
    if not shared:
        raise ConfigError(
            f"{mixture} and {losses}: no run is in both; the first column of both must be the "
            f"name of the run"
        )
    plain = []
    for name in domains:
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        plain.append(name.removeprefix(prefix))
    keys = [name.removeprefix(_LOSS_PREFIX).removesuffix(_LOSS_SUFFIX) for name in languages]
    measured = np.array([results[name] for name in shared])
    shares = np.array([rows[name] for name in shared])
    return MixtureTable(
        f"{mixture}",
        tuple(shared),
        tuple(plain),
        _normalized(str(mixture), shared, shares),
        {key: measured[:, i] for i, key in enumerate(keys)},
    )


def check_mixtures(table: MixtureTable, language: str) -> None:
    """Refuse runs that cannot determine the law of a language.

    Raises:
        ConfigError: which quantity cannot be determined, and which runs would help.
    """
    shares, _ = table.of(language)
    size = len(table.domains)
    where = f"{table.source}: {language}"
    mixtures = np.unique(np.round(shares, 9), axis=0)
    if len(mixtures) == 1:
        raise ConfigError(
            f"{where}: all {len(shares)} runs have one mixture, so the effect of the shares cannot "
            f"be determined; add runs with at least {size} other mixtures"
        )
    fixed = [d for d, low, high in _ranges(table.domains, shares) if high - low < _VARIES]
    if fixed:
        values = dict(zip(table.domains, shares[0], strict=True))
        listed = ", ".join(f"{d} ({values[d]:g})" for d in fixed)
        raise ConfigError(
            f"{where}: the share of {listed} is the same in every run, so its effect cannot be "
            f"determined; add a run with another share, or leave the column out"
        )
    if len(shares) < size + 2 or len(mixtures) < size + 1:
        raise ConfigError(
            f"{where}: {len(shares)} runs with {len(mixtures)} mixtures cannot determine the "
            f"{size + 1} parameters of {size} domains; add runs until there are {size + 2} with at "
            f"least {size + 1} mixtures"
        )
    _, values, vectors = np.linalg.svd(shares)
    if values[-1] < _VARIES * values[0]:
        tied = [d for d, v in zip(table.domains, vectors[-1], strict=True) if abs(v) > 0.05]
        raise ConfigError(
            f"{where}: the shares of {', '.join(tied)} vary only together, so their effects "
            f"cannot be separated; add a run in which only one of them changes"
        )


def _ranges(domains: Sequence[str], shares: np.ndarray) -> Iterable[tuple[str, float, float]]:
    low, high = shares.min(axis=0).tolist(), shares.max(axis=0).tolist()
    return zip(domains, low, high, strict=True)


def _normalized(source: str, names: Sequence[str], shares: np.ndarray) -> np.ndarray:
    """Return shares whose rows add up to 1; published ones are rounded to three digits."""
    sums = shares.sum(axis=1)
    wrong = [i for i, total in enumerate(sums) if not abs(total - 1) <= 0.02]
    if wrong or (shares < 0).any():
        i = wrong[0] if wrong else int(np.flatnonzero((shares < 0).any(axis=1))[0])
        raise ConfigError(
            f"{source}: the shares of run {names[i]} add up to {sums[i]:.4g} and the smallest is "
            f"{shares[i].min():.4g}; give shares from 0 to 1 that add up to 1"
        )
    return shares / sums[:, None]


def _read_numbers(
    path: str | Path, *, gaps: bool = False
) -> tuple[list[str], dict[str, list[float]]]:
    """Return the names of the columns after the first, and {first cell: numbers} of each row.

    With `gaps`, cells may be empty (nan).
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path))) if row]
    except (ConfigError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}; give a CSV file") from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ConfigError(f"{path}: it has no rows; give a CSV file with a header")
    found: dict[str, list[float]] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            values = [float(cell or "nan") if gaps else float(cell) for cell in row[1:]]
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: {error}; correct the file") from None
        if len(row) != len(rows[0]) or any(map(math.isinf, values)):
            raise ConfigError(
                f"{path}: line {number} has {len(row)} cells and the header {len(rows[0])}, or an "
                f"infinite one; correct the file"
            )
        if row[0] in found:
            raise ConfigError(f"{path}: line {number}: run {row[0]!r} is there twice; drop one")
        found[row[0]] = values
    return rows[0][1:], found
