"""Megatron's `.bin/.idx` in numpy: reading. `index_header.py` describes the format."""

import hashlib
import os
import struct
from functools import cached_property
from typing import BinaryIO, NoReturn

import numpy as np

from megatron_chatflow.data.corpus.index_header import VERSION, read_at, read_header
from megatron_chatflow.data.corpus.mmap import map_file
from megatron_chatflow.errors import DataError

_SAMPLES = 16
_SAMPLE_TOKENS = 64


class IndexedDataset:
    """A corpus in Megatron's format.

    Opening reads the header only; the arrays below are memory maps, made at the first use, and hold
    no open file. Reading is thread-safe, and a pickled dataset is its path.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.

    Raises:
        DataError: as `read_header`.
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        self.prefix = os.fspath(prefix)
        self.header = read_header(self.prefix)

    def __repr__(self) -> str:
        h = self.header
        return (
            f"IndexedDataset({self.prefix!r}: {h.num_documents} documents, {h.num_sequences} "
            f"sequences, {h.num_tokens} tokens of {h.dtype.name})"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.prefix,)

    def __len__(self) -> int:
        return self.header.num_sequences

    @property
    def dtype(self) -> np.dtype:
        """Type of a token."""
        return self.header.dtype

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return self.header.num_sequences

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.header.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the `.bin`."""
        return self.header.num_tokens

    @cached_property
    def _index(self) -> np.ndarray:
        return map_file(self.prefix + ".idx")

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens in the order of the `.bin`, dtype [num_tokens]."""
        return map_file(self.prefix + ".bin").view(self.dtype.newbyteorder("<"))

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [num_sequences]."""
        begin, end, *_ = self.header.offsets()
        return _view(self._index, begin, end, "<i4")

    @cached_property
    def sequence_pointers(self) -> np.ndarray:
        """First byte of each sequence in the `.bin`, int64 [num_sequences]."""
        _, begin, end, *_ = self.header.offsets()
        return _view(self._index, begin, end, "<i8")

    @cached_property
    def document_indices(self) -> np.ndarray:
        """First sequence of each document, then the number of sequences, int64 [documents + 1]."""
        _, _, begin, end, _ = self.header.offsets()
        return _view(self._index, begin, end, "<i8")

    @cached_property
    def sequence_modes(self) -> np.ndarray | None:
        """Mode of each sequence (1 prompt, 0 answer), int8 [num_sequences]; None without modes."""
        *_, begin, end = self.header.offsets()
        return self._index[begin:end].view(np.int8) if self.header.multimodal else None

    def read_array(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read a part of one of the four arrays of the index from the file.

        What passes over an entire corpus uses this: pages of a map would stay in the memory of the
        process.

        Args:
            name: `sequence_lengths`, `sequence_pointers`, `document_indices` or `sequence_modes`.
            start: first entry.
            stop: the entry after the last one.
        """
        number = (
            "sequence_lengths",
            "sequence_pointers",
            "document_indices",
            "sequence_modes",
        ).index(name)
        dtype = np.dtype(("<i4", "<i8", "<i8", "i1")[number])
        offset = self.header.offsets()[number] + start * dtype.itemsize
        return np.fromfile(self.prefix + ".idx", dtype, stop - start, offset=offset)

    def sequence(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of a sequence from `offset` on, as a view, dtype [length].

        By default all tokens to the end of the sequence.

        Raises:
            IndexError: there is no such sequence, or it has no such tokens.
            DataError: the index is damaged there.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        size = int(self.sequence_lengths[index])
        stop = size if length is None else offset + length
        start, extra = divmod(int(self.sequence_pointers[index]), self.dtype.itemsize)
        following = (
            int(self.sequence_pointers[index + 1])
            if index + 1 < self.num_sequences
            else self.num_tokens * self.dtype.itemsize
        )
        in_order = not self.header.contiguous or following == (start + size) * self.dtype.itemsize
        if extra or not (0 <= start <= start + size <= self.num_tokens and in_order):
            self._damaged(f"sequence {index}")
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset} to {stop} of a sequence of {size}")
        return self.tokens[start + offset : start + stop]

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of a document, all its sequences one after the other, dtype [tokens].

        Raises as `sequence`.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        begin, end = (int(i) for i in self.document_indices[index : index + 2])
        if not 0 <= begin <= end <= self.num_sequences:
            self._damaged(f"document {index}")
        return np.concatenate(
            [np.empty(0, self.dtype)] + [self.sequence(i) for i in range(begin, end)]
        )

    def token_range(self, begin: int, end: int) -> tuple[int, int]:
        """Return the positions in `tokens` at which the documents `begin` and `end` start.

        `num_documents` is the end of the `.bin`. Reads a dozen numbers from the file and
        maps nothing, so that a thousand corpora can be opened in little memory. Correct for a
        contiguous corpus.

        Raises:
            DataError: the index is damaged at one of the two.
        """
        with open(self.prefix + ".idx", "rb", buffering=0) as file:
            first, last = (self._start(file, document) for document in (begin, end))
        if first > last:
            self._damaged(f"document {begin} or {end}")
        return first, last

    def _start(self, file: BinaryIO, document: int) -> int:
        """Return where a document starts in `tokens`, after comparing neighbors in the index."""
        if document in (0, self.num_documents):
            return self.num_tokens if document else 0
        lengths, pointers, documents, *_ = self.header.offsets()
        before, sequence, after = struct.unpack(
            "<3q", read_at(file, documents + 8 * (document - 1), 24)
        )
        if not 0 <= before <= sequence <= after <= self.num_sequences:
            self._damaged(f"document {document}")
        if sequence in (0, self.num_sequences):
            return self.num_tokens if sequence else 0
        previous, pointer = struct.unpack("<2q", read_at(file, pointers + 8 * (sequence - 1), 16))
        (length,) = struct.unpack("<i", read_at(file, lengths + 4 * (sequence - 1), 4))
        if (
            length < 0
            or previous + length * self.dtype.itemsize != pointer
            or not 0 <= pointer <= self.num_tokens * self.dtype.itemsize
        ):
            self._damaged(f"sequence {sequence}")
        return pointer // self.dtype.itemsize

    def _damaged(self, where: str) -> NoReturn:
        raise DataError(
            f"corpus {self.prefix}: {self.prefix}.idx is damaged at {where}: see what "
            f"tools/verify_dataset.py reports"
        )

    def document_starts(self, documents: np.ndarray) -> np.ndarray:
        """Return the position in `tokens` of the first token of each document, int64 [n].

        For an empty document it is where the token would be.

        Raises:
            DataError: the index is damaged at one of them.
        """
        sequences = self.document_indices[documents]
        wrong = (sequences < 0) | (sequences > self.num_sequences)
        if wrong.any():
            self._damaged(f"document {documents[np.argmax(wrong)]}")
        inside = sequences < self.num_sequences
        pointers = self.sequence_pointers[np.minimum(sequences, self.num_sequences - 1)]
        return np.where(inside, pointers // self.dtype.itemsize, self.num_tokens)

    def documents_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the document that each position of `tokens` belongs to, int64 [n], by bisection.

        Correct for a contiguous corpus.
        """
        sequences = _bisect(
            self.sequence_pointers, np.asarray(positions, np.int64) * self.dtype.itemsize
        )
        return _bisect(self.document_indices, sequences)

    def fingerprint(self) -> str:
        """Return a hash of header, file sizes, and a fixed number of samples of the content.

        The samples are of lengths, documents, modes and tokens. Path and dates are not part of it,
        so a copy has the same fingerprint. Takes constant time: a change that keeps all sizes and
        touches none of the samples is not found (`verify` and the manifest's checksums find it).
        """
        h = self.header
        digest = hashlib.sha256(
            repr(
                (
                    VERSION,
                    h.dtype.name,
                    h.num_sequences,
                    h.num_documents,
                    h.num_tokens,
                    h.multimodal,
                )
            ).encode()
        )
        for array, width in (
            (self.sequence_lengths, 1),
            (self.document_indices, 1),
            (self.sequence_modes, 1),
            (self.tokens, _SAMPLE_TOKENS),
        ):
            if array is not None:
                for start in sorted(
                    {(len(array) - width) * i // (_SAMPLES - 1) for i in range(_SAMPLES)}
                ):
                    digest.update(array[max(start, 0) : max(start, 0) + width].tobytes())
        return digest.hexdigest()


def _view(index: np.ndarray, begin: int, end: int, dtype: str) -> np.ndarray:
    """Return a part of the mapped index as numbers.

    They are not aligned, so `numpy.searchsorted` would copy them all.
    """
    return index[begin:end].view(dtype)


def _bisect(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each value the last i with ascending[i] <= value.

    The first entry must not exceed any value.
    """
    low = np.zeros(len(values), np.int64)
    high = np.full(len(values), len(ascending), np.int64)
    for _ in range(len(ascending).bit_length()):
        middle = (low + high) >> 1
        right = ascending[middle] <= values
        low = np.where(right, middle, low)
        high = np.where(right, high, middle)
    return low
