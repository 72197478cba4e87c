"""Where `chatflow propose` has its laws from: tables, run directories, published files, JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from megatron_chatflow.cli.run_command import note
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.laws.loss_models import (
    LossModels,
    fit_mixtures,
    fit_records,
    read_models,
)
from megatron_chatflow.planner.laws.mixture_table import read_published
from megatron_chatflow.planner.laws.run_records import records_of_run
from megatron_chatflow.planner.laws.run_table import RunRecord, read_table


def laws_of(args: argparse.Namespace, weights: Mapping[str, float]) -> LossModels:
    """Return the laws of the command line, fitted for the languages with a weight; else for all.

    Raises:
        ConfigError: the source cannot be read, or does not determine the laws.
    """
    if args.mixture:
        table = read_published(args.mixture, args.losses)
        return fit_mixtures(table, _languages(list(table.losses), weights), note)
    if any(path.suffix == ".json" for path in args.tables):
        if len(args.tables) > 1:
            raise ConfigError("laws as JSON are complete; give one file")
        return read_models(args.tables[0])
    columns, where = _pairs("columns", args.columns), _pairs("where", args.where)
    records: list[RunRecord] = []
    for path in args.tables:
        records += records_of_run(path) if path.is_dir() else read_table(path, columns, where)
    unfinished = [record.name for record in records if record.annealed is False]
    if unfinished and not args.allow_unannealed:
        raise ConfigError(
            f"run {unfinished[0]}: its learning rate had not finished decaying, so its loss is not "
            f"that of a run of this length; leave it out, or give --allow-unannealed"
        )
    languages = list(dict.fromkeys(record.language for record in records))
    source = ", ".join(map(str, args.tables))
    return fit_records(source, records, _languages(languages, weights), args.form, note)


def _languages(known: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise ConfigError(
            f"--weights: no run measured {unknown[0]!r}; the languages are {', '.join(known)}"
        )
    return [name for name in known if weights.get(name, 0 if weights else 1) > 0]


def _pairs(key: str, words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ConfigError(f"--{key}: {word!r} is not NAME=VALUE; write e.g. params=n_params")
        found[name] = value
    return found
