"""Parquet files: rows in batches, packed as Arrow's stream format on the way to the process that encodes them."""

import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any


def check(path: str) -> None:
    """Looks whether a file is parquet, and whether it can be read here.

    Raises:
        ValueError: it is not, or the library is missing.
    """
    _open(path)


def batches(path: str, size: int, columns: Sequence[str] | None) -> Iterator[tuple[int, bytes, float]]:
    """Reads a file from its first row to its last, never more than a batch at a time.

    Args:
        path: the file.
        size: bytes of a batch, about; rows are as long as the average of their row group.
        columns: those that are read; None for all.

    Yields:
        Number of rows, the rows (`records` unpacks them), share of the file's rows that were given so far.

    Raises:
        ValueError: a column is missing, or the file is damaged.
    """
    file = _open(path)
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise ValueError(f"--input {path} has no column {column!r}: it has {', '.join(names)}")
    arrow = _import(path)[0]
    done = 0
    try:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = max(1, about.num_rows * size // max(1, about.total_byte_size))
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                done += batch.num_rows
                yield batch.num_rows, _packed(arrow, batch), done / file.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{os.path.basename(path)} cannot be read to its end ({_reason(error)}): the file is damaged or was cut off") from error


def records(data: bytes) -> list[dict[str, Any]]:
    """Returns the rows of a batch.

    Raises:
        UnicodeDecodeError: a text is not UTF-8.
    """
    return _table(data).to_pylist()


def rows(data: bytes) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Gives the rows of a batch one by one, and the error in place of one with a text that is not UTF-8."""
    table = _table(data)
    for number in range(table.num_rows):
        try:
            yield table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


def _packed(arrow: ModuleType, batch: Any) -> bytes:
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _table(data: bytes) -> Any:
    return _import("a table")[0].ipc.open_stream(data).read_all()


def _import(path: str) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"--input {path} is parquet: pip install pyarrow, or write its text column as JSON lines") from error
    return pyarrow, pyarrow.parquet


def _open(path: str) -> Any:
    arrow, parquet = _import(path)
    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"--input {path} is not a parquet file ({_reason(error)}): check the path, or give --input-format") from error


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0]
