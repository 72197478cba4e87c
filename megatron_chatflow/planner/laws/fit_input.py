"""Read the tables and run directories of `fit`, and choose the metric that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.run_records import records_of_run
from megatron_chatflow.planner.laws.run_table import RunRecord, read_table
from megatron_chatflow.report.law_table import short

_NAMED = 3
"""Runs that a message names."""


@dataclass(frozen=True)
class FitInput:
    """The runs of a fit."""

    runs: tuple[RunRecord, ...]
    metric: str
    """``loss`` or ``bits_per_byte``."""
    notes: tuple[str, ...]
    """What the numbers are, one line each."""

    def languages(self) -> dict[str, list[RunRecord]]:
        """Return {held-out language: its runs} in the order of the tables."""
        found: dict[str, list[RunRecord]] = {}
        for run in self.runs:
            found.setdefault(run.language, []).append(run)
        return found


def read_runs(
    paths: Sequence[Path],
    *,
    columns: Mapping[str, str],
    where: Mapping[str, str],
    leave_out: Sequence[str] = (),
    allow_unannealed: bool = False,
    bits_per_byte: bool = False,
) -> FitInput:
    """Read CSV files and run directories.

    Args:
        paths: at least one.
        columns: see `read_table`.
        where: see `read_table`; for run directories, of the fields of their records.
        leave_out: names of runs.
        allow_unannealed: accept runs whose learning rate had not finished decaying.
        bits_per_byte: fit bits per byte also where losses per token can be compared.

    Raises:
        ConfigError: a table or directory cannot be read, no run is left, a run was not annealed, or
            the metric is missing.
    """
    runs: list[RunRecord] = []
    for path in paths:
        if path.is_dir():
            runs += _of_directory(path, where)
        else:
            runs += read_table(path, columns, where)
    runs = _without(runs, leave_out)
    if not runs:
        raise ConfigError(f"{_list(paths)}: no run is left; check --where and --leave-out")
    unannealed = [run.name for run in runs if run.annealed is False]
    if unannealed and not allow_unannealed:
        raise ConfigError(
            f"annealed: the learning rate of {_named(unannealed)} had not finished decaying, so "
            f"the loss is above that of the length; train to the end of the decay, leave them out "
            f"with --leave-out, or give --allow-unannealed"
        )
    metric, why = _metric(runs, bits_per_byte)
    return FitInput(tuple(runs), metric, tuple(_notes(paths, runs, columns, why, unannealed)))


def _of_directory(path: Path, where: Mapping[str, str]) -> list[RunRecord]:
    found = records_of_run(path)
    for column, value in where.items():
        if not hasattr(found[0], column):
            raise ConfigError(
                f"--where {column}={value}: records of run directories have no {column!r}; use a "
                f"field such as language or kind"
            )
        found = [record for record in found if str(getattr(record, column)) == value]
    return found


def _without(runs: Sequence[RunRecord], names: Sequence[str]) -> list[RunRecord]:
    known = {run.name for run in runs}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"--leave-out {missing[0]!r}: no run has this name; names are {_named(sorted(known))}"
        )
    return [run for run in runs if run.name not in names]


def _metric(runs: Sequence[RunRecord], asked: bool) -> tuple[str, str]:
    """Return the metric of the fit, and what it is in words."""
    tokenizers = {run.tokenizer for run in runs} - {""}
    several = len(tokenizers) > 1
    no_loss = all(run.loss is None for run in runs)
    if not (asked or several or no_loss):
        return "loss", "the loss is in nats per token"
    lacking = [run.name for run in runs if run.bits_per_byte is None]
    if lacking and (several or asked):
        reason = f"the runs have {len(tokenizers)} tokenizers, so " if several else ""
        raise ConfigError(
            f"bits_per_byte: {reason}bits per byte are needed, and {_named(lacking)} has none; add "
            f"the column, or choose the runs of one tokenizer with --where tokenizer=NAME"
        )
    why = f", because the runs have {len(tokenizers)} tokenizers" if several else ""
    return "bits_per_byte", f"the loss is in bits per byte{why}"


def _notes(
    paths: Sequence[Path],
    runs: Sequence[RunRecord],
    columns: Mapping[str, str],
    metric: str,
    unannealed: Sequence[str],
) -> list[str]:
    sizes = sorted({run.params for run in runs})
    lengths = sorted({run.tokens for run in runs})
    kinds = [f"{sum(run.kind == k for run in runs)} {k}" for k in ("scratch", "continued")]
    column = f" (column {columns['params']!r})" if "params" in columns else ""
    notes = [
        f"{_list(paths)}: {len(runs)} records ({', '.join(k for k in kinds if k[0] != '0')}), "
        f"{len(sizes)} sizes from {short(sizes[0])} to {short(sizes[-1])}, {len(lengths)} lengths "
        f"from {short(lengths[0])} to {short(lengths[-1])} tokens",
        f"N is the number of non-embedding + output parameters{column}, D of training tokens; "
        f"{metric}",
    ]
    unknown = sum(run.annealed is None for run in runs)
    if unknown:
        notes.append(
            f"{unknown} of {len(runs)} records do not say whether the learning rate had finished "
            f"decaying (column annealed); the law is that of runs for which it had"
        )
    if unannealed:
        notes.append(
            f"{len(unannealed)} runs had not finished decaying (--allow-unannealed): their losses "
            f"are above those of their lengths"
        )
    return notes


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _list(paths: Sequence[Path]) -> str:
    return _named([str(path) for path in paths])
