"""Faults in numbers: iterations that cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_chatflow.training.metrics import SpikeDetector
from tests.pool import Pool
from tests.sample import metrics, train

TP = ["--tensor-model-parallel-size", "2"]
SHORT = ["--train-iters", "6", "--lr-decay-iters", "20"]


def train_with_bad_samples(
    folder: Path, first: int, last: int, *words: str
) -> tuple[int, str, str]:
    """`train`; a label of each iteration that begins in first .. last counts infinitely."""
    from megatron_chatflow.training import train_loop

    class Spoilt(train_loop.BlendDataLoader):
        def iteration(self, start: int, global_batch_size: int) -> list:
            batches = super().iteration(start, global_batch_size)
            if first <= start <= last:
                batches[0]["loss_mask"][0, 3] = np.inf
            return batches

    with mock.patch.object(train_loop, "BlendDataLoader", Spoilt):
        return train(folder, *words)


def test_an_iteration_without_a_finite_loss_is_as_if_it_were_skipped(
    pool: Pool, sample: Path
) -> None:
    from megatron_chatflow.cli.compare import differences

    bad, skipped = sample / "one bad", sample / "skipped"
    results = pool.run(
        2,
        train_with_bad_samples,
        sample,
        16,
        16,
        "--save",
        str(bad),
        *SHORT,
        *TP,
        "--ema-decay",
        "0.9",
    )
    assert {code for code, _, _ in results} == {0}, results
    out = results[0][1]
    assert (
        "the loss is not finite at iteration 3, samples 16 to 23: skipped, the weights "
        "stay; see what they hold with"
    ) in out
    assert (
        "chatflow locate --iteration 3" in out
        and "number of skipped iterations:   1 | number of nan iterations:   1 |" in out
    )
    results = pool.run(
        2,
        train,
        sample,
        "--save",
        str(skipped),
        *SHORT,
        *TP,
        "--ema-decay",
        "0.9",
        "--iterations-to-skip",
        "3",
        "40",
    )
    assert {code for code, _, _ in results} == {0}, results
    assert "number of skipped iterations:   1 | number of nan iterations:   0 |" in results[0][1]
    a, b = metrics(bad), metrics(skipped)
    assert (a[2]["lm loss"], a[2]["skipped"], b[2]["skipped"]) == (
        None,
        "the loss is not finite",
        "iterations_to_skip",
    )
    assert [r for r in a if "skipped" not in r] == [r for r in b if "skipped" not in r] and len(
        a
    ) == 6
    assert not any("iter_" in sentence for sentence in differences(bad, skipped, None))


def test_more_of_them_in_a_row_than_allowed_stop_the_run(pool: Pool, sample: Path) -> None:
    run = sample / "bad forever"
    words = ["--save", str(run), "--save-interval", "1", "--max-nonfinite-iterations", "2"]
    ((code, out, err),) = pool.run(1, train_with_bad_samples, sample, 16, 1000, *words, *SHORT)
    assert code == 1 and out.count("skipped, the weights stay") == 2
    assert (
        "the loss is not finite at iteration 5, samples 32 to 39; see what they hold with "
        "`chatflow locate --iteration 5`"
    ) in err
    assert "the 2 iterations before it were skipped for the same" in err
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def train_without_loss(folder: Path, first: int, last: int, *words: str) -> tuple[int, str, str]:
    """`train`; no token of the iterations that begin in first .. last has loss."""
    from megatron_chatflow.training import train_loop

    class Untrained(train_loop.BlendDataLoader):
        def iteration(self, start: int, global_batch_size: int) -> list:
            batches = super().iteration(start, global_batch_size)
            for batch in batches:
                batch["loss_mask"] *= not first <= start <= last
            return batches

    with mock.patch.object(train_loop, "BlendDataLoader", Untrained):
        return train(folder, *words)


def test_an_iteration_without_a_token_with_loss_takes_no_step_and_has_no_loss(
    pool: Pool, sample: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_chatflow.cli.compare import differences

    empty, skipped = sample / "no loss", sample / "passed over"
    words = [*SHORT, "--log-interval", "1", "--weight-decay", "0.1"]
    results = pool.run(2, train_without_loss, sample, 16, 16, "--save", str(empty), *words)
    assert {code for code, _, _ in results} == {0}, results
    out = results[0][1]
    assert (
        "no token has loss at iteration 3, samples 16 to 23: skipped, the weights stay; see "
        "what they hold with"
    ) in out
    line = next(line for line in out.splitlines() if "iteration        3/       6" in line)
    assert (
        "| lm loss: - |" in line
        and "| grad norm: - |" in line
        and "skipped iterations:   1 | number of nan iterations:   0 |" in line
    )
    record = metrics(empty)[2]
    assert (record["lm loss"], record["grad-norm"], record["skipped"]) == (
        None,
        None,
        "no token has loss",
    )
    log = EventAccumulator(str(empty / "tensorboard"))
    log.Reload()
    assert [point.step for point in log.Scalars("lm loss")] == [1, 2, 4, 5, 6]
    results = pool.run(
        2, train, sample, "--save", str(skipped), *words, "--iterations-to-skip", "3"
    )
    assert {code for code, _, _ in results} == {0}, results
    assert not any("iter_" in sentence for sentence in differences(empty, skipped, None))


def test_a_run_in_which_no_token_has_loss_stops(pool: Pool, sample: Path) -> None:
    ((code, out, err),) = pool.run(
        1, train_without_loss, sample, 0, 1000, *SHORT, "--no-check-for-nan-in-loss-and-grad"
    )
    assert code == 1 and out.count("skipped, the weights stay") == 3
    assert "no token has loss at iteration 4, samples 24 to 31" in err


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_leaves_the_weights(pool: Pool, sample: Path) -> None:
    ((code, out, err),) = pool.run(
        1,
        train,
        sample,
        *SHORT,
        "--lr",
        "1e36",
        "--lr-warmup-iters",
        "0",
        "--max-nonfinite-iterations",
        "1",
    )
    assert code == 1 and "not finite at iteration" in out and "not finite at iteration" in err, (
        out,
        err,
    )


def test_metrics_hold_valid_json_whatever_the_loss(sample: Path) -> None:
    text = (sample / "one bad" / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


def test_a_loss_far_above_those_before_is_a_spike_and_noise_is_not() -> None:
    random = np.random.default_rng(3)
    for scale in (0.01, 0.1):
        watch = SpikeDetector()
        falling = 4 * np.exp(-np.arange(500) / 200) + 2 + random.normal(0, scale, 500)
        assert [i for i, loss in enumerate(falling) if watch.observe(loss) is not None] == []
        assert watch.observe(falling[-1] + 1.5) is not None
