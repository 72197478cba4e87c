"""Memory for batches, used again as soon as nobody holds it.

A batch of 256 windows of 2,048 positions is 17 MB. Fresh memory of that size comes from the system
page by page, which takes longer than reading the tokens into it (measured: 80% of the time). So the
last few buffers are remembered, and one that nothing else refers to any more is handed out again.
What a batch's arrays (or tensors made from them) still refer to is never touched.
"""

import sys
import threading

import numpy as np

KEEP = 4
_SMALLEST = 1 << 20


class BufferPool:
    """Hands out byte buffers; remembers at most `KEEP` of them. Thread-safe."""

    def __init__(self) -> None:
        self._buffers: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray:
        """Returns a buffer of `size` bytes with undefined content, uint8 [size]; keep it alive
        through arrays that view it.
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
