"""Shuffle documents on disk, in the memory of one bucket of them.

Every document draws a key of 64 random bits, and the documents are sorted by their keys: each order
is as likely as any other, and it is a function of the seed and the number of documents alone. It
takes two passes over files: the documents are dealt into buckets by the leading bits of their keys,
each bucket at its final place; then each bucket is read, sorted, and written back.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from megatron_chatflow.data.preprocess.token_files import TokenFiles

_BUCKET_BYTES = 1 << 25
_MAX_BUCKETS = 4096
_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class _Block:
    """Some documents.

    Attributes:
        values: what each file holds of them.
        counts: how many numbers of each file belong to each document.
    """

    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]


def shuffle(
    source: TokenFiles, path: str, seed: int, bucket_bytes: int = _BUCKET_BYTES
) -> TokenFiles:
    """Write the documents of token files in a random order to new ones, and flush them to disk.

    Args:
        source: flushed; it does not change.
        path: of the new files; existing ones are replaced.
        seed: at least 0.
        bucket_bytes: about how many bytes of tokens a bucket has; or 1/4096 of all where that is
            more. Memory is about four times as much.
    """
    dtypes = source.dtypes | {"keys": np.dtype(np.uint64)}
    buckets = min(_MAX_BUCKETS, 1 + source.counts.tokens * dtypes["bin"].itemsize // bucket_bytes)
    bounds = _bounds(source, seed, buckets)
    crc32 = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(f"{path}.{name}", "w+b")) for name in dtypes}
        # First pass: deal the documents into buckets, each file separately.
        ends = {name: bound[:-1].copy() for name, bound in bounds.items()}
        for block in _blocks(source, seed, bucket_bytes // dtypes["bin"].itemsize):
            order = np.argsort(block.values["keys"], kind="stable")
            dealt = np.bincount(_bucket(block.values["keys"], buckets), minlength=buckets)
            for name, counts in block.counts.items():
                _deal(
                    files[name],
                    _gather(block.values[name], counts, order),
                    counts[order],
                    dealt,
                    ends[name],
                )
        # Second pass: sort each bucket by key, and write it back in place.
        for bucket in range(buckets):
            region = {
                name: (int(bound[bucket]), int(bound[bucket + 1])) for name, bound in bounds.items()
            }
            values = {name: _read(files[name], dtypes[name], *region[name]) for name in dtypes}
            order = np.argsort(values["keys"], kind="stable")
            for name, counts in _counts(values["sequences"], values["lengths"], dtypes).items():
                ordered = _gather(values[name], counts, order)
                _write(files[name], ordered, region[name][0])
                if name == "bin":
                    crc32 = zlib.crc32(ordered.data, crc32)
    os.unlink(f"{path}.keys")
    target = TokenFiles(
        path, source.dtypes["bin"], source.conversations, replace(source.counts, crc32=crc32)
    )
    target.sync()
    return target


def _blocks(source: TokenFiles, seed: int, max_tokens: int | None) -> Iterator[_Block]:
    """Yield all documents in their order, about `max_tokens` tokens at a time.

    None: all, without their tokens.
    """
    dtypes = source.dtypes | {"keys": np.dtype(np.uint64)}
    random = np.random.Philox(seed)
    document = sequence = token = 0
    while document < source.counts.documents:
        sequences = source.read("sequences", document, _DOCUMENTS)
        lengths = source.read("lengths", sequence, int(sequences.sum(dtype=np.int64)))
        counts = _counts(sequences, lengths, dtypes)
        if max_tokens is not None:
            number = max(
                1, int(np.searchsorted(np.cumsum(counts["bin"]), max_tokens, side="right"))
            )
            counts = {name: count[:number] for name, count in counts.items()}
        totals = {name: int(count.sum()) for name, count in counts.items()}
        values = {
            "sequences": sequences[: totals["sequences"]],
            "lengths": lengths[: totals["lengths"]],
            "keys": random.random_raw(totals["keys"]),
        }
        if max_tokens is not None:
            values["bin"] = source.read("bin", token, totals["bin"])
            if "modes" in dtypes:
                values["modes"] = source.read("modes", sequence, totals["modes"])
        yield _Block(values, counts)
        document, sequence, token = (
            document + totals["sequences"],
            sequence + totals["lengths"],
            token + totals["bin"],
        )


def _counts(
    sequences: np.ndarray, lengths: np.ndarray, names: dict[str, np.dtype]
) -> dict[str, np.ndarray]:
    """Return how many numbers of each file belong to each document, int64 [documents]."""
    one = np.ones(len(sequences), np.int64)
    per_sequence = sequences.astype(np.int64)
    tokens = (
        np.add.reduceat(lengths, np.cumsum(per_sequence) - per_sequence, dtype=np.int64)
        if len(lengths)
        else np.zeros(0, np.int64)
    )
    known = {
        "bin": tokens,
        "lengths": per_sequence,
        "sequences": one,
        "modes": per_sequence,
        "keys": one,
    }
    return {name: known[name] for name in names}


def _bucket(keys: np.ndarray, buckets: int) -> np.ndarray:
    """Return the bucket of each key: keys in ascending order have buckets in ascending order."""
    return ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def _bounds(source: TokenFiles, seed: int, buckets: int) -> dict[str, np.ndarray]:
    """Return where each bucket begins in each file, and the end: int64 [buckets + 1]."""
    sizes: dict[str, np.ndarray] = {}
    for block in _blocks(source, seed, None):
        bucket = _bucket(block.values["keys"], buckets)
        for name, counts in block.counts.items():
            size = sizes.setdefault(name, np.zeros(buckets, np.int64))
            np.add.at(size, bucket, counts)
    return {name: np.concatenate([[0], np.cumsum(size)]) for name, size in sizes.items()}


def _gather(values: np.ndarray, counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the numbers of documents in another order."""
    if np.all(counts == 1):
        return values[order]
    ends = np.cumsum(counts)
    return np.concatenate(
        [
            values[start:end]
            for start, end in zip(
                (ends - counts)[order].tolist(), ends[order].tolist(), strict=True
            )
        ]
    )


def _deal(
    file: BinaryIO, values: np.ndarray, counts: np.ndarray, dealt: np.ndarray, ends: np.ndarray
) -> None:
    """Write documents, in the order of their buckets, after what the buckets hold already.

    Args:
        file: the file.
        values: its numbers.
        counts: how many of them belong to each document.
        dealt: how many of the documents go to each bucket.
        ends: where each bucket ends; moved on.
    """
    cuts = np.concatenate([[0], np.cumsum(counts)])[np.concatenate([[0], np.cumsum(dealt)])]
    for bucket in np.flatnonzero(dealt).tolist():
        piece = values[cuts[bucket] : cuts[bucket + 1]]
        _write(file, piece, int(ends[bucket]))
    ends += np.diff(cuts)


def _write(file: BinaryIO, values: np.ndarray, start: int) -> None:
    file.seek(start * values.itemsize)
    file.write(values.data)


def _read(file: BinaryIO, dtype: np.dtype, start: int, end: int) -> np.ndarray:
    file.seek(start * dtype.itemsize)
    return np.frombuffer(file.read((end - start) * dtype.itemsize), dtype)
