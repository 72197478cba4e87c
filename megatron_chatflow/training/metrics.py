"""From sums to what is reported: loss, perplexity and bits per byte of each domain; loss spikes.

Plain numpy.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

SPIKE_WINDOW = 100
"""Losses that a spike is compared with, the last ones."""
SPIKE_MINIMUM_WINDOW = 20
"""Losses without which there is no comparison."""
SPIKE_DEVIATIONS = 6.0
"""Standard deviations above the mean at which a loss is a spike."""
SPIKE_MINIMUM_HEIGHT = 0.2
"""Nats above the mean that a spike has at least."""


def loss_values(sums: np.ndarray) -> dict[str, float | None]:
    """Return the values of one row of sums: loss per token, perplexity, bits per byte, tokens.

    Bits per byte are the summed loss in bits over the UTF-8 bytes of the text, so languages and
    tokenizers compare; None where no bytes are known. The mean loss is None where there was no
    token.

    Args:
        sums: [3]: loss in nats, tokens, bytes.
    """
    loss, tokens, size = (float(x) for x in sums)
    if not tokens:
        return {"loss": None, "ppl": None, "bits_per_byte": None, "tokens": 0}
    mean = loss / tokens
    return {
        "loss": mean,
        "ppl": math.exp(min(mean, 20.0)),
        "bits_per_byte": loss / math.log(2) / size if size else None,
        "tokens": int(tokens),
    }


def by_domain(names: Sequence[str], sums: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return `loss_values` of each row of [domains, 3] sums, by name."""
    return {name: loss_values(row) for name, row in zip(names, sums, strict=True)}


class SpikeDetector:
    """Compares each loss with those of the last iterations."""

    def __init__(self) -> None:
        """Start without losses."""
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def observe(self, loss: float) -> float | None:
        """Add a finite loss; return the mean of those before it if it is a spike, else None."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < SPIKE_MINIMUM_WINDOW:
            return None
        mean = statistics.fmean(before)
        limit = max(SPIKE_MINIMUM_HEIGHT, SPIKE_DEVIATIONS * statistics.stdev(before))
        return mean if loss - mean > limit else None
