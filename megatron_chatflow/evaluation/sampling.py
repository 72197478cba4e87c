"""From logits to the next token: greedy, temperature, top-k, top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_chatflow.utils.seeding import seed_from


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest."""
    top_k: int = 0
    """Sample among this many likeliest; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest that together have at least this probability (Holtzman et
    al., arXiv:1904.09751, section 3.1).
    """
    seed: int = 1234

    def generator(self, number: int) -> torch.Generator:
        """Randomness of the prompt with this number: prompts do not disturb each other, however
        they share batches.
        """
        return torch.Generator().manual_seed(seed_from(f"{self.seed}/{number}"))


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """A token for each row of float32 logits [rows, vocabulary] on the CPU; a generator for each
    row.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def likely(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities [rows, vocabulary] with all but the likeliest tokens at 0: first those of top_k
    (ties kept), then those of top_p among them.
    """
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(
            -1, index, ordered.masked_fill(before >= top_p, 0)
        )
    return probabilities / probabilities.sum(-1, keepdim=True)
