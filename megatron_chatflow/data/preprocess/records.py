"""Chunks of input to records: all at once where every record is valid, else one by one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_chatflow.data.chat.templates import MalformedRecord, json_kind, text_field
from megatron_chatflow.data.preprocess import parquet
from megatron_chatflow.data.preprocess.input_files import Chunk, open_sources
from megatron_chatflow.errors import DataError

_decode = json.JSONDecoder().raw_decode
_TEXT_CHUNK = 1 << 22


def all_records(data: bytes | bytearray, format: str) -> list[Mapping[str, Any]]:
    """Return the records of a chunk, several times as fast as `each_record`.

    It handles only chunks in which nothing is wrong or unusual.

    Raises:
        DataError, ValueError, RecursionError: a record needs a closer look.
    """
    if format == "parquet":
        return [*parquet.records(bytes(data))]
    text = data.decode()
    if "\r" in text:
        text = text.replace("\r\n", "\n").removesuffix("\r")
    lines = list(filter(None, text.split("\n")))
    del text  # a chunk of one long record need not be held twice
    if format == "text":
        return [{"text": line} for line in lines if not line.isspace()]
    pairs = list(map(_decode, lines))
    if [end for _, end in pairs] != list(map(len, lines)):
        raise DataError("a line continues after its record")
    return [record for record, _ in pairs]


def each_record(chunk: Chunk) -> Iterator[tuple[int, Mapping[str, Any] | MalformedRecord]]:
    """Yield the records of a chunk with their numbers, or what is wrong with them.

    Blank lines are not records.
    """
    if chunk.too_long:
        yield chunk.first, MalformedRecord(chunk.too_long)
        return
    if chunk.format == "parquet":
        for number, row in enumerate(parquet.rows(bytes(chunk.data)), chunk.first):
            yield (
                number,
                MalformedRecord(f"not UTF-8 ({row.reason})")
                if isinstance(row, UnicodeDecodeError)
                else row,
            )
        return
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if line.strip():
            try:
                yield number, _record(line, chunk.format)
            except MalformedRecord as error:
                yield number, error


def _record(line: bytes | bytearray, format: str) -> Mapping[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise MalformedRecord(
            f"not UTF-8 (byte {error.start} is 0x{line[error.start]:02x})"
        ) from error
    if format == "text":
        return {"text": text.removesuffix("\r")}
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise MalformedRecord("JSON nested too deeply") from error
    except ValueError as error:
        cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        fix = ": it continues on the next line; write each record on one line, or one JSON array"
        raise MalformedRecord(f"not JSON ({error}){fix if cut else ''}") from error
    if not isinstance(record, dict):
        raise MalformedRecord(f"JSON, but {json_kind(record)} and not an object")
    return record


def read_texts(paths: Sequence[str], keys: Sequence[str] = ("text",)) -> Iterator[str]:
    """Yield the documents of text files; those without a letter or mark are left out.

    Args:
        paths: JSON lines, parquet or plain text, compressed or not, as `preprocess` takes them;
            patterns too.
        keys: of a record; the text under each is a document.

    Raises:
        DataError: a file cannot be read, or a record holds no text; it names file and line.
    """
    for source in open_sources(paths):
        fields = ("text",) if source.format == "text" else keys
        for chunk in source.chunks(_TEXT_CHUNK, list(fields)):
            for number, record in each_record(chunk):
                try:
                    if isinstance(record, MalformedRecord):
                        raise record
                    texts = [text_field(record, key) for key in fields]
                except MalformedRecord as error:
                    raise DataError(
                        f"{source.path}, {source.record} {number}: {error}; fix it or take it out"
                    ) from None
                yield from (text for text in texts if not text.isspace() and text)
