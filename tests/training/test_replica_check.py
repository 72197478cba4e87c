"""Data-parallel replicas of the weights that differ, or are not finite, stop the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.pool import Pool
from tests.sample import train

EVERY = "--check-weight-hash-across-dp-replicas-interval"
SHORT = ["--train-iters", "4", "--lr-decay-iters", "20", "--save-interval", "1"]


@contextlib.contextmanager
def changed(rank: int, iteration: int, row: int, value: float) -> Iterator[None]:
    """Inside, one number in the embedding of a rank changes after an iteration."""
    import torch.distributed as dist

    from megatron_chatflow.training.metrics_callback import MetricsCallback
    from megatron_chatflow.training.train_state import TrainState

    original = MetricsCallback.on_step_end

    def on_step_end(self: MetricsCallback, run: TrainState, *words: object) -> None:
        original(self, run, *words)
        if run.iteration == iteration and dist.get_rank() == rank:
            weights = dict(run.model[0].named_parameters())
            name = next(name for name in weights if "word_embeddings" in name)
            weights[name].data[row, 3] = value

    with mock.patch.object(MetricsCallback, "on_step_end", on_step_end):
        yield


def train_with_changed_weight(
    folder: Path, change: tuple[int, int, int, float], *words: str
) -> tuple[int, str, str]:
    with changed(*change):
        return train(folder, *words)


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]])
def test_replicas_that_differ_stop_the_run_before_it_is_saved(
    pool: Pool, sample: Path, tmp_path: Path, optimizer: list[str]
) -> None:
    run = tmp_path / "run"
    words = [*SHORT, *optimizer, "--save", str(run), EVERY, "1"]
    results = pool.run(2, train_with_changed_weight, sample, (1, 2, 7, 0.5), *words)
    assert [code for code, _, _ in results] == [1, 1], results
    err = results[0][2]
    assert (
        "after iteration 2 the data-parallel replicas differ or are not finite: rank 1 on " in err
    )
    assert "has other weights than rank 0: " in err and "word_embeddings.weight;" in err
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "1\n"


def test_a_number_that_is_not_finite_is_named_though_no_loss_shows_it(
    pool: Pool, sample: Path
) -> None:
    """A row that no token uses: the loss stays finite."""
    nan = (0, 2, 4095, float("nan"))
    ((code, _, err),) = pool.run(1, train_with_changed_weight, sample, nan, *SHORT, EVERY, "2")
    assert code == 1 and "has weights that are not finite: " in err and "iteration 2 " in err, err


def test_replicas_that_agree_train_on(pool: Pool, sample: Path) -> None:
    words = [*SHORT, "--use-distributed-optimizer", "--overlap-grad-reduce"]
    words += ["--overlap-param-gather", EVERY, "1"]
    results = pool.run(2, train, sample, *words)
    assert [code for code, _, _ in results] == [0, 0], results
