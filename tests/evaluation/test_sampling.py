"""Choosing tokens, against a slow reading of the definitions in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12)


def slow(logits: list[float], top_k: int, top_p: float) -> list[float]:
    least = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1] if top_k else -math.inf
    weights = [math.exp(x) if x >= least else 0.0 for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept, together = set(), 0.0
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if together >= top_p:
            break
        kept.add(i)
        together += shares[i]
    total = sum(shares[i] for i in kept)
    return [shares[i] / total if i in kept else 0.0 for i in range(len(shares))]


@settings(deadline=None, derandomize=True)
@given(ROWS, st.integers(0, 14), st.sampled_from([0.1013, 0.3337, 0.7531, 0.9717, 1.0]))
def test_top_k_and_top_p_keep_what_their_definitions_keep(
    logits: list[float], top_k: int, top_p: float
) -> None:
    import torch

    from megatron_chatflow.evaluation.decoding import likely

    ours = likely(torch.tensor([logits], dtype=torch.float64), top_k, top_p)[0].tolist()
    theirs = slow(logits, top_k, top_p)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    import torch

    from megatron_chatflow.evaluation.decoding import Sampling, choose

    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), -1.0]])
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    generator = sampling.generator(0)
    counts = Counter(choose(logits, sampling, [generator])[0] for _ in range(8000))
    assert set(counts) == {0, 1, 2}
    for token, share in ((0, 1 / 8), (1, 2 / 8), (2, 5 / 8)):
        assert abs(counts[token] / 8000 - share) < 0.02
    colder = Sampling(temperature=0.5, top_k=3)
    generator = colder.generator(0)
    counts = Counter(choose(logits, colder, [generator])[0] for _ in range(8000))
    assert abs(counts[2] / 8000 - 25 / 30) < 0.02


def test_each_prompt_has_its_own_random_numbers() -> None:
    from megatron_chatflow.evaluation.decoding import Sampling

    seeds = {
        Sampling(seed=seed).generator(number).initial_seed()
        for seed in range(20)
        for number in range(20)
    }
    assert len(seeds) == 400


def test_greedy_takes_the_likeliest() -> None:
    import torch

    from megatron_chatflow.evaluation.decoding import Sampling, choose

    logits = torch.tensor([[0.0, 3.0, 2.0], [4.0, 3.0, 2.0]])
    assert choose(logits, Sampling(), []) == [1, 0]
