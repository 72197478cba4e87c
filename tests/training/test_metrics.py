"""What a run reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_chatflow.curriculum import BlendPlan
from tests.pool import Pool
from tests.sample import metrics, train


def test_the_same_run_twice_has_the_same_bits(pool: Pool, sample: Path, reference: Path) -> None:
    run = sample / "twice"
    (done,) = pool.run(1, train, sample, "--save", str(run))
    assert done[0] == 0, done
    assert metrics(run) == metrics(reference)


def test_realised_shares_follow_the_curriculum_within_four_samples(reference: Path) -> None:
    plan = BlendPlan.from_json((reference / "plan.json").read_text())
    seen = np.zeros(len(plan.domain_names))
    for record in metrics(reference):
        seen += [record["domains"][name]["samples"] for name in plan.domain_names]
        assert np.abs(seen - plan.integral(record["consumed_samples"])).max() <= 4
    assert seen.sum() == 160 and (seen > 0).all()


def test_the_losses_of_the_domains_add_up_to_the_loss(reference: Path) -> None:
    """Text windows have 64 trained tokens each but for a last one, instruction windows fewer, so
    weights are determined by two equations.
    """
    for record in metrics(reference):
        losses = [d["loss"] for d in record["domains"].values() if d["loss"] is not None]
        assert min(losses) <= record["lm loss"] <= max(losses)
        if record["domains"]["instruct"]["samples"] == 0:
            mean = (
                sum(d["loss"] * d["samples"] for d in record["domains"].values() if d["samples"])
                / record["batch-size"]
            )
            assert abs(mean / record["lm loss"] - 1) < 1e-9


def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_text(
    reference: Path, sample: Path
) -> None:
    """Against the raw text: the held-out English windows are decoded by the library and their bytes
    counted.
    """
    from megatron_chatflow.curriculum import load_curriculum
    from megatron_chatflow.data import open_domains
    from megatron_chatflow.tokenizer import load_tokenizer
    from tests.sample import QUICKSTART

    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])["validation"][
        "en"
    ]
    tokenizer = load_tokenizer(
        "SentencePieceTokenizer", tokenizer_model=str(QUICKSTART / "tokenizer.model")
    )
    domain = open_domains(
        load_curriculum(sample / "curriculum.yaml"),
        seq_length=64,
        seed=1,
        split="900,100,0",
        subset="valid",
    )["en"]
    labels = domain.read_window(np.arange(16))["labels"]
    size = sum(len(tokenizer.decode([tokenizer.eod + 1, *row.tolist()]).encode()) for row in labels)
    assert (
        abs(last["bits_per_byte"] / (last["loss"] * last["tokens"] / math.log(2) / size) - 1) < 0.02
    )


def test_tensorboard_has_megatrons_tags_and_the_domains(reference: Path) -> None:
    log = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    tags = set(log.Tags()["scalars"])
    wanted = {
        "lm loss",
        "lm loss validation",
        "learning-rate",
        "grad-norm",
        "iteration-time",
        "throughput",
        "batch-size",
    }
    wanted |= {
        f"domain/{name}/{key}"
        for name in ("en", "zh", "en-zh", "instruct")
        for key in ("loss", "share", "share_target", "tokens", "epoch")
    }
    wanted |= {
        f"validation/{name}/{key}"
        for name in ("en", "zh", "en-zh", "instruct")
        for key in ("loss", "bits_per_byte")
    }
    assert wanted <= tags
    losses = {point.step: point.value for point in log.Scalars("lm loss")}
    assert losses.keys() == set(range(1, 21))
    assert all(abs(losses[r["iteration"]] / r["lm loss"] - 1) < 1e-6 for r in metrics(reference))


def test_the_console_line_is_megatrons_with_tokens_per_second(pool: Pool, sample: Path) -> None:
    ((code, out, _),) = pool.run(
        1, train, sample, "--train-iters", "5", "--lr-decay-iters", "20", "--log-throughput"
    )
    assert code == 0
    line = next(line for line in out.splitlines() if "iteration        5/       5" in line)
    parts = ["consumed samples:           40 |", "elapsed time per iteration (ms):"]
    parts += ["throughput per GPU (TFLOP/s/GPU):", "learning rate: ", "lm loss: "]
    parts += [
        "global batch size:     8 |",
        "grad norm: ",
        "number of skipped iterations:   0 |",
        "number of nan iterations:   0 |",
    ]
    for part in [*parts, "tokens per second: "]:
        assert part in line
    assert "100.0% done | time left 0:00:00 | stage english | en " in out
    assert "nothing was saved (no --save)" in out


def test_training_learns(reference: Path) -> None:
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    checks = [r["validation"] for r in records if "validation" in r]
    assert len(checks) == 3
    for name in ("en", "zh", "en-zh", "instruct"):
        assert checks[-1][name]["loss"] < checks[0][name]["loss"] - 0.5


def test_conversations_that_are_cut_are_counted_on_the_console(pool: Pool, sample: Path) -> None:
    """Against the index itself: an instruction window of S positions takes S + 1 tokens of a
    conversation.
    """
    from megatron_chatflow.data import IndexedDataset

    corpus = IndexedDataset(sample / "instruct_document")
    training = range(round(0.9 * corpus.num_documents))
    longer = sum(len(corpus.document(i)) > 65 for i in training)
    ((code, out, _),) = pool.run(1, train, sample, "--train-iters", "1", "--lr-warmup-iters", "0")
    assert code == 0 and longer > 10
    assert (
        f"have no token to train on and are left out, {longer} are cut, and 77.1% of the "
        f"tokens to train on are lost"
    ) in out
