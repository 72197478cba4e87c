"""Losses that stand out. Imports no torch."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 100
FEWEST = 20
DEVIATIONS = 6.0
LEAST = 0.2
"""Nats above the mean that a spike has at least."""


class SpikeWatch:
    """Compares each loss with those of the last iterations."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, loss: float) -> float | None:
        """Take a finite loss in; the mean of those before it if it is a spike above them, else
        None.
        """
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < FEWEST:
            return None
        mean = statistics.fmean(before)
        return mean if loss - mean > max(LEAST, DEVIATIONS * statistics.stdev(before)) else None
