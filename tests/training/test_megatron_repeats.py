"""What megatron-core's own blend does at a change of weights or of length, measured next to ours at
the same change.

The corpora have the documents of the sample corpora, with every token its own position in the
corpus: so what a sample trains on can be read from it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_chatflow.curriculum import BlendPlan, parse_curriculum
from megatron_chatflow.data import IndexedDataset, IndexedDatasetBuilder, open_blend
from tests.pool import Pool

SEQ, SEED = 64, 1234
CHANGE = 1000
"""The sample at which the run is stopped and continues differently."""
STOP = 2000


class Sample(NamedTuple):
    """What is known of a sample that was served."""

    domain: int
    index: int
    """Its place in the domain's order, as the blend counts."""
    labels: tuple[int, ...]
    """The positions in the corpus that it trains on."""


class Tally(NamedTuple):
    """What happened at a change."""

    repeated: list[int]
    """For each domain, samples after the change whose place in the order had been served before
    it.
    """
    skipped: list[int]
    """For each domain, places that were never served though later ones were."""
    tokens_again: float
    """Share of the tokens after the change that had been trained on before it."""


def tally(before: list[Sample], after: list[Sample]) -> Tally:
    repeated, skipped = [], []
    for domain in (0, 1):
        first, second = ([s.index for s in part if s.domain == domain] for part in (before, after))
        served = Counter(first + second)
        repeated.append(sum(served[i] > 1 for i in second))
        skipped.append(max(served) + 1 - len(served))
    known = {(s.domain, label) for s in before for label in s.labels}
    labels = [(s.domain, label) for s in after for label in s.labels]
    return Tally(repeated, skipped, sum(label in known for label in labels) / len(labels))


def megatron(
    prefixes: list[str], weights: list[float], size: int, start: int, stop: int
) -> list[Sample]:
    """Samples start .. stop - 1 of megatron-core's blend of this size, built as its training script
    builds it.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = SimpleNamespace(
        eod=-1, pad=-1, vocab_size=10**6, unique_identifiers={"class": "positions"}
    )
    switches = {
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": False,
    }
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ,
        blend=(prefixes, weights),
        split="1,0,0",
        tokenizer=tokenizer,
        **switches,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [size, 0, 0], lambda: True, config
    ).build()
    places = [
        (int(train.dataset_index[n]), int(train.dataset_sample_index[n]))
        for n in range(start, stop)
    ]
    return [
        Sample(k, i, tuple(train[n]["labels"].tolist()))
        for n, (k, i) in zip(range(start, stop), places, strict=True)
    ]


def megatron_change(prefixes: list[str], *phases: tuple[list[float], int]) -> Tally:
    """A run that stops at CHANGE and continues with other weights or another size.

    Only the number of samples is carried over.
    """
    (one, size), (two, other) = phases
    return tally(
        megatron(prefixes, one, size, 0, CHANGE), megatron(prefixes, two, other, CHANGE, STOP)
    )


def our_change(prefixes: list[str], *phases: tuple[list[float], int]) -> Tally:
    """The same change here: an amendment."""
    curricula = []
    for weights, _ in phases:
        domains = {name: {"path": prefix} for name, prefix in zip("ab", prefixes, strict=True)}
        stages = [{"name": "constant", "at": 0, "weights": dict(zip("ab", weights, strict=True))}]
        curricula.append(
            parse_curriculum({"domains": domains, "stages": stages}, source="test", folder=Path())
        )
    plan = BlendPlan(curricula[0], num_samples=phases[0][1], global_batch_size=8, seq_length=SEQ)
    amended = plan.amend(at=CHANGE, curriculum=curricula[1], num_samples=phases[1][1])
    parts = []
    for known, start, stop in ((plan, 0, CHANGE), (amended, CHANGE, STOP)):
        batch = open_blend(curricula[0], known, seq_length=SEQ, seed=SEED, split="1").read(
            start, stop
        )
        rows: list[Any] = [batch[key].tolist() for key in ("domain", "ordinal", "labels")]
        parts.append([Sample(k, i, tuple(labels)) for k, i, labels in zip(*rows, strict=True)])
    return tally(*parts)


@pytest.fixture(scope="module")
def positions(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, prefixes = tmp_path_factory.mktemp("positions"), []
    for name in ("en", "zh"):
        lengths = IndexedDataset(sample / f"{name}_text_document").sequence_lengths
        with IndexedDatasetBuilder(folder / name, np.int32) as builder:
            for stop, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True):
                builder.add_document(np.arange(stop - length, stop), [length])
            builder.finalize()
        prefixes.append(str(folder / name))
    return prefixes


HALVES, OTHER = [0.5, 0.5], [0.8, 0.2]


def test_a_change_of_weights_makes_megatron_repeat_one_domain_and_skip_in_the_other(
    pool: Pool, positions: list[str]
) -> None:
    phases = ((HALVES, STOP), (OTHER, STOP))
    (theirs,) = pool.run(1, megatron_change, positions, *phases)
    # From 500 of each domain the run continues where 0.8 : 0.2 would be after 1,000 samples: 800
    # and 200.
    assert theirs.skipped[0] == pytest.approx(300, abs=3) and theirs.repeated[0] == 0
    assert theirs.repeated[1] == pytest.approx(200, abs=3) and theirs.skipped[1] == 0
    assert theirs.tokens_again == pytest.approx(0.2, abs=0.005)
    assert our_change(positions, *phases) == ([0, 0], [0, 0], 0.0)


def test_a_longer_run_makes_megatron_shuffle_again_and_read_text_again(
    pool: Pool, positions: list[str]
) -> None:
    phases = ((HALVES, STOP), (HALVES, 10_000))
    (theirs,) = pool.run(1, megatron_change, positions, *phases)
    assert (
        theirs.repeated == theirs.skipped == [0, 0]
    )  # by its own count, but the places hold other text now
    assert theirs.tokens_again > 0.1
    assert our_change(positions, *phases) == ([0, 0], [0, 0], 0.0)
