"""Megatron's `.bin/.idx` in numpy: writing. `index_header.py` describes the format."""

import dataclasses
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from megatron_chatflow.data.corpus.index_header import CODES, HEADER, MAGIC, VERSION
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.manifest import (
    Manifest,
    file_crc32,
    manifest_path,
    write_manifest,
)
from megatron_chatflow.data.corpus.verify import index_errors
from megatron_chatflow.errors import DataError
from megatron_chatflow.utils.files import sync_file, sync_folder

Numbers = Sequence[int] | np.ndarray
_CHUNK = 1 << 20


class IndexPart(NamedTuple):
    """The index of some documents; its arrays are read in chunks, as often as needed.

    Attributes:
        num_sequences: sequences.
        num_documents: documents.
        lengths: tokens of each sequence, int32.
        documents: the sequence after each document's last, counted within the part, int64.
        modes: mode of each sequence, int8.
    """

    num_sequences: int
    num_documents: int
    lengths: Callable[[], Iterator[np.ndarray]]
    documents: Callable[[], Iterator[np.ndarray]]
    modes: Callable[[], Iterator[np.ndarray]]


class IndexedDatasetBuilder:
    """Writes a corpus: documents in, `.bin` and `.idx` out.

    Everything is written under temporary names next to the target; `finalize` flushes it to disk
    and renames it, the `.idx` last: a corpus that has an `.idx` is complete. Leaving the `with`
    block without `finalize` removes what was written. It holds 4 bytes per sequence and 8 per
    document in memory, and nothing of corpora that are added as they are (`add_index`).

        with IndexedDatasetBuilder(prefix, best_dtype(vocab_size)) as builder:
            builder.add_document(tokens, [len(tokens)])
            builder.finalize()

    Args:
        prefix: path of the corpus without `.bin` and `.idx`; its folder must exist.
        dtype: type of a token in the file, e.g. `best_dtype(vocab_size)`.
        multimodal: whether each sequence has a mode (conversations: 1 prompt, 0 answer).

    Raises:
        DataError: the dtype is none of the format's integer types.
    """

    def __init__(
        self, prefix: str | os.PathLike, dtype: np.typing.DTypeLike, multimodal: bool = False
    ) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise DataError(
                f"dtype {self.dtype.name} cannot hold tokens in a .bin: use one of "
                f"{sorted(d.name for d in CODES)}"
            )
        self.multimodal = multimodal
        self.num_tokens = 0
        self._limits = np.iinfo(self.dtype.type)
        self._parts: list[IndexPart] = []
        self._start_part()
        self._temporary = {
            suffix: f"{self.prefix}{suffix}.{os.getpid()}.tmp" for suffix in (".bin", ".idx")
        }
        self._bin = open(self._temporary[".bin"], "wb", buffering=_CHUNK)  # noqa: SIM115 (closed by finalize or abort)

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return sum(part.num_documents for part in self._parts) + len(self._documents) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return sum(part.num_sequences for part in self._parts) + len(self._lengths)

    def add_document(self, tokens: Numbers, lengths: Numbers, modes: Numbers | None = None) -> None:
        """Add a document.

        Args:
            tokens: the tokens of all its sequences [n]; may be empty.
            lengths: tokens of each sequence; they add up to n. An empty list is a document without
                sequences.
            modes: mode of each sequence; only in a multimodal corpus, where it defaults to 0.

        Raises:
            DataError: a token does not fit the dtype, the lengths do not add up, or the modes do
                not match them.
        """
        tokens = np.asarray(tokens)
        self._check_tokens(tokens)
        if sum(lengths) != tokens.size or (len(lengths) and min(lengths) < 0):
            raise DataError(
                f"{self.prefix}: the sequence lengths add up to {sum(lengths)}, the "
                f"document has {tokens.size} tokens"
            )
        self._check_modes(modes, len(lengths))
        self._bin.write(tokens.astype(self.dtype.newbyteorder("<"), copy=False).tobytes())
        self.num_tokens += int(tokens.size)
        self._lengths.extend(int(n) for n in lengths)
        self._documents.append(len(self._lengths))
        if self.multimodal:
            self._modes.extend([0] * len(lengths) if modes is None else (int(m) for m in modes))

    def add_documents(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sequences: np.ndarray,
        modes: np.ndarray | None = None,
    ) -> None:
        """Add many documents at once: one by one costs more than short texts take to encode.

        Args:
            tokens: the tokens of all documents, one after the other, integers [n].
            lengths: tokens of each sequence, integers [sequences]; they add up to n.
            sequences: sequences of each document, integers [documents]; they add up to the number
                of lengths.
            modes: mode of each sequence, integers [sequences]; only in a multimodal corpus, where
                it defaults to 0.

        Raises:
            DataError: as `add_document`.
        """
        tokens = np.asarray(tokens)
        self._check_tokens(tokens)
        lengths, sequences = (np.asarray(numbers, np.int64) for numbers in (lengths, sequences))
        for what, numbers, total in (
            ("sequence lengths", lengths, tokens.size),
            ("documents' numbers of sequences", sequences, lengths.size),
        ):
            if numbers.sum() != total or (numbers.size and numbers.min() < 0):
                raise DataError(
                    f"{self.prefix}: the {what} add up to {numbers.sum()}, where there are {total}"
                )
        self._check_modes(modes, lengths.size)
        self._bin.write(np.ascontiguousarray(tokens, self.dtype.newbyteorder("<")).data)
        self.num_tokens += tokens.size
        self._documents.frombytes((np.cumsum(sequences) + len(self._lengths)).tobytes())
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        if self.multimodal:
            self._modes.frombytes(
                np.asarray(np.zeros(lengths.size) if modes is None else modes)
                .astype(np.int8)
                .tobytes()
            )

    def add_index(self, prefix: str | os.PathLike) -> None:
        """Add all documents of another corpus, which must not change until `finalize`.

        Memory does not depend on its size.

        Raises:
            DataError: it has another dtype, only one of the two has modes, or its index is damaged
                or not in the order of its `.bin`.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise DataError(
                f"{self.prefix}: {other.prefix} has tokens of {other.dtype.name}, not "
                f"{self.dtype.name}: preprocess it again alike"
            )
        if other.num_sequences and other.header.multimodal != self.multimodal:
            has = "lacks" if self.multimodal else "has"
            raise DataError(
                f"{self.prefix}: {other.prefix} {has} sequence modes: conversations and "
                f"text cannot be merged"
            )
        for problem in index_errors(other):
            raise DataError(
                f"{self.prefix}: corpus {other.prefix}: {problem}: preprocess it again, or "
                f"add it document by document"
            )
        self._bin.flush()
        start = self._bin.tell()
        with open(other.prefix + ".bin", "rb") as file:
            shutil.copyfileobj(file, self._bin, _CHUNK)
        if self._bin.tell() - start != other.num_tokens * self.dtype.itemsize:
            raise DataError(
                f"{self.prefix}: {other.prefix}.bin changed while it was copied: wait until "
                f"it is written, then merge again"
            )
        self.num_tokens += other.num_tokens
        self._parts += [self._own_part(), _stored_part(other)]
        self._start_part()

    def finalize(self, manifest: Manifest | None = None) -> None:
        """Write the index and rename the files to their final names, `.idx` last.

        Files of an older corpus of this name are removed first.

        Args:
            manifest: written as `<prefix>.json`, with the checksums of the two files, before the
                `.idx` appears.
        """
        sync_file(self._bin)
        self._bin.close()
        with open(self._temporary[".idx"], "wb") as file:
            write_index(file, self.dtype, self.multimodal, [*self._parts, self._own_part()])
            sync_file(file)
        if manifest is not None:
            manifest = dataclasses.replace(
                manifest,
                crc32={suffix[1:]: file_crc32(path) for suffix, path in self._temporary.items()},
            )
        for stale in (self.prefix + ".idx", manifest_path(self.prefix)):
            if os.path.exists(stale):
                os.unlink(stale)
        os.replace(self._temporary[".bin"], self.prefix + ".bin")
        if manifest is not None:
            write_manifest(self.prefix, manifest)
        os.replace(self._temporary[".idx"], self.prefix + ".idx")
        sync_folder(os.path.dirname(self.prefix) or ".")

    def abort(self) -> None:
        """Close and remove the temporary files; nothing is left to remove after `finalize`."""
        self._bin.close()
        for path in self._temporary.values():
            if os.path.exists(path):
                os.unlink(path)

    def _check_tokens(self, tokens: np.ndarray) -> None:
        if not tokens.size:
            return
        if tokens.dtype.kind not in "iu":
            raise DataError(
                f"{self.prefix}: tokens are {tokens.dtype.name}, whole numbers are expected"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < self._limits.min or high > self._limits.max:
            raise DataError(
                f"{self.prefix}: token {high if high > self._limits.max else low} does not "
                f"fit {self.dtype.name}: "
                "build with best_dtype(vocab_size) of the tokenizer that was used"
            )

    def _check_modes(self, modes: Numbers | None, num_sequences: int) -> None:
        if modes is not None and (not self.multimodal or len(modes) != num_sequences):
            raise DataError(
                f"{self.prefix}: {len(modes)} modes for {num_sequences} sequences (a corpus "
                f"with modes is built with multimodal=True)"
            )

    def _start_part(self) -> None:
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._modes = array("b")

    def _own_part(self) -> IndexPart:
        lengths, documents, modes = self._lengths, self._documents, self._modes
        return IndexPart(
            len(lengths),
            len(documents) - 1,
            lambda: _chunks(np.frombuffer(lengths, np.int32)),
            lambda: _chunks(np.frombuffer(documents, np.int64)[1:]),
            lambda: _chunks(np.frombuffer(modes, np.int8)),
        )


def write_index(
    file: BinaryIO, dtype: np.dtype, multimodal: bool, parts: Sequence[IndexPart]
) -> None:
    """Write an `.idx` for parts whose tokens follow one another in the `.bin`, chunk by chunk."""
    # Header, then lengths int32 [S], pointers int64 [S] (running sums of the lengths in bytes),
    # documents int64 [D] (0, then the end of each document), modes int8 [S].
    num_sequences = sum(part.num_sequences for part in parts)
    num_documents = sum(part.num_documents for part in parts)
    file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], num_sequences, num_documents + 1))
    for part in parts:
        for lengths in part.lengths():
            file.write(lengths.astype("<i4", copy=False).data)
    start = 0
    for part in parts:
        for lengths in part.lengths():
            ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + start
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").data)
            start = int(ends[-1])
    file.write(np.zeros(1, "<i8").data)
    first = 0
    for part in parts:
        for ends in part.documents():
            file.write((ends + first).astype("<i8").data)
        first += part.num_sequences
    if multimodal:
        for part in parts:
            for modes in part.modes():
                file.write(modes.data)


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    return (numbers[at : at + _CHUNK] for at in range(0, len(numbers), _CHUNK))


def _stored_part(dataset: IndexedDataset) -> IndexPart:
    """Return the index of a corpus, read from its file as often as needed, and never held."""

    def read(name: str, start: int, stop: int) -> Iterator[np.ndarray]:
        return (
            dataset.read_array(name, at, min(at + _CHUNK, stop))
            for at in range(start, stop, _CHUNK)
        )

    return IndexPart(
        dataset.num_sequences,
        dataset.num_documents,
        lambda: read("sequence_lengths", 0, dataset.num_sequences),
        lambda: read("document_indices", 1, dataset.num_documents + 1),
        lambda: read("sequence_modes", 0, dataset.num_sequences),
    )
