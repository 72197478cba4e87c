"""Every layout on up to eight ranks against one process, as a table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import largest_difference, metrics, train


def _flags(tp: int = 1, pp: int = 1, chunk: int = 0, *others: str) -> list[str]:
    flags = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    return (
        flags
        + (["--num-layers-per-virtual-pipeline-stage", str(chunk)] if chunk else [])
        + list(others)
    )


SP, ZERO = "--sequence-parallel", "--use-distributed-optimizer"
OVERLAP = (ZERO, "--overlap-grad-reduce", "--overlap-param-gather")
ACCOUNTED = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP2": (2, _flags(2)),
    "TP2 SP": (2, _flags(2, 1, 0, SP)),
    "TP4": (4, _flags(4)),
    "PP2": (2, _flags(1, 2)),
    "PP4": (4, _flags(1, 4)),
    "PP2 interleaved": (2, _flags(1, 2, 1)),
    "DP2": (2, _flags()),
    "DP4": (4, _flags()),
    "DP2 distributed optimizer": (2, _flags(1, 1, 0, ZERO)),
    "DP4 distributed optimizer, overlapped": (4, _flags(1, 1, 0, *OVERLAP)),
    "TP2 PP2": (4, _flags(2, 2)),
    "TP2 PP2 interleaved SP": (4, _flags(2, 2, 1, SP)),
    "TP2 DP2 distributed optimizer": (4, _flags(2, 1, 0, ZERO)),
    "PP2 DP2": (4, _flags(1, 2)),
    "PP2, 3 layers in the first stage": (
        2,
        _flags(1, 2, 0, "--decoder-first-pipeline-num-layers", "3"),
    ),
    "PP2, 3 layers in the last stage": (
        2,
        _flags(1, 2, 0, "--decoder-last-pipeline-num-layers", "3"),
    ),
    "TP2 PP4, embedding and loss on their own": (
        8,
        _flags(2, 4, 0, "--pipeline-model-parallel-layout", "E|tt|tt|L"),
    ),
    "PP2, layout, interleaved": (
        2,
        _flags(1, 2, 0, "--pipeline-model-parallel-layout", "E|tt|t|tL"),
    ),
    "PP3, embedding and loss accounted for": (3, _flags(1, 3, 0, *ACCOUNTED)),
    "PP2 interleaved, embedding and loss accounted for, distributed optimizer": (
        4,
        _flags(1, 2, 1, ZERO, *ACCOUNTED),
    ),
    "TP2 PP2 DP2": (8, _flags(2, 2)),
    "TP2 PP2 DP2 SP distributed optimizer": (8, _flags(2, 2, 0, SP, ZERO)),
    "TP4 PP2 SP": (8, _flags(4, 2, 0, SP)),
}
SHAPE = ["--num-query-groups", "4", "--micro-batch-size", "1"]
RATE = ["--train-iters", "10", "--lr-decay-iters", "20", "--lr-warmup-iters", "2"]
LOWER = ["--lr", "3e-4", "--min-lr", "1e-4"]
"""For bfloat16: at the ten times higher rate of the settings it alone moves the gradient norm of
one process by two percent in ten iterations.
"""


def run(pool: Pool, sample: Path, name: str, world: int, flags: list[str]) -> Path:
    folder = sample / "table" / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    for code, out, err in pool.run(
        world, train, sample, "--save", str(folder), *SHAPE, *RATE, *flags
    ):
        assert code == 0, (name, out, err)
    return folder


def largest_distance(a: Path, b: Path) -> float:
    """Between the weights of two checkpoints, relative to the largest element of each tensor."""
    from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader

    ours, theirs = CheckpointReader(a), CheckpointReader(b)
    weights = [key for key in theirs.tensors if not key.startswith("optimizer.")]
    assert len(weights) > 8 and set(weights) <= set(ours.tensors)
    pairs = [(ours.tensor(key), theirs.tensor(key)) for key in weights]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [([], 1e-5), (["--bf16", *LOWER], 2e-3)])
def test_every_layout_gives_the_loss_and_gradient_norm_of_one_process(
    pool: Pool, sample: Path, precision: list[str], bound: float, capsys: pytest.CaptureFixture[str]
) -> None:
    one = metrics(run(pool, sample, f"one {len(precision)}", 1, precision))
    rows = []
    for name, (world, flags) in LAYOUTS.items():
        here = metrics(run(pool, sample, f"{name} {len(precision)}", world, [*flags, *precision]))
        norm = max(abs(a["grad-norm"] / b["grad-norm"] - 1) for a, b in zip(here, one, strict=True))
        rows.append((name, world, largest_difference(here, one), norm))
    with capsys.disabled():
        print(
            f"\n{'bf16' if precision else 'float32'}, 10 iterations{'':<22} ranks  lm loss  "
            f"grad norm   (largest relative difference)"
        )
        for name, world, loss, norm in rows:
            print(f"{name:<45} {world:>5}  {loss:.1e}    {norm:.1e}")
    assert len(rows) >= 14
    assert all(loss < bound for _, _, loss, _ in rows), rows
    assert all(norm < bound for *_, norm in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_fewer_key_heads_than_tensor_ranks_give_the_loss_and_weights_of_one_process(
    pool: Pool, sample: Path, groups: int
) -> None:
    """Stochastic gradient descent: Adam would divide gradients of rounding's size by their own
    size.
    """
    heads = [
        "--num-query-groups",
        str(groups),
        "--optimizer",
        "sgd",
        "--lr",
        "0.3",
        "--min-lr",
        "0.1",
    ]
    one = run(pool, sample, f"one {groups}", 1, heads)
    for name, tp, others in (("TP2", 2, ()), ("TP4", 4, ()), ("TP4 SP", 4, (SP,))):
        here = run(pool, sample, f"{name} {groups}", tp, [*_flags(tp, 1, 0, *others), *heads])
        assert largest_difference(metrics(here), metrics(one)) < 1e-5, name
        (apart,) = pool.run(1, largest_distance, here / "iter_0000010", one / "iter_0000010")
        assert apart < 1e-5, name
