"""The same run on every layout: same samples, same losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import largest_difference, metrics, train

TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP2": (2, TP),
    "PP2": (2, PP),
    "DP2": (2, []),
    "TP2 with sequence parallelism": (2, [*TP, "--sequence-parallel"]),
    "PP2 interleaved": (2, [*PP, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "DP2 with the distributed optimizer and overlap": (
        2,
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    ),
    "TP2 with another padding of the vocabulary": (
        2,
        [*TP, "--make-vocab-size-divisible-by", "1500"],
    ),
    "PP2 with a smaller first stage": (2, [*PP, "--decoder-first-pipeline-num-layers", "1"]),
    "PP2 by a layout, interleaved": (2, [*PP, "--pipeline-model-parallel-layout", "E|t,t|t|tL"]),
    "TP4 over two key heads": (4, ["--tensor-model-parallel-size", "4"]),
    "TP2 x PP2": (4, [*TP, *PP]),
}


FAST = {
    "TP2 with another padding of the vocabulary",
    "PP2 by a layout, interleaved",
    "DP2 with the distributed optimizer and overlap",
}
"""Each adds to a plain layout; the others are marked slow."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_layout_trains_as_one_process_does(
    pool: Pool, sample: Path, reference: Path, name: str
) -> None:
    world, flags = LAYOUTS[name]
    run = sample / name.replace(" ", "-")
    for code, out, err in pool.run(
        world, train, sample, "--save", str(run), "--eval-interval", "10", *flags
    ):
        assert code == 0, (out, err)
    ours, one = metrics(run), metrics(reference)
    assert len(ours) == 20
    assert largest_difference(ours, one) < 1e-5
    norms = [abs(a["grad-norm"] / b["grad-norm"] - 1) for a, b in zip(ours, one, strict=True)]
    assert (
        max(norms[:10]) < 1e-5
    )  # beyond, rounding of the norm itself (float32, one shard at a time) has had time to grow
    for a, b in zip(ours, one, strict=True):
        assert {n: d["samples"] for n, d in a["domains"].items()} == {
            n: d["samples"] for n, d in b["domains"].items()
        }


def test_bf16_follows_fp32(pool: Pool, sample: Path, reference: Path) -> None:
    run = sample / "bf16"
    for code, out, err in pool.run(2, train, sample, "--save", str(run), "--bf16", *TP):
        assert code == 0, (out, err)
    assert 0 < largest_difference(metrics(run), metrics(reference)) < 5e-3


def test_gradient_accumulation_changes_nothing_but_rounding(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run = sample / "accumulated"
    (done,) = pool.run(1, train, sample, "--save", str(run), "--micro-batch-size", "8")
    assert done[0] == 0, done
    assert largest_difference(metrics(run), metrics(reference)) < 1e-5


GPT2 = (
    "--position-embedding-type learned_absolute --normalization LayerNorm --no-swiglu "
    "--add-bias-linear --no-untie-embeddings-and-output-weights"
)
QWEN = (
    "--qk-layernorm --add-qkv-bias --no-untie-embeddings-and-output-weights --rotary-percent "
    "0.5 --use-rope-scaling"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt-2", GPT2 + " --reset-position-ids --reset-attention-mask"), ("qwen", QWEN)],
)
def test_other_architectures_train_alike_on_every_layout(
    pool: Pool, sample: Path, name: str, words: str
) -> None:
    """Tied embeddings live on the first and the last pipeline rank; biases and head norms are
    sharded or replicated.
    """
    flags = [*words.split(), "--train-iters", "6", "--lr-decay-iters", "20"]
    runs = []
    for world, layout in ((1, []), (4, [*TP, *PP]), (2, [*TP, "--sequence-parallel"])):
        run = sample / f"{name}-{len(runs)}"
        for code, out, err in pool.run(world, train, sample, "--save", str(run), *flags, *layout):
            assert code == 0, (out, err)
        runs.append(metrics(run))
    assert max(largest_difference(run, runs[0]) for run in runs[1:]) < 1e-5
    assert runs[0][-1]["lm loss"] < runs[0][0]["lm loss"] - 0.1
