"""Check an entire corpus: find all that opening it, which is fast, cannot find."""

import os
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from megatron_chatflow.data.corpus.index_header import Header
from megatron_chatflow.data.corpus.indexed_dataset import IndexedDataset
from megatron_chatflow.data.corpus.manifest import (
    Manifest,
    file_crc32,
    manifest_path,
    read_manifest,
)

_CHUNK = 1 << 20


def verify(
    prefix: str | os.PathLike,
    progress: Callable[[int, int], None] = lambda done, total: None,
    vocab_size: int | None = None,
) -> list[str]:
    """Check lengths, pointers, documents, modes and tokens, against each other and the manifest.

    Memory is bounded.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.
        progress: called now and then with the bytes of the `.bin` that were read, and all its
            bytes.
        vocab_size: tokens of the vocabulary that the corpus is to be read with; None: as in the
            manifest.

    Returns:
        A message for each error; empty when the corpus is valid.

    Raises:
        DataError: the corpus cannot be opened (`read_header`), or its manifest cannot be read.
    """
    dataset = IndexedDataset(prefix)
    manifest = read_manifest(prefix)
    errors = [
        *index_errors(dataset),
        None if manifest is None else manifest_error(dataset.header, manifest, dataset.prefix),
        *_tokens(dataset, manifest, progress, vocab_size),
    ]
    if (
        manifest is not None
        and manifest.crc32
        and file_crc32(dataset.prefix + ".idx") != manifest.crc32["idx"]
    ):
        errors.append(
            f"the .idx is not the one that {os.path.basename(manifest_path(prefix))} was "
            f"written with (its checksum differs)"
        )
    return [f"corpus {dataset.prefix}: {error}" for error in errors if error]


def index_errors(dataset: IndexedDataset) -> list[str]:
    """Return what is wrong with the arrays of an index; nothing when it is valid."""
    return [error for error in (_sequences(dataset), _documents(dataset), _modes(dataset)) if error]


def manifest_error(header: Header, manifest: Manifest, prefix: str) -> str | None:
    """Return how the manifest contradicts the index, or None."""
    actual = {
        "documents": header.num_documents,
        "tokens": header.num_tokens,
        "dtype": header.dtype.name,
        "conversations": header.multimodal,
    }
    for key, value in actual.items():
        if getattr(manifest, key) != value and not (
            key == "conversations" and not header.num_sequences
        ):
            return (
                f"{os.path.basename(manifest_path(prefix))} says {key} "
                f"{getattr(manifest, key)}, the index says {value}: "
                "the manifest belongs to another corpus; preprocess again or delete it"
            )
    return None


def _sequences(dataset: IndexedDataset) -> str | None:
    expected = 0
    for at, stop in _chunks(dataset.num_sequences):
        lengths = dataset.read_array("sequence_lengths", at, stop)
        if lengths.min() < 0:
            return f"sequence {at + int(np.argmax(lengths < 0))} has a negative length"
        ends = np.cumsum(lengths, dtype=np.int64) * dataset.dtype.itemsize + expected
        wrong = np.flatnonzero(
            dataset.read_array("sequence_pointers", at, stop)
            != np.concatenate([[expected], ends[:-1]])
        )
        if len(wrong):
            return f"sequence {at + int(wrong[0])} does not start where the one before it ends"
        expected = int(ends[-1])
    size = dataset.num_tokens * dataset.dtype.itemsize
    return None if expected == size else f"the sequences end at byte {expected}, the .bin at {size}"


def _documents(dataset: IndexedDataset) -> str | None:
    for at, stop in _chunks(dataset.num_documents):
        wrong = np.flatnonzero(np.diff(dataset.read_array("document_indices", at, stop + 1)) < 0)
        if len(wrong):
            return f"document {at + int(wrong[0])} ends before it starts"
    return None


def _modes(dataset: IndexedDataset) -> str | None:
    for at, stop in _chunks(dataset.num_sequences * dataset.header.multimodal):
        modes = dataset.read_array("sequence_modes", at, stop)
        wrong = np.flatnonzero((modes != 0) & (modes != 1))
        if len(wrong):
            return (
                f"sequence {at + int(wrong[0])} has mode {modes[wrong[0]]}, known are 0 "
                f"(answer) and 1 (prompt)"
            )
    return None


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + _CHUNK, count)) for at in range(0, count, _CHUNK))


def _tokens(
    dataset: IndexedDataset,
    manifest: Manifest | None,
    progress: Callable[[int, int], None],
    vocab_size: int | None,
) -> list[str]:
    """Read the `.bin` once: the tokens outside the vocabulary, and the checksum."""
    errors: list[str] = []
    first, count, smallest, largest = None, 0, 0, 0
    if vocab_size is None and manifest is not None:
        vocab_size = manifest.tokenizer["vocab_size"]
    limit = np.iinfo(np.int64).max if vocab_size is None else vocab_size
    total = dataset.num_tokens * dataset.dtype.itemsize
    at, crc = 0, 0
    with open(dataset.prefix + ".bin", "rb", buffering=0) as file:
        while len(tokens := np.fromfile(file, dataset.dtype.newbyteorder("<"), _CHUNK)):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= limit:
                wrong = np.flatnonzero((tokens < 0) | (tokens >= limit))
                first = first or (at + int(wrong[0]), int(tokens[wrong[0]]))
                count, smallest, largest = (
                    count + len(wrong),
                    min(smallest, low),
                    max(largest, high),
                )
            crc = zlib.crc32(tokens.data, crc)
            at += len(tokens)
            progress(at * dataset.dtype.itemsize, total)
    if first is not None:
        bound = "" if vocab_size is None else f", outside the vocabulary of {vocab_size}"
        document = int(dataset.documents_at(np.array([first[0]]))[0])
        others = (
            f"; {count:,} such tokens in all, from {smallest} to {largest}" if count > 1 else ""
        )
        errors.append(f"token {first[0]} is {first[1]}{bound} (document {document}){others}")
    if manifest is not None and manifest.crc32 and f"{crc:08x}" != manifest.crc32["bin"]:
        errors.append(
            f"the .bin is not the one that "
            f"{os.path.basename(manifest_path(dataset.prefix))} was written with (its "
            f"checksum differs)"
        )
    return errors
