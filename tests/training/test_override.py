"""After --override-opt_param-scheduler the optimizer is one with the command's settings, started at
that point."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

OVERRIDE, USE_CHECKPOINT = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"
SHAPE = (
    "--num-layers 1 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 20 --lr-warmup-iters 1 --lr-warmup-init 1e-5 --clip-grad 0"
)
BEFORE = "--lr 1e-3 --min-lr 1e-4 --lr-decay-style linear --weight-decay 0.3"
AFTER = (
    "--lr 4e-4 --min-lr 3e-5 --lr-warmup-iters 4 --lr-warmup-init 2e-5 --adam-beta1 0.1 "
    "--adam-beta2 0.5 --adam-eps 1e-3 --sgd-momentum 0.3"
)
STYLES = {
    "constant": "--weight-decay 0.1",
    "linear": "--lr-decay-iters 8 --weight-decay 0.2",
    "cosine": "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.5",
    "inverse-square-root": (
        "--weight-decay-incr-style cosine --start-weight-decay 0.1 --end-weight-decay 0.5"
    ),
    "WSD exponential": "--lr-wsd-decay-iters 14",
    "WSD linear": "--lr-wsd-decay-iters 15",
    "WSD cosine": "--lr-wsd-decay-samples 50",
    "WSD minus_sqrt": "--lr-decay-iters 10 --lr-wsd-decay-iters 5",
}
DONE, STEPS = 3, 8
"""Iterations before the override, and in all."""


def flags(style: str) -> str:
    name, *last_phase = style.split()
    return f"{AFTER} --lr-decay-style {name} {STYLES[style]}" + "".join(
        f" --lr-wsd-decay-style {word}" for word in last_phase
    )


def closed_form(style: str, i: int) -> tuple[float, float]:
    """(learning rate, weight decay) of the iteration after `i` others, by the flags above."""
    n, peak, floor, warmup, end, total = (
        4 * i,
        4e-4,
        3e-5,
        16,
        {"linear": 32, "WSD minus_sqrt": 40}.get(style, 80),
        80,
    )
    last = {"WSD exponential": 56, "WSD linear": 60, "WSD cosine": 50, "WSD minus_sqrt": 20}.get(
        style, 1
    )
    ratio, late = (n - warmup) / (end - warmup), max(0, n - (end - last)) / last
    between = {
        "constant": lambda: peak,
        "linear": lambda: floor + (peak - floor) * (1 - ratio),
        "cosine": lambda: floor + (peak - floor) * (1 + math.cos(math.pi * ratio)) / 2,
        "inverse-square-root": lambda: max(floor, peak * math.sqrt(warmup / n)),
        "WSD exponential": lambda: floor + (peak - floor) * (2 * 0.5**late - 1),
        "WSD linear": lambda: floor + (peak - floor) * (1 - late),
        "WSD cosine": lambda: floor + (peak - floor) * (1 + math.cos(math.pi * late)) / 2,
        "WSD minus_sqrt": lambda: floor + (peak - floor) * (1 - math.sqrt(late)),
    }
    rate = 2e-5 + (peak - 2e-5) * n / warmup if n <= warmup else between[style]()
    decay = {
        "constant": 0.1,
        "linear": 0.2,
        "cosine": 0.1 + 0.4 * n / total,
        "inverse-square-root": 0.1 + 0.4 * (1 + math.cos(math.pi * (1 - n / total))) / 2,
    }
    return rate, decay.get(style, 0.01)


def override(folder: Path, kind: str, distributed: bool, styles: list[str]) -> dict[str, list[Any]]:
    """For each style the (rate, wanted rate, largest distance of a weight from torch's own
    optimizer) of every iteration after the override."""
    import torch

    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.config import Config, Schedule, make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups as groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.training.optimizer import build_optimizer, build_scheduler
    from megatron_chatflow.training.train_step import update

    launch = read_launch()
    forms = f"--optimizer {kind} " + ("--use-distributed-optimizer" if distributed else "")

    def settings(words: str) -> Config:
        written = parse(make_parser("test", ""), f"{SHAPE} {forms} {words}".split())[0]
        return resolve(written, launch.world_size)

    def assemble(config: Config) -> tuple[Any, ...]:
        model = build_model(config, 128, "local")
        optimizer = build_optimizer(config, model)
        return model, optimizer, build_scheduler(config, Schedule.of(config), optimizer)

    def step(model: Any, optimizer: Any, scheduler: Any, i: int) -> None:
        for number, parameter in enumerate(model[0].parameters()):
            parameter.main_grad.copy_(gradient(parameter, i, number))
        update(optimizer, check_finite=True)
        scheduler.step(4)

    def gradient(parameter: torch.Tensor, i: int, number: int) -> torch.Tensor:
        return torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(100 * i + number)
        )

    def step_torch(
        reference: Any, weights: list[torch.Tensor], i: int, lr: float, decay: float, **others: Any
    ) -> None:
        for number, weight in enumerate(weights):
            weight.grad = gradient(weight, i, number)
        for group, decayed in zip(reference.param_groups, (True, False), strict=True):
            group.update(lr=lr, weight_decay=decay if decayed else 0.0, **others)
        reference.step()

    groups.initialize(launch, settings(BEFORE).parallel, 1)
    try:
        parts = assemble(settings(BEFORE))
        start = [parameter.detach().clone() for parameter in parts[0][0].parameters()]
        for i in range(DONE):
            step(*parts, i)
        saved = state_dict.save(folder, DONE, parts[0], parts[1], {})
        result: dict[str, list[Any]] = {}
        for style in styles:
            model, optimizer, scheduler = assemble(settings(f"{flags(style)} {OVERRIDE}"))
            state_dict.load(saved, model, optimizer)
            scheduler.step(4 * DONE)
            weights = [weight.clone().requires_grad_() for weight in start]
            split = [
                {"params": [w for w in weights if (w.dim() > 1) == decayed]}
                for decayed in (True, False)
            ]
            adam = kind == "adam"
            reference = (
                torch.optim.AdamW(split) if adam else torch.optim.SGD(split, lr=1.0, momentum=0.9)
            )
            for i in range(DONE):
                lr = 1e-3 * i if i < 1 else 1e-4 + 9e-4 * (1 - (i - 1) / 19)
                step_torch(reference, weights, i, max(lr, 1e-5), 0.3)
            others = {"betas": (0.1, 0.5), "eps": 1e-3} if adam else {"momentum": 0.3}
            result[style] = []
            for i in range(DONE, STEPS):
                used, (lr, decay) = optimizer.param_groups[0]["lr"], closed_form(style, i)
                step(model, optimizer, scheduler, i)
                step_torch(reference, weights, i, lr, decay, **others)
                if distributed:
                    state_dict.gather_weights(model)
                pairs = zip(model[0].parameters(), weights, strict=True)
                result[style].append((used, lr, max(float((a - b).abs().max()) for a, b in pairs)))
        return result
    finally:
        groups.shut_down()


@pytest.mark.parametrize(
    ("kind", "distributed", "styles"),
    [
        ("adam", False, list(STYLES)),
        ("sgd", False, list(STYLES)[:5]),
        ("adam", True, list(STYLES)[3:6]),
    ],
)
def test_rates_and_weights_are_those_of_an_optimizer_with_the_commands_settings(
    pool: Pool, tmp_path: Path, kind: str, distributed: bool, styles: list[str]
) -> None:
    for found in pool.run(2 if distributed else 1, override, tmp_path, kind, distributed, styles):
        for style, values in found.items():
            for used, wanted, distance in values:
                assert used == pytest.approx(wanted, rel=1e-12), style
                assert distance < 1e-6, (style, values)
