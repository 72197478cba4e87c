"""Parquet files: rows in batches, in Arrow's stream format on the way to the encoding process."""

import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from megatron_chatflow.errors import DataError

_MOST_ROWS = 1024
_MOST_NESTED_ROWS = 64
"""Rows that are read at once; a nested column is not read as a dictionary."""


def check(path: str) -> None:
    """Check that a file is parquet, and that it can be read here.

    Raises:
        DataError: it is not, or the library is missing.
    """
    _open(path)


def batches(
    path: str, size: int, columns: Sequence[str] | None, limit: int
) -> Iterator[tuple[int, bytes | None, float]]:
    """Read a file from its first row to its last, never more than a batch at a time.

    A table can be a thousand times as large as its file: a text that is repeated is stored once. So
    texts remain numbers in a dictionary until they are cut into batches.

    Args:
        path: the file.
        size: bytes of a batch, about.
        columns: those that are read; None for all.
        limit: bytes of the longest row.

    Yields:
        Number of rows, the rows (`records` decodes them), share of the file's rows that were given
        so far. A row that is longer than the limit comes alone, as None.

    Raises:
        DataError: a column is missing, or the file is damaged.
    """
    file = _open(path)
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            raise DataError(f"--input {path} has no column {column!r}: it has {', '.join(names)}")
    arrow = _import(path)[0]
    read = [field for field in file.schema_arrow if columns is None or field.name in columns]
    texts = [field.name for field in read if _is_text(arrow, field.type)]
    most = (
        _MOST_ROWS
        if all(field.name in texts or not arrow.types.is_nested(field.type) for field in read)
        else _MOST_NESTED_ROWS
    )
    file = _open(path, texts)
    done = 0
    try:
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = min(most, max(1, about.num_rows * size // max(1, about.total_byte_size)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                at = 0
                for count, too_long in _cuts(_row_sizes(arrow, batch), size, limit):
                    data = None if too_long else _packed(arrow, batch.slice(at, count))
                    at += count
                    done += count
                    yield count, data, done / file.metadata.num_rows
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{os.path.basename(path)} cannot be read to its end ({_reason(error)}): the "
            f"file is damaged or was cut off"
        ) from error


def _cuts(sizes: list[int], size: int, limit: int) -> Iterator[tuple[int, bool]]:
    """Yield how many rows make about `size` bytes, and whether it is one row beyond the limit."""
    count = total = 0
    for row in sizes:
        if count and (row > limit or total + row > size):
            yield count, False
            count = total = 0
        if row > limit:
            yield 1, True
        else:
            count, total = count + 1, total + row
    if count:
        yield count, False


def _row_sizes(arrow: ModuleType, batch: Any) -> list[int]:
    """Return the bytes of texts and nested values in each row."""
    total = [0] * batch.num_rows
    for column in batch.columns:
        if arrow.types.is_dictionary(column.type) and _is_text(arrow, column.type.value_type):
            lengths = (
                arrow.compute.binary_length(column.dictionary).take(column.indices).to_pylist()
            )
        elif arrow.types.is_nested(column.type):
            lengths = [column.slice(row, 1).nbytes for row in range(len(column))]
        else:
            continue
        total = [known + (length or 0) for known, length in zip(total, lengths, strict=True)]
    return total


def _is_text(arrow: ModuleType, type: Any) -> bool:
    kinds = (
        arrow.types.is_string,
        arrow.types.is_large_string,
        arrow.types.is_binary,
        arrow.types.is_large_binary,
    )
    return any(kind(type) for kind in kinds)


def records(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a batch.

    Raises:
        UnicodeDecodeError: a text is not UTF-8.
    """
    return _table(data).to_pylist()


def rows(data: bytes) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Yield the rows of a batch one by one, and the error for a row with text that is not UTF-8."""
    table = _table(data)
    for number in range(table.num_rows):
        try:
            yield table.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


def _packed(arrow: ModuleType, batch: Any) -> bytes:
    columns = [
        column.dictionary_decode() if arrow.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    batch = arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _table(data: bytes) -> Any:
    return _import("a table")[0].ipc.open_stream(data).read_all()


def _import(path: str) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"--input {path} is parquet: pip install pyarrow, or write its text column as "
            f"JSON lines"
        ) from error
    return pyarrow, pyarrow.parquet


def _open(path: str, dictionaries: Sequence[str] = ()) -> Any:
    arrow, parquet = _import(path)
    try:
        return parquet.ParquetFile(
            path, read_dictionary=list(dictionaries), pre_buffer=False, buffer_size=1 << 20
        )
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"--input {path} is not a parquet file ({_reason(error)}): check the path, or "
            f"give --input-format"
        ) from error


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0]
