"""Checkpoints are read by other forms of the optimizer: distributed or not, in any precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_chatflow.checkpoint.optimizer_state import OptimizerLayout, ask_for
from tests.pool import Pool
from tests.sample import largest_difference, metrics, train

LENGTH = ["--train-iters", "6", "--lr-decay-iters", "20"]
FORMS: dict[str, list[str]] = {
    "fp32": [],
    "distributed": ["--use-distributed-optimizer"],
    "bf16": ["--bf16"],
    "bf16-distributed": ["--bf16", "--use-distributed-optimizer"],
}


def go(pool: Pool, sample: Path, run: Path, form: str, *words: str) -> Path:
    ((code, out, err),) = pool.run(
        1, train, sample, "--save", str(run), *LENGTH, *FORMS[form], *words
    )
    assert code == 0, (out, err)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("before", FORMS)
def test_a_run_continues_with_another_form(
    pool: Pool, sample: Path, tmp_path: Path, before: str
) -> None:
    uninterrupted = metrics(go(pool, sample, tmp_path / "uninterrupted", before))
    saved = go(pool, sample, tmp_path / "saved", before, "--exit-interval", "3")
    for after in FORMS:
        run = tmp_path / after
        shutil.copytree(saved, run)
        records = metrics(go(pool, sample, run, after, "--load", str(run)))
        assert [r["iteration"] for r in records] == list(range(1, 7))
        same_precision = ("bf16" in before) == (
            "bf16" in after
        )  # the norm that clips is then added up in another order, and nothing else differs
        assert largest_difference(records, uninterrupted) < (1e-7 if same_precision else 2e-3)


def test_a_run_in_bf16_continues_in_float32(pool: Pool, sample: Path, tmp_path: Path) -> None:
    run = go(pool, sample, tmp_path / "run", "bf16", "--exit-interval", "1")
    go(pool, sample, run, "fp32", "--load", str(run), "--exit-interval", "2")
    assert [record["iteration"] for record in metrics(run)] == [1, 2]


def tensors(*keys: str) -> dict[str, ShardedTensor]:
    import torch

    return {key: ShardedTensor.from_rank_offsets(key, torch.zeros(2)) for key in keys}


@pytest.mark.parametrize("have", OptimizerLayout)
@pytest.mark.parametrize("want", OptimizerLayout)
def test_the_float32_parameters_are_asked_for_by_the_name_that_the_checkpoint_has(
    have: OptimizerLayout, want: OptimizerLayout
) -> None:
    """Tensors that are not optimizer parameters keep their names, and so do the moments."""
    weights = tensors("layer.weight", "layer.buffer")
    main = {} if want == OptimizerLayout.FP32 else tensors(f"{want.value}layer.weight")
    state = main | tensors(
        "optimizer.state.exp_avg.layer.weight", "optimizer.state.exp_avg_sq.layer.weight"
    )
    ask_for(weights, state, have, want)
    found = {entry.key for entry in (*weights.values(), *state.values())}
    moments = {"optimizer.state.exp_avg.layer.weight", "optimizer.state.exp_avg_sq.layer.weight"}
    assert found == {
        "layer.buffer",
        f"{have.value}layer.weight",
        *([] if want == OptimizerLayout.FP32 else ["layer.weight"]),
        *moments,
    }


DISTRIBUTED = ["--use-distributed-optimizer"]
SGD = ["--optimizer", "sgd", "--sgd-momentum", "0.5"]


@pytest.mark.parametrize(
    ("saved", "resumed", "more"),
    [
        ((1, []), (1, []), []),
        ((2, DISTRIBUTED), (2, DISTRIBUTED), []),
        pytest.param((1, []), (1, []), ["--bf16"], marks=pytest.mark.slow),
        pytest.param((1, []), (1, []), SGD, marks=pytest.mark.slow),
        pytest.param((1, []), (2, DISTRIBUTED), [], marks=pytest.mark.slow),
        pytest.param((2, DISTRIBUTED), (1, []), [], marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_before_the_first_step_of_the_optimizer_is_resumed(
    saved: tuple[int, list[str]],
    resumed: tuple[int, list[str]],
    more: list[str],
    pool: Pool,
    sample: Path,
    tmp_path: Path,
) -> None:
    words = ["--train-iters", "4", "--iterations-to-skip", "1", *more]
    entire, run = str(tmp_path / "entire"), str(tmp_path / "run")
    first = pool.run(resumed[0], train, sample, *words, *resumed[1], "--save", entire)
    assert {code for code, _, _ in first} == {0}, first
    words += ["--save", run, "--load", run]
    results = pool.run(saved[0], train, sample, *words, *saved[1], "--exit-interval", "1")
    assert {code for code, _, _ in results} <= {0, 3}, results
    last = pool.run(resumed[0], train, sample, *words, *resumed[1])
    assert {code for code, _, _ in last} == {0}, last
    assert "resuming after iteration 1" in last[0][1]
    found, wanted = metrics(tmp_path / "run"), metrics(tmp_path / "entire")
    assert found[0]["lm loss"] is None and len(found) == 4
    assert found == wanted if saved == resumed else largest_difference(found[1:], wanted[1:]) < 1e-6
