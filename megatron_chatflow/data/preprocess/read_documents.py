"""The documents of text files, as plain text."""

from collections.abc import Iterator, Sequence

from megatron_chatflow.data.chat.templates import MalformedRecord, text_field
from megatron_chatflow.data.preprocess.input_files import open_sources
from megatron_chatflow.data.preprocess.records import each_record
from megatron_chatflow.errors import DataError

_CHUNK = 1 << 22


def read_texts(paths: Sequence[str], keys: Sequence[str] = ("text",)) -> Iterator[str]:
    """Gives the documents of files, those without a letter or mark left out.

    Args:
        paths: JSON lines, parquet or plain text, packed or not, as `preprocess` takes them;
        patterns too. keys: of a record; the text under each is a document.

    Raises:
        ValueError: a file cannot be read, or a record holds no text; it names file and line.
    """
    for source in open_sources(paths):
        fields = ("text",) if source.format == "text" else keys
        for chunk in source.chunks(_CHUNK, list(fields)):
            for number, record in each_record(chunk):
                try:
                    if isinstance(record, MalformedRecord):
                        raise record
                    texts = [text_field(record, key) for key in fields]
                except MalformedRecord as error:
                    raise DataError(
                        f"{source.path}, {source.record} {number}: {error}; mend it or take it out"
                    ) from None
                yield from (text for text in texts if not text.isspace() and text)
