"""Tables of runs with mixtures of English and Chinese, from closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_chatflow.planner.laws.run_table import RunRecord

SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)


def runs(
    sizes: Sequence[int] = (1_000_000,),
    lengths: Sequence[int] = (2_000_000,),
    shares: Sequence[float] = SHARES,
    noise: float = 0.003,
) -> list[RunRecord]:
    """Return a run per size, length and share of Chinese, measured on both languages.

    The loss is 1.5 + 20 / N^0.2 + 30 / D^0.2 + 0.9 exp(-3 own share), times exp(noise).
    """
    rng = np.random.default_rng(3)
    found = []
    for n in sizes:
        for d in lengths:
            for share in shares:
                for language in ("en", "zh"):
                    own = share if language == "zh" else 1 - share
                    loss = 1.5 + 20 / n**0.2 + 30 / d**0.2 + 0.9 * np.exp(-3 * own)
                    found.append(
                        RunRecord(
                            f"{n}-{d}-{share}",
                            n,
                            d,
                            float(loss * np.exp(noise * rng.normal())),
                            kind="continued",
                            language=language,
                            share=own,
                            annealed=True,
                            mixture={"en": 1 - share, "zh": share},
                        )
                    )
    return found
