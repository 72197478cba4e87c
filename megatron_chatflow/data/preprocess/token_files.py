"""A corpus while it is written: files that only grow, so that a killed run can be resumed.

It continues from where they were last flushed to disk.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from megatron_chatflow.data.corpus.writer import IndexPart, write_index
from megatron_chatflow.data.preprocess.encoder import EncodedDocuments
from megatron_chatflow.utils.files import sync_file

_CHUNK = 1 << 20


@dataclass
class CorpusCounts:
    """The size of the corpus that token files hold.

    Attributes:
        documents: number of documents.
        sequences: number of sequences.
        tokens: number of tokens.
        bytes: UTF-8 bytes of the text.
        crc32: of the tokens as stored.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0
    crc32: int = 0


class TokenFiles:
    """The files `<path>.bin`, `.lengths`, `.modes` and `.sequences` of a corpus.

    They hold the tokens, length and mode of each sequence, and the sequences of each document.

    Args:
        path: of the files, without their endings.
        dtype: type of a token.
        conversations: whether sequences have modes.
        counts: what to keep of files that exist; anything after it is cut off.
    """

    def __init__(
        self,
        path: str,
        dtype: np.typing.DTypeLike,
        conversations: bool,
        counts: CorpusCounts | None = None,
    ) -> None:
        self.path = path
        self.counts = counts or CorpusCounts()
        self.conversations = conversations
        self.dtypes = {
            "bin": np.dtype(dtype).newbyteorder("<"),
            "lengths": np.dtype("<i4"),
            "sequences": np.dtype("<i4"),
            **({"modes": np.dtype("i1")} if conversations else {}),
        }
        self._files = {name: self._open(name) for name in self.dtypes}

    def __enter__(self) -> "TokenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, corpus: EncodedDocuments) -> None:
        """Add documents."""
        for name, values in (
            ("bin", corpus.tokens),
            ("lengths", corpus.lengths),
            ("sequences", corpus.sequences),
            ("modes", corpus.modes),
        ):
            if name in self._files:
                self._files[name].write(values.astype(self.dtypes[name], copy=False).data)
        self.counts.documents += len(corpus.sequences)
        self.counts.sequences += len(corpus.lengths)
        self.counts.tokens += len(corpus.tokens)
        self.counts.bytes += corpus.bytes
        self.counts.crc32 = zlib.crc32(
            corpus.tokens.astype(self.dtypes["bin"], copy=False).data, self.counts.crc32
        )

    def sync(self) -> None:
        """Flush everything to disk."""
        for file in self._files.values():
            sync_file(file)

    def numbers(self, name: str) -> int:
        """Return how many numbers the file of that name holds."""
        return {
            "bin": self.counts.tokens,
            "lengths": self.counts.sequences,
            "modes": self.counts.sequences,
            "sequences": self.counts.documents,
        }[name]

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Return `count` numbers of a file from number `start` on.

        What was appended must have been flushed.
        """
        dtype = self.dtypes[name]
        return np.fromfile(self._name(name), dtype, count, offset=start * dtype.itemsize)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Yield all numbers of a file, chunk by chunk."""
        total = self.numbers(name)
        return (self.read(name, at, min(_CHUNK, total - at)) for at in range(0, total, _CHUNK))

    def write_index(self, path: str) -> None:
        """Write the `.idx` and flush it to disk."""
        part = IndexPart(
            self.counts.sequences,
            self.counts.documents,
            lambda: self.chunks("lengths"),
            lambda: _running(self.chunks("sequences")),
            lambda: self.chunks("modes"),
        )
        with open(path, "wb") as file:
            write_index(file, self.dtypes["bin"].newbyteorder("="), self.conversations, [part])
            sync_file(file)

    def _name(self, name: str) -> str:
        return f"{self.path}.{name}"

    def _open(self, name: str) -> BinaryIO:
        file = open(self._name(name), "ab", buffering=_CHUNK)  # noqa: SIM115 (closed at the end of the with block)
        file.truncate(self.numbers(name) * self.dtypes[name].itemsize)
        return file


def _running(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the running sums of numbers that come in chunks."""
    total = 0
    for chunk in chunks:
        sums = np.cumsum(chunk, dtype=np.int64) + total
        total = int(sums[-1])
        yield sums
