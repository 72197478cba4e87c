"""Learning rate and weight decay against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.pool import Pool

BASE = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 "
    "--global-batch-size 4 --train-iters 100 --lr 1e-3 --min-lr 1e-4 "
    "--lr-warmup-iters 10 --lr-warmup-init 1e-5"
)


def _values(words: str) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of every iteration."""
    from types import SimpleNamespace

    from megatron_chatflow.config import Schedule, make_parser, parse, resolve
    from megatron_chatflow.training.optimizer import build_scheduler

    config = resolve(parse(make_parser("chatflow train", ""), f"{BASE} {words}".split())[0], 1)
    group: dict[str, Any] = {"default_config": True}
    scheduler = build_scheduler(config, Schedule.of(config), SimpleNamespace(param_groups=[group]))
    values = []
    for _ in range(100):
        values.append((group["lr"], group["weight_decay"]))
        scheduler.step(increment=4)
    return values


def _decay(style: str, ratio: float) -> float:
    return {"constant": 1.0, "linear": 1 - ratio, "cosine": 0.5 * (1 + math.cos(math.pi * ratio))}[
        style
    ]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_the_rate_warms_up_and_decays_in_closed_form(pool: Pool, style: str) -> None:
    for i, (lr, decay) in enumerate(
        pool.run(1, _values, f"--lr-decay-style {style} --weight-decay 0.1")[0]
    ):
        wanted = (
            1e-5 + (1e-3 - 1e-5) * i / 10 if i <= 10 else 1e-4 + 9e-4 * _decay(style, (i - 10) / 90)
        )
        assert abs(lr - (1e-3 if style == "constant" and i > 10 else wanted)) < 1e-12
        assert decay == 0.1


def test_wsd_is_flat_and_then_falls(pool: Pool) -> None:
    values = pool.run(
        1, _values, "--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style minus_sqrt"
    )[0]
    assert all(lr == 1e-3 for lr, _ in values[11:81])
    for i in range(81, 100):
        assert abs(values[i][0] - (1e-4 + 9e-4 * (1 - math.sqrt((i - 80) / 20)))) < 1e-12


def test_weight_decay_can_grow(pool: Pool) -> None:
    values = pool.run(
        1,
        _values,
        (
            "--lr-decay-style constant --weight-decay-incr-style linear --start-weight-decay "
            "0.0 --end-weight-decay 0.2"
        ),
    )[0]
    assert all(abs(decay - 0.2 * i / 100) < 1e-12 for i, (_, decay) in enumerate(values))
