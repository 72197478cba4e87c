"""A checkpoint of any layout continues in any other, optimizer state included."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import largest_difference, metrics, train

PP = ["--pipeline-model-parallel-size", "2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "TP2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP2": (2, PP),
    "VPP": (2, [*PP, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "PP2 uneven": (2, [*PP, "--decoder-first-pipeline-num-layers", "1"]),
    "PP2 layout": (2, [*PP, "--pipeline-model-parallel-layout", "E|ttt|t|L"]),
    "TP4 over two key heads": (4, ["--tensor-model-parallel-size", "4"]),
    "DP2 distributed optimizer": (2, ["--use-distributed-optimizer"]),
}
LENGTH = ["--train-iters", "10", "--lr-decay-iters", "20"]


def go(pool: Pool, sample: Path, run: Path, layout: str, *words: str) -> Path:
    world, flags = LAYOUTS[layout]
    for code, out, err in pool.run(
        world, train, sample, "--save", str(run), *LENGTH, *flags, *words
    ):
        assert code == 0, (layout, out, err)
    return run


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, sample: Path) -> Path:
    return go(pool, sample, sample / "matrix" / "uninterrupted", "one")


@pytest.fixture(scope="module", params=[name for name in LAYOUTS if name != "one"])
def saved(request: pytest.FixtureRequest, pool: Pool, sample: Path) -> Path:
    """A run stopped after 5 of 10 iterations under one of the layouts."""
    return go(
        pool,
        sample,
        sample / "matrix" / request.param.replace(" ", "-"),
        request.param,
        "--exit-interval",
        "5",
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_continues_in_another_layout_as_if_never_stopped(
    pool: Pool, sample: Path, uninterrupted: Path, saved: Path, layout: str
) -> None:
    run = saved.with_name(f"{saved.name}-to-{layout.replace(' ', '-')}")
    shutil.copytree(saved, run)
    go(pool, sample, run, layout, "--load", str(run))
    records = metrics(run)
    assert [r["iteration"] for r in records] == list(range(1, 11))
    assert largest_difference(records, metrics(uninterrupted)) < 1e-5
    norms = [
        abs(a["grad-norm"] / b["grad-norm"] - 1)
        for a, b in zip(records, metrics(uninterrupted), strict=True)
    ]
    assert max(norms) < 1e-5, norms
