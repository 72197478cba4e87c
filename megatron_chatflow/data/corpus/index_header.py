r"""The header of Megatron's `.idx`, in the format of `megatron.core.datasets.indexed_dataset`.

    .bin   the tokens, sequence after sequence, no header
    .idx   offset  type            what
           0       9 bytes         b"MMIDIDX\0\0"
           9       uint64          version, 1
           17      uint8           token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16
           18      uint64          S, the number of sequences
           26      uint64          D, the number of documents + 1
           34      int32  [S]      tokens of each sequence
                   int64  [S]      where each sequence starts in the .bin, in bytes
                   int64  [D]      the sequence each document starts with; the last entry is S
                   int8   [S]      mode of each sequence; only in a longer file ("multimodal")

All numbers are little endian.
"""

import bisect
import dataclasses
import os
import struct
from typing import BinaryIO

import numpy as np

from megatron_chatflow.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def best_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the token type for a vocabulary, by Megatron's rule (`DType.optimal_dtype`)."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclasses.dataclass(frozen=True)
class Header:
    """The fixed part of an `.idx`, and what follows from it and the two file sizes.

    Attributes:
        dtype: type of a token.
        num_sequences: S.
        num_documents: documents (D - 1).
        num_tokens: tokens in the `.bin`.
        multimodal: whether the file has sequence modes.
        contiguous: whether the first sequence starts the `.bin`, and the last one and the last that
            is not empty end it. Every writer of Megatron makes such files, and no more can be known
            without reading all pointers (`verify` reads them).
    """

    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    multimodal: bool
    contiguous: bool

    def offsets(self) -> tuple[int, int, int, int, int]:
        """Return the byte offsets of lengths, pointers, documents and modes, and the file's end."""
        pointers = HEADER.size + 4 * self.num_sequences
        documents = pointers + 8 * self.num_sequences
        modes = documents + 8 * (self.num_documents + 1)
        return HEADER.size, pointers, documents, modes, modes + self.num_sequences * self.multimodal


def read_header(prefix: str | os.PathLike) -> Header:
    """Read and check the header of a corpus.

    It opens one file at a time and makes six small reads (a few more where the last sequence is
    empty).

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.

    Raises:
        DataError: a file is missing, of another format, truncated, or the two do not belong
            together.
    """
    prefix = os.fspath(prefix)
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            ending = prefix.endswith((".bin", ".idx"))
            fix = (
                f"write {prefix[:-4]}, without the ending"
                if ending
                else "make it with tools/preprocess_data.py or correct the path"
            )
            raise DataError(f"corpus {prefix}: {prefix + suffix} does not exist: {fix}")
    try:
        bin_size = os.stat(prefix + ".bin").st_size
        file = open(prefix + ".idx", "rb", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DataError(
            f"corpus {prefix}: {error.filename} cannot be read ({error.strerror}): check its "
            f"permissions"
        ) from None
    with file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(HEADER.size)
        if len(raw) < HEADER.size or raw[:9] != MAGIC:
            raise DataError(
                f"corpus {prefix}: {prefix}.idx is not a Megatron index (it does not start "
                f"with {MAGIC!r}): preprocess the corpus again"
            )
        _, version, code, sequences, documents = HEADER.unpack(raw)
        if version != VERSION:
            raise DataError(
                f"corpus {prefix}: {prefix}.idx has version {version}, only {VERSION} is "
                f"known: preprocess the corpus again"
            )
        if code not in DTYPES:
            raise DataError(
                f"corpus {prefix}: {prefix}.idx has the token type code {code}, known are "
                f"{sorted(DTYPES)}: preprocess the corpus again"
            )
        dtype = np.dtype(DTYPES[code])
        plain = HEADER.size + 12 * sequences + 8 * documents
        if documents < 1 or size not in (plain, plain + sequences):
            raise DataError(
                f"corpus {prefix}: {prefix}.idx has {size} bytes where its header "
                f"({sequences} sequences, {documents - 1} documents) asks for "
                f"{plain}: it was truncated or is being written; copy or preprocess it again"
            )

        def number(offset: int, kind: str) -> int:
            return struct.unpack(kind, read_at(file, offset, struct.calcsize(kind)))[0]

        pointers = HEADER.size + 4 * sequences

        def end_of(sequence: int) -> int:
            return number(pointers + 8 * sequence, "<q") + dtype.itemsize * number(
                HEADER.size + 4 * sequence, "<i"
            )

        end, contiguous = 0, bin_size == 0
        if sequences:
            end = end_of(sequences - 1)
            contiguous = number(pointers, "<q") == 0 and end == bin_size
            if contiguous and end and number(pointers - 4, "<i") == 0:
                filled = bisect.bisect_left(
                    range(sequences), bin_size, key=lambda i: number(pointers + 8 * i, "<q")
                )
                contiguous = filled > 0 and end_of(filled - 1) == bin_size
        if number(plain - 8 * documents, "<q") != 0 or number(plain - 8, "<q") != sequences:
            raise DataError(
                f"corpus {prefix}: the documents in {prefix}.idx do not run from sequence 0 "
                f"to {sequences}: preprocess the corpus again"
            )
    if bin_size < end or bin_size % dtype.itemsize:
        raise DataError(
            f"corpus {prefix}: {prefix}.bin has {bin_size} bytes where the index asks for "
            f"{end} (tokens of {dtype.name}): "
            "it was truncated or belongs to another index; copy or preprocess both again"
        )
    return Header(
        dtype, sequences, documents - 1, bin_size // dtype.itemsize, size != plain, contiguous
    )


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from an offset on."""
    file.seek(offset)
    return file.read(size)
