"""From sums to what is reported: loss, perplexity and bits per byte of each domain. Plain numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def loss_values(sums: np.ndarray) -> dict[str, float | None]:
    """Values of one row of sums (loss in nats, tokens, bytes): mean loss a token, perplexity, bits
    per byte, tokens.

    Bits per byte are the summed loss in bits over the UTF-8 bytes of the text, so languages and
    tokenizers compare; None where no bytes are known. The mean loss is None where there was no
    token.
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
    """`loss_values` of each row of [domains, 3] sums, by name."""
    return {name: loss_values(row) for name, row in zip(names, sums, strict=True)}
