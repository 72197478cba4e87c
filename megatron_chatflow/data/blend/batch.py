"""The batch that windows are read into, and the memory for it.

A batch of 256 windows of 2,048 positions is 17 MB. Fresh memory of that size comes from the system
page by page, which takes longer than reading the tokens into it (measured: 80% of the time). So the
last few buffers are remembered, and one that nothing else refers to any more is used again. What a
batch's arrays (or tensors made from them) still refer to is never touched.
"""

import sys
import threading

import numpy as np

Batch = dict[str, np.ndarray]
KEEP = 4
"""Buffers that a pool remembers at most."""
_SMALLEST = 1 << 20


class BufferPool:
    """Hands out byte buffers; remembers at most `KEEP` of them. Thread-safe."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Return a buffer of `size` bytes with undefined content: uint8 [size].

        The caller keeps it in use by holding arrays that view it.
        """
        if size < _SMALLEST:
            return np.empty(size, np.uint8)
        with self._lock:
            for i in range(len(self._buffers)):
                if len(self._buffers[i]) == size and _references(self._buffers, i) == _UNUSED:
                    return self._buffers[i]
            self._buffers = self._buffers[1 - KEEP :] + [np.empty(size, np.uint8)]
            return self._buffers[-1]


def _references(buffers: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(buffers[i])


_UNUSED = _references([np.empty(0, np.uint8)], 0)


_POOL = BufferPool()


def empty_batch(num_samples: int, seq_length: int) -> Batch:
    """Allocate a batch; all but tokens and labels is set as for a plain text window.

    Returns:
        tokens, labels, position_ids: int64 [num_samples, seq_length]; loss_mask: float32, 1;
        segment_ids: int32, 0 (same shape).
    """
    count = num_samples * seq_length
    memory = _POOL.take(32 * count)
    fields = {
        "tokens": np.int64,
        "labels": np.int64,
        "position_ids": np.int64,
        "loss_mask": np.float32,
        "segment_ids": np.int32,
    }
    batch, at = {}, 0
    for name, dtype in fields.items():
        size = count * np.dtype(dtype).itemsize
        batch[name] = memory[at : at + size].view(dtype).reshape(num_samples, seq_length)
        at += size
    batch["position_ids"][:] = np.arange(seq_length)
    batch["loss_mask"].fill(1)
    batch["segment_ids"].fill(0)
    return batch


def first_outside(batch: Batch, vocab_size: int | None) -> int | None:
    """Return the first row of a batch with an id outside of the vocabulary.

    None where there is no such row, or no vocabulary is given.
    """
    if vocab_size is None or not batch["tokens"].size:
        return None
    # As unsigned numbers, negative ids are large.
    unsigned = [batch[key].view(np.uint64) for key in ("tokens", "labels")]
    if all(ids.max() < vocab_size for ids in unsigned):
        return None
    wrong = [(ids >= vocab_size).any(axis=1) for ids in unsigned]
    return int(np.argmax(np.logical_or.reduce(wrong)))


def segments_of(
    starts: np.ndarray, num_samples: int, seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Number the segments of rows, and the positions within them.

    Args:
        starts: int64 [any], row * seq_length + column of each place where a segment starts; the
            start of a row always is one.
        num_samples: rows n.
        seq_length: columns S.

    Returns:
        segment_ids int32 [n, S] and position_ids int64 [n, S], both from 0 in each row.
    """
    # Starts of all segments in the flattened rows, and their sizes: int64 [segments].
    total = num_samples * seq_length
    first_of_row = np.arange(0, total, seq_length)
    starts = np.union1d(first_of_row, starts)
    sizes = np.diff(starts, append=total)
    # Segments are numbered from 0 in each row, positions from 0 in each segment.
    number = np.arange(len(starts)) - np.searchsorted(starts, first_of_row)[starts // seq_length]
    position = np.arange(total) - np.repeat(starts, sizes)
    return np.repeat(number.astype(np.int32), sizes).reshape(
        num_samples, seq_length
    ), position.reshape(num_samples, seq_length)


def concatenated_ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (which, within) for the concatenation of range(counts[0]), range(counts[1]), ...

    Both are int64 [sum(counts)].
    """
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
