"""Reads a whole corpus and says what is wrong with it: all that opening it, which is quick, cannot see."""

import os

import numpy as np

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.manifest import read_manifest

_CHUNK = 1 << 22


def verify(prefix: str | os.PathLike) -> list[str]:
    """Checks lengths, pointers, documents, modes, and the tokens against the manifest's vocabulary, in bounded memory.

    Args:
        prefix: path of the corpus without `.bin` and `.idx`.

    Returns:
        A sentence for each fault; empty when the corpus is sound.

    Raises:
        ValueError: the corpus cannot even be opened (`read_header`), or its manifest cannot be read.
    """
    dataset = IndexedDataset(prefix)
    manifest = read_manifest(prefix)
    return [
        f"corpus {dataset.prefix}: {fault}"
        for fault in (
            sequence_fault(dataset),
            _documents(dataset),
            _modes(dataset),
            _tokens(dataset, None if manifest is None else manifest.tokenizer["vocab_size"]),
        )
        if fault
    ]


def sequence_fault(dataset: IndexedDataset) -> str | None:
    """Returns what is wrong with the lengths and pointers, or None when each sequence starts where the one before it ends."""
    expected = 0
    for at in range(0, dataset.num_sequences, _CHUNK):
        lengths = dataset.sequence_lengths[at : at + _CHUNK]
        if lengths.min() < 0:
            return f"sequence {at + int(np.argmax(lengths < 0))} has a negative length"
        ends = np.cumsum(lengths, dtype=np.int64) * dataset.dtype.itemsize + expected
        wrong = np.flatnonzero(dataset.sequence_pointers[at : at + _CHUNK] != np.concatenate([[expected], ends[:-1]]))
        if len(wrong):
            return f"sequence {at + int(wrong[0])} does not start where the one before it ends"
        expected = int(ends[-1])
    size = dataset.num_tokens * dataset.dtype.itemsize
    return None if expected == size else f"the sequences end at byte {expected}, the .bin at {size}"


def _documents(dataset: IndexedDataset) -> str | None:
    for at in range(0, dataset.num_documents, _CHUNK):
        wrong = np.flatnonzero(np.diff(dataset.document_indices[at : at + _CHUNK + 1]) < 0)
        if len(wrong):
            return f"document {at + int(wrong[0])} ends before it starts"
    return None


def _modes(dataset: IndexedDataset) -> str | None:
    if dataset.sequence_modes is not None:
        for at in range(0, dataset.num_sequences, _CHUNK):
            modes = dataset.sequence_modes[at : at + _CHUNK]
            wrong = np.flatnonzero((modes != 0) & (modes != 1))
            if len(wrong):
                return f"sequence {at + int(wrong[0])} has mode {modes[wrong[0]]}, known are 0 (answer) and 1 (prompt)"
    return None


def _tokens(dataset: IndexedDataset, vocab_size: int | None) -> str | None:
    for at in range(0, dataset.num_tokens, _CHUNK):
        tokens = dataset.tokens[at : at + _CHUNK]
        wrong = np.flatnonzero((tokens < 0) | (tokens >= (vocab_size or np.iinfo(np.int64).max)))
        if len(wrong):
            bound = "" if vocab_size is None else f", outside the vocabulary of {vocab_size}"
            return f"token {at + int(wrong[0])} is {tokens[wrong[0]]}{bound}"
    return None
