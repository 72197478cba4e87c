"""Computing activations again changes memory and time, and no bit of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import metrics, train

TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SHORT = [
    "--train-iters",
    "3",
    "--lr-decay-iters",
    "20",
    "--hidden-dropout",
    "0.1",
    "--attention-dropout",
    "0.1",
]
FULL = ["--recompute-granularity", "full", "--recompute-method"]
WAYS = {
    "uniform": [*FULL, "uniform", "--recompute-num-layers", "2"],
    "block": [*FULL, "block", "--recompute-num-layers", "1"],
    "attention": ["--recompute-granularity", "selective"],
    "attention and feed-forward": [
        "--recompute-granularity",
        "selective",
        "--recompute-modules",
        "core_attn",
        "mlp",
    ],
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "bf16": (1, ["--bf16"]),
    "TP2 SP": (2, [*TP, "--sequence-parallel"]),
    "FP8": (1, ["--bf16", "--fp8-format", "e4m3", "--fp8-recipe", "blockwise"]),
    "PP2": (2, PP),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name != "one" else ()) for name in LAYOUTS],
)
def test_recomputation_changes_no_bit(pool: Pool, sample: Path, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    runs = []
    for name, words in {"plain": [], **WAYS}.items():
        run = sample / "recompute" / f"{layout}-{name}".replace(" ", "-")
        for code, out, err in pool.run(
            world, train, sample, "--save", str(run), "--no-save-optim", *SHORT, *flags, *words
        ):
            assert code == 0, (name, out, err)
        runs.append(metrics(run))
    assert all(run == runs[0] for run in runs[1:])


def test_norms_are_not_computed_again_without_transformer_engine(pool: Pool, sample: Path) -> None:
    ((code, _, err),) = pool.run(
        1, train, sample, "--recompute-granularity", "selective", "--recompute-modules", "layernorm"
    )
    assert code == 2 and "recompute_modules layernorm needs Transformer Engine" in err, err


def test_delayed_scaling_refuses_to_count_a_forward_pass_twice(pool: Pool, sample: Path) -> None:
    fp8 = ["--bf16", "--fp8-format", "hybrid"]
    ((code, _, err),) = pool.run(
        1, train, sample, *SHORT, *fp8, *WAYS["uniform"]
    )  # before anything is written
    assert code == 2 and "does not go with fp8_recipe delayed" in err, err
    ((code, out, err),) = pool.run(1, train, sample, *SHORT, *fp8, *WAYS["attention"])
    assert code == 0, (out, err)
