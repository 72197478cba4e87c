"""The table of runs that laws are fitted to: one record per run and held-out language.

A table is a CSV file whose columns are the fields of `RunRecord`. The columns of others are read
under their own names (`columns`), and a part of a table can be chosen (`where`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import ConfigError, ErrorCollector
from megatron_chatflow.utils.files import write_atomically
from megatron_chatflow.utils.user_files import closest, read_text

KINDS = ("scratch", "continued")
MIXTURE = "share:"
"""What the columns of a mixture begin with: ``share:en`` is the share of the domain ``en``."""

_MOST_ERRORS = 10


@dataclass(frozen=True)
class RunRecord:
    """The result of a run on one held-out language.

    `params` and `tokens` are N and D of the laws.
    """

    name: str
    """Of the run, as messages name it."""
    params: int
    """Parameters: non-embedding and output layer."""
    tokens: int
    """Training tokens, of continued training those of the continuation."""
    loss: float | None
    """Held-out loss at the end, in nats per token."""
    bits_per_byte: float | None = None
    """Held-out loss at the end, in bits per UTF-8 byte."""
    kind: str = "scratch"
    """``scratch`` or ``continued``."""
    language: str = ""
    """Held-out language or set."""
    share: float | None = None
    """Share of the target language in the training tokens, 0 to 1."""
    replay: float | None = None
    """Share of the languages to keep in the training tokens, 0 to 1."""
    seed: int | None = None
    """Of the run."""
    flops: float | None = None
    """Floating-point operations of the training."""
    annealed: bool | None = None
    """Whether the learning rate had finished decaying at the end; None if unknown."""
    tokenizer: str = ""
    """Name or hash: losses per token of different tokenizers cannot be compared."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """{domain: share of the training tokens}."""


def read_table(
    path: str | Path,
    columns: Mapping[str, str] = {},
    where: Mapping[str, str] = {},
    *,
    with_losses: bool = True,
) -> list[RunRecord]:
    """Read a CSV file.

    Required are `params`, `tokens` (or `flops`, for D = C / 6N) and one of `loss` and
    `bits_per_byte`. Other columns may be missing, and cells may be empty; a run without a name is
    called by its line.

    Args:
        path: a CSV file with a header.
        columns: {field: column of the file}, for columns of other names.
        where: {column: value}: only these rows are read.
        with_losses: False for runs that were not done, which have no losses.

    Raises:
        ConfigError: the file cannot be read, or columns, rows or values are missing or wrong.
    """
    header, rows = _read_csv(path)
    source = _sources(path, header, columns, with_losses)
    rows = _chosen(path, header, rows, where)
    errors, records = ErrorCollector(), []
    for line, row in rows:
        if len(errors.messages) >= _MOST_ERRORS:
            break
        with errors.collect():
            place = f"{path}: line {line}"
            records.append(_record(place, line, row, source, with_losses))
    errors.raise_all()
    return records


def write_table(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Write a CSV file that `read_table` reads back to the same records.

    Columns that no record fills are left out.

    Raises:
        OSError: it cannot be written.
    """
    names = [f.name for f in fields(RunRecord) if f.name != "mixture"]
    used = [n for n in names if any(_text(getattr(r, n)) for r in records)]
    used = [n for n in names if n in used or n in ("name", "params", "tokens", "loss")]
    domains = list(dict.fromkeys(domain for record in records for domain in record.mixture))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*used, *(MIXTURE + domain for domain in domains)])
    for record in records:
        cells = [_text(getattr(record, name)) for name in used]
        writer.writerow([*cells, *(_text(record.mixture.get(domain)) for domain in domains)])
    write_atomically(Path(path), text.getvalue())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _read_csv(path: str | Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        text = read_text(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; give a CSV file of runs") from None
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise ConfigError(
                    f"{path}: line {reader.line_num} has {len(row)} cells and the header "
                    f"{len(header)}; correct the file"
                )
            cells = (cell.strip() for cell in row)
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ConfigError(
            f"{path}: line {reader.line_num} is not CSV ({error}); correct the file"
        ) from None
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: the column {twice!r} is there twice; rename one")
    if not rows:
        raise ConfigError(
            f"{path}: it has no runs; give a CSV file with a header and a row per run"
        )
    return header, rows


def _sources(
    path: str | Path, header: list[str], columns: Mapping[str, str], with_losses: bool
) -> dict[str, str]:
    """Return {field: column of the file} of the fields that the file has."""
    known = [f.name for f in fields(RunRecord) if f.name != "mixture"]
    errors = ErrorCollector()
    for name, column in columns.items():
        if name not in known and not name.startswith(MIXTURE):
            guess = closest(name, known)
            advice = f"did you mean {guess}?" if guess else f"the fields are {', '.join(known)}"
            errors.add(f"--columns {name}={column}: {name!r} is not a field; {advice}")
        elif column not in header:
            errors.add(
                f"--columns {name}={column}: {path} has no column {column!r}; its columns are "
                f"{_few(header)}"
            )
    errors.raise_all()
    taken = set(columns.values())
    source = {
        name: name
        for name in header
        if (name in known or name.startswith(MIXTURE)) and name not in taken
    } | dict(columns)
    missing = [] if "params" in source else ["params"]
    missing += [] if {"tokens", "flops"} & set(source) else ["tokens"]
    missing += ["loss"] if with_losses and not {"loss", "bits_per_byte"} & set(source) else []
    if missing:
        raise ConfigError(
            f"{path}: no column {' and no column '.join(missing)}; name the columns with --columns "
            f"{' '.join(f'{name}=COLUMN' for name in missing)} (it has {_few(header)})"
        )
    return source


def _chosen(
    path: str | Path,
    header: list[str],
    rows: list[tuple[int, dict[str, str]]],
    where: Mapping[str, str],
) -> list[tuple[int, dict[str, str]]]:
    for column, value in where.items():
        if column not in header:
            raise ConfigError(
                f"--where {column}={value}: {path} has no column {column!r}; its columns are "
                f"{_few(header)}"
            )
        found = [(line, row) for line, row in rows if _same(row[column], value)]
        if not found:
            values = dict.fromkeys(row[column] for _, row in rows)
            raise ConfigError(
                f"--where {column}={value}: no row of {path} has this value; it has "
                f"{_few(list(values))}"
            )
        rows = found
    return rows


def _same(cell: str, value: str) -> bool:
    if cell == value:
        return True
    try:
        return float(cell) == float(value)
    except ValueError:
        return False


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


def _record(
    where: str, line: int, row: Mapping[str, str], source: Mapping[str, str], with_losses: bool
) -> RunRecord:
    errors = ErrorCollector()
    values: dict[str, Any] = {"loss": None}
    mixture: dict[str, float] = {}
    for name, column in source.items():
        cell = row[column]
        if cell.lower() in ("", "nan", "none", "null", "na"):
            continue
        convert = _share if name.startswith(MIXTURE) else _CONVERT[name]
        try:
            value = convert(cell)
        except ValueError as error:
            errors.add(f"{where}: {column}: {cell!r} is not {error}; correct the file")
            continue
        if name.startswith(MIXTURE):
            mixture[name.removeprefix(MIXTURE)] = value
        else:
            values[name] = value
    if "tokens" not in values and {"params", "flops"} <= set(values):
        values["tokens"] = max(1, round(values["flops"] / (6 * values["params"])))
    for name in ("params", "tokens") if not errors.messages else ():
        if name not in values:
            errors.add(f"{where}: {source.get(name, name)} is empty; fill it in or remove the row")
    no_loss = values["loss"] is None and "bits_per_byte" not in values
    if with_losses and no_loss and not errors.messages:
        errors.add(f"{where}: the run has no loss; fill it in or remove the row")
    errors.raise_all()
    values.setdefault("name", f"line {line}")
    return RunRecord(**values, mixture=mixture)


def _real(accepts: Callable[[float], bool], what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(what) from None
        if not math.isfinite(value) or not accepts(value):
            raise ValueError(what)
        return value

    return convert


def _count(text: str) -> int:
    what = "a number from 1 up"
    if text.isdecimal() and int(text) > 0:
        return int(text)
    return round(_real(lambda x: x >= 1, what)(text))


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("an integer") from None


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    known = tuple(words)

    def convert(text: str) -> str:
        if text.lower() not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return text.lower()

    return convert


def _bool(text: str) -> bool:
    return _one_of(("true", "false", "1", "0", "yes", "no"))(text) in ("true", "1", "yes")


_share = _real(lambda x: 0 <= x <= 1, "a share from 0 to 1")
_positive = _real(lambda x: x > 0, "a positive number")
_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "name": str,
    "params": _count,
    "tokens": _count,
    "loss": _positive,
    "bits_per_byte": _positive,
    "kind": _one_of(KINDS),
    "language": str,
    "share": _share,
    "replay": _share,
    "seed": _integer,
    "flops": _positive,
    "annealed": _bool,
    "tokenizer": str,
}
