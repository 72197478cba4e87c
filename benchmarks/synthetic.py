"""Corpora for the benchmarks: lengths of documents as they are on the web (log-normal, 600 tokens
on average), tokens at random.
"""

import json
import os

import numpy as np

from megatron_chatflow.data import IndexedDatasetBuilder


def lengths_of_documents(number: int, seed: int) -> np.ndarray:
    """Tokens of each document, int32 [number]: median 400, mean about 600, at most 20,000."""
    return np.clip(np.random.default_rng(seed).lognormal(6.0, 0.9, number), 16, 20_000).astype(
        np.int32
    )


def write_text(prefix: str, documents: int, seed: int) -> None:
    """Writes a text corpus of 16-bit tokens drawn at random from a vocabulary of 32,000."""
    lengths = lengths_of_documents(documents, seed)
    tokens = np.random.default_rng(seed).integers(0, 32_000, int(lengths.sum()), np.uint16)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_documents(tokens, lengths, np.ones(documents, np.int64))
        builder.finalize()


def write_sparse(
    prefix: str, lengths: np.ndarray, sequences_per_document: int, modes: np.ndarray | None = None
) -> None:
    """Writes a corpus whose `.idx` is real and whose `.bin` is a hole of the right size: it reads
    as zeros and takes no room on the disk.
    """
    documents = np.arange(0, len(lengths) + 1, sequences_per_document)
    pointers = np.cumsum(lengths, dtype=np.int64) * 2
    with open(prefix + ".idx", "wb") as file:
        file.write(
            b"MMIDIDX\x00\x00"
            + np.uint64(1).tobytes()
            + b"\x08"
            + np.array([len(lengths), len(documents)], "<u8").tobytes()
        )
        for numbers in (
            lengths.astype("<i4"),
            np.concatenate([[0], pointers[:-1]]).astype("<i8"),
            documents.astype("<i8"),
        ):
            file.write(numbers.tobytes())
        if modes is not None:
            file.write(modes.astype(np.int8).tobytes())
    with open(prefix + ".bin", "wb") as file:
        file.truncate(int(pointers[-1]))


def link(source: str, target: str) -> None:
    """Gives a corpus another name."""
    for suffix in (".bin", ".idx"):
        os.symlink(os.path.basename(source) + suffix, target + suffix)


def write_curriculum(path: str, prefixes: dict[str, str]) -> None:
    """Writes a curriculum over text domains whose shares differ by a factor of 100 and move all the
    time (YAML reads JSON too).
    """
    names = list(prefixes)
    first = {name: 1 / (1 + 99 * i / len(names)) for i, name in enumerate(names)}
    last = {name: 1 / (1 + 99 * (len(names) - 1 - i) / len(names)) for i, name in enumerate(names)}
    stages = [
        {"name": "start", "at": 0, "weights": first},
        {"name": "turn", "at": "50%", "weights": last, "ramp": "root2"},
        {"name": "end", "at": "90%", "weights": first, "ramp": "linear"},
    ]
    domains = {name: {"path": prefix} for name, prefix in prefixes.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"clock": "samples", "domains": domains, "stages": stages}, file)
