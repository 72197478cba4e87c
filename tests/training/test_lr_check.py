"""What the learning rate does to late stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chatflow.config import Config
from megatron_chatflow.curriculum import BlendPlan, parse_curriculum
from tests.pool import Pool
from tests.sample import metrics, train


def config(**optimizer: object) -> Config:
    values = {"global_batch_size": 10, "train_samples": 1000, "lr": 3e-4}
    return Config().replace(**values | optimizer)


def plan(at: int) -> BlendPlan:
    stages = [
        {"name": "early", "at": 0, "weights": {"a": 1}},
        *([{"name": "late", "at": at, "weights": {"b": 1}}] if at else []),
    ]
    mapping = {
        "clock": "samples",
        "domains": {"a": {"path": "a"}, "b": {"path": "b"}},
        "stages": stages,
    }
    curriculum = parse_curriculum(mapping, source="test", folder=Path())
    return BlendPlan(curriculum, num_samples=1000, global_batch_size=10, seq_length=8)


def note(at: int, optimizer: dict[str, object]) -> str | None:
    from megatron_chatflow.training.lr_check import late_stage_note

    return late_stage_note(config(**optimizer), plan(at), 1000)


def rates(run: Path, samples: list[int]) -> list[float]:
    from megatron_chatflow.config import load_values, make_parser, parse, resolve
    from megatron_chatflow.training.lr_check import rate_at

    made, _ = parse(make_parser("test", ""), [], load_values(run / "config.yaml"))
    return [rate_at(resolve(made, 1), sample) for sample in samples]


@pytest.mark.parametrize(
    ("at", "optimizer", "warned"),
    [
        (900, {"lr_decay_style": "cosine"}, True),
        (600, {"lr_decay_style": "linear"}, True),
        (900, {"lr_decay_style": "cosine", "min_lr": 1e-4}, False),
        (900, {"lr_decay_style": "constant"}, False),
        (100, {"lr_decay_style": "linear"}, False),
        (0, {"lr_decay_style": "linear"}, False),
        (500, {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 100}, False),
        (900, {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 100}, False),
        (
            900,
            {
                "lr_decay_style": "WSD",
                "lr_wsd_decay_samples": 100,
                "lr_wsd_decay_style": "minus_sqrt",
                "min_lr": 1e-5,
            },
            False,
        ),
        (
            950,
            {
                "lr_decay_style": "WSD",
                "lr_wsd_decay_samples": 100,
                "lr_wsd_decay_style": "minus_sqrt",
            },
            True,
        ),
    ],
)
def test_a_late_stage_at_a_low_rate_is_reported(
    pool: Pool, at: int, optimizer: dict[str, object], warned: bool
) -> None:
    (message,) = pool.run(1, note, at, optimizer)
    assert bool(message) == warned, message
    if message:
        assert "stage late" in message and "--min-lr 0.0001" in message


def test_the_rate_is_the_one_the_run_is_made_with(pool: Pool, reference: Path) -> None:
    records = metrics(reference)
    (message,) = pool.run(1, rates, reference, [record["samples"][0] for record in records])
    assert message == pytest.approx([record["learning-rate"] for record in records], rel=1e-12)


def test_train_prints_the_sentence_once(pool: Pool, sample: Path) -> None:
    results = pool.run(
        2,
        train,
        sample,
        "--train-iters",
        "1",
        "--lr-decay-iters",
        "20",
        "--min-lr",
        "0",
        "--lr-warmup-iters",
        "0",
    )
    assert [out.count("wipes out much") for _, out, _ in results] == [0, 0]
    results = pool.run(2, train, sample, "--min-lr", "0", "--exit-interval", "1")
    assert [out.count("wipes out much") for _, out, _ in results] == [1, 0]
