"""A run that was stopped and resumed is the run that was never stopped."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from tests.pool import Pool
from tests.sample import CURRICULUM, largest_difference, metrics, train

TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def ok(results: list[tuple[int, str, str]]) -> str:
    for code, out, err in results:
        assert code == 0, (out, err)
    return results[0][1]


def half(reference: Path, name: str) -> Path:
    """A copy of the reference run at iteration 10, as a kill would leave it: with
    lines of iterations that were not saved.
    """
    run = reference.with_name(name)
    shutil.copytree(reference, run)
    shutil.rmtree(run / "iter_0000020")
    (run / "latest_checkpointed_iteration.txt").write_text("10\n")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:16]) + lines[16][: len(lines[16]) // 2])
    return run


def test_resuming_gives_the_bits_of_a_run_never_stopped(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run = half(reference, "resumed")
    out = ok(
        pool.run(1, train, sample, "--save", str(run), "--load", str(run), "--eval-interval", "10")
    )
    assert "resuming after iteration 10" in out
    assert metrics(run) == metrics(reference)
    texts = [
        [line for line in (r / "metrics.jsonl").read_text().splitlines() if '"validation"' in line]
        for r in (run, reference)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 3


def test_bad_lines_of_the_metrics_do_not_stop_a_resume(
    pool: Pool, sample: Path, reference: Path
) -> None:
    """Half a line, zeros, invalid UTF-8, a comment and a number, in three places."""
    run = half(reference, "bad metrics")
    path, bad = (
        run / "metrics.jsonl",
        [b'{"iteration": 5, "consu\n', b"\0" * 99 + b"\n", b"\xff\n", b"# hm\n", b"17\n"],
    )
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*bad, *lines[:5], *bad, *lines[5:-1], *bad, lines[-1]]))
    out = ok(
        pool.run(1, train, sample, "--save", str(run), "--load", str(run), "--exit-interval", "12")
    )
    (warning,) = [
        line for line in out.splitlines() if "metrics.jsonl" in line and "warning" in line
    ]
    assert "15 lines are not records of this run; moved to metrics.jsonl.bad" in warning
    assert (run / "metrics.jsonl.bad").read_bytes() == b"".join(bad * 3)
    assert metrics(run) == metrics(reference)[:12]


@pytest.mark.parametrize(
    ("name", "world", "flags"),
    [
        ("TP2", 2, TP),
        ("PP2", 2, PP),
        ("DP2", 2, []),
        pytest.param("TP2PP2", 4, [*TP, *PP], marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumes_in_another_layout(
    pool: Pool, sample: Path, reference: Path, name: str, world: int, flags: list[str]
) -> None:
    run = half(reference, f"into-{name}")
    ok(pool.run(world, train, sample, "--save", str(run), "--load", str(run), *flags))
    assert largest_difference(metrics(run), metrics(reference)) < 1e-5


@pytest.mark.slow
def test_the_distributed_optimizers_state_moves_between_layouts(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run, flag = sample / "distributed-optimizer", "--use-distributed-optimizer"
    ok(pool.run(2, train, sample, "--save", str(run), "--exit-interval", "10", flag))
    ok(pool.run(2, train, sample, "--save", str(run), "--load", str(run), *TP, flag))
    assert largest_difference(metrics(run), metrics(reference)) < 1e-5


@pytest.mark.slow
def test_dropout_resumes_to_the_same_bits(pool: Pool, sample: Path) -> None:
    flags = [
        "--hidden-dropout",
        "0.1",
        "--attention-dropout",
        "0.1",
        "--train-iters",
        "6",
        "--lr-decay-iters",
        "20",
    ]
    uninterrupted, parts = sample / "dropout", sample / "dropout-parts"
    ok(pool.run(2, train, sample, "--save", str(uninterrupted), *flags, *TP))
    ok(pool.run(2, train, sample, "--save", str(parts), "--exit-interval", "3", *flags, *TP))
    ok(pool.run(2, train, sample, "--save", str(parts), "--load", str(parts), *flags, *TP))
    assert metrics(parts) == metrics(uninterrupted)


@pytest.mark.parametrize(
    ("name", "world", "extra"),
    [
        ("one", 1, []),
        pytest.param("distributed", 2, ["--use-distributed-optimizer"], marks=pytest.mark.slow),
    ],
)
def test_bf16_resumes_to_the_same_bits(
    pool: Pool, sample: Path, name: str, world: int, extra: list[str]
) -> None:
    flags = ["--bf16", "--train-iters", "6", "--lr-decay-iters", "20", *extra]
    uninterrupted, parts = sample / f"bf16-uninterrupted-{name}", sample / f"bf16-parts-{name}"
    ok(pool.run(world, train, sample, "--save", str(uninterrupted), *flags))
    ok(pool.run(world, train, sample, "--save", str(parts), "--exit-interval", "3", *flags))
    ok(pool.run(world, train, sample, "--save", str(parts), "--load", str(parts), *flags))
    assert metrics(parts) == metrics(uninterrupted)


def test_the_batch_ramp_up_resumes_to_the_same_bits(pool: Pool, sample: Path) -> None:
    flags = [
        "--train-samples",
        "64",
        "--rampup-batch-size",
        "4",
        "4",
        "24",
        "--micro-batch-size",
        "1",
    ]
    folder = sample / "ramp"
    folder.mkdir()
    settings = yaml.safe_load((sample / "run.yaml").read_text())
    del settings["training"]["train_iters"]
    settings["data"]["curriculum"] = str(sample / "curriculum.yaml")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    uninterrupted, parts = folder / "uninterrupted", folder / "parts"
    ok(pool.run(1, train, folder, "--save", str(uninterrupted), *flags))
    ok(pool.run(1, train, folder, "--save", str(parts), "--exit-interval", "4", *flags))
    ok(pool.run(2, train, folder, "--save", str(parts), "--load", str(parts), *flags))
    assert [r["batch-size"] for r in metrics(uninterrupted)][:3] == [4, 4, 4] and metrics(
        uninterrupted
    )[-1]["batch-size"] == 8
    assert largest_difference(metrics(parts), metrics(uninterrupted)) < 1e-5


def test_ckpt_step_loads_an_earlier_checkpoint(pool: Pool, sample: Path, reference: Path) -> None:
    run = sample / "ckpt-step"
    out = ok(
        pool.run(
            1, train, sample, "--save", str(run), "--load", str(reference), "--ckpt-step", "10"
        )
    )
    assert "iter_0000010" in out
    assert metrics(run) == [r for r in metrics(reference) if r["iteration"] > 10]


def test_finetune_takes_the_weights_and_starts_the_curriculum_from_scratch(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run = sample / "finetune"
    ok(
        pool.run(
            1,
            train,
            sample,
            "--save",
            str(run),
            "--load",
            str(reference),
            "--finetune",
            "--train-iters",
            "3",
            "--eval-interval",
            "3",
        )
    )
    records = metrics(run)
    assert records[0]["samples"] == [0, 8] and records[0]["learning-rate"] == 0.0
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["iteration"] == 0 and first["validation"] == last["validation"]


def test_a_file_that_has_another_past_is_refused_and_can_be_amended(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run = half(reference, "amended")
    edited = CURRICULUM | {"stages": [{"name": "chinese", "at": 0, "weights": {"zh": 1}}]}
    path = sample / "edited.yaml"
    path.write_text(yaml.safe_dump(edited))
    words = ["--save", str(run), "--load", str(run), "--curriculum", str(path)]
    before = (run / "metrics.jsonl").read_bytes(), (run / "plan.json").read_bytes()
    ((code, _, err),) = pool.run(1, train, sample, *words)
    assert (
        code == 2
        and "first at sample 0 of the 80" in err
        and "restore the file" in err
        and "--amend-curriculum" in err
    )
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "plan.json").read_bytes())
    ok(pool.run(1, train, sample, *words, "--amend-curriculum", "--exit-interval", "15"))
    ok(pool.run(1, train, sample, *words))  # the amended ledger and the edited file agree now
    records = metrics(run)
    assert records[:10] == metrics(reference)[:10]
    assert all(r["domains"]["zh"]["samples"] == 8 for r in records[10:]) and len(records) == 20


def test_another_seed_split_or_corpus_under_a_run_is_refused(
    pool: Pool, sample: Path, reference: Path
) -> None:
    for flags, part in (
        (["--seed", "5"], "seed is 5 here and 1234"),
        (["--split", "90,10,0"], "split is 90,10,0"),
        (["--seq-length", "32"], "--seq-length 64"),
    ):
        ((code, _, err),) = pool.run(1, train, sample, "--load", str(reference), *flags)
        assert code == 2 and part in err, err
    swapped = CURRICULUM | {"domains": CURRICULUM["domains"] | {"en": {"path": "zh_text_document"}}}
    path = sample / "swapped.yaml"
    path.write_text(yaml.safe_dump(swapped))
    ((code, _, err),) = pool.run(
        1, train, sample, "--load", str(reference), "--curriculum", str(path)
    )
    assert code == 2 and "domain en: its corpus is not the one" in err, err


def test_another_schedule_on_resume_needs_a_word(pool: Pool, sample: Path, reference: Path) -> None:
    words = [
        "--load",
        str(reference),
        "--ckpt-step",
        "10",
        "--lr",
        "1e-3",
        "--train-iters",
        "11",
        "--lr-decay-iters",
        "20",
    ]
    ((code, _, err),) = pool.run(1, train, sample, *words)
    assert code == 2 and "lr is 0.001 here and 0.003" in err
    assert "--override-opt_param-scheduler" in err and "--use-checkpoint-opt_param-scheduler" in err


def test_the_rates_are_the_commands_or_the_checkpoints_from_the_first_iteration(
    pool: Pool, sample: Path, reference: Path
) -> None:
    words = ["--load", str(reference), "--ckpt-step", "10", "--train-iters", "12"]
    words += ["--lr-decay-iters", "20", "--lr", "2e-3", "--min-lr", "1e-4", "--adam-beta2", "0.9"]
    run = sample / "overridden"
    flag = "--override-opt_param-scheduler"
    out = ok(pool.run(1, train, sample, "--save", str(run), *words, flag))
    assert "lr 0.002 (in the checkpoint: 0.003)" in out
    decay = [(1 + math.cos(math.pi * (i - 2) / 18)) / 2 for i in (10, 11)]
    wanted = [1e-4 + 1.9e-3 * share for share in decay]
    assert [r["learning-rate"] for r in metrics(run)] == pytest.approx(wanted, rel=1e-12)
    assert metrics(run)[1]["lm loss"] != metrics(reference)[11]["lm loss"]

    run = sample / "as-before"
    flag = "--use-checkpoint-opt_param-scheduler"
    out = ok(pool.run(1, train, sample, "--save", str(run), *words, flag))
    assert "lr 0.003 (in this command: 0.002)" in out
    assert metrics(run) == metrics(reference)[10:12]
    written = yaml.safe_load((run / "config.yaml").read_text())["optimizer"]
    assert (written["lr"], written["min_lr"], written["adam_beta2"]) == (3e-3, 1e-3, 0.999)


def test_a_run_directory_is_not_overwritten_by_another_run(
    pool: Pool, sample: Path, reference: Path
) -> None:
    ((code, _, err),) = pool.run(1, train, sample, "--save", str(reference))
    assert code == 2 and "already holds checkpoints" in err


def test_weights_alone_can_be_finetuned_and_not_gone_on_with(
    pool: Pool, sample: Path, reference: Path
) -> None:
    """A run directory as a converter writes it: weights, a state without a plan, no optimizer, no
    manifest.
    """
    weights, run = sample / "weights", sample / "from-weights"
    ok(
        pool.run(
            1,
            train,
            sample,
            "--save",
            str(weights),
            "--load",
            str(reference),
            "--finetune",
            "--no-save-optim",
            "--exit-interval",
            "1",
        )
    )
    folder = weights / "iter_0000001"
    (folder / "state.json").write_text(
        json.dumps({"iteration": 0, "consumed_train_samples": 0, "optimizer": False})
    )
    (folder / "manifest.json").unlink()
    for path in (weights / "metrics.jsonl", weights / "config.yaml", weights / "plan.json"):
        path.unlink()
    ((code, _, err),) = pool.run(1, train, sample, "--load", str(weights))
    assert code == 2 and "holds weights only" in err and "--finetune" in err
    out = ok(
        pool.run(
            2,
            train,
            sample,
            "--save",
            str(run),
            "--load",
            str(weights),
            "--finetune",
            "--exit-interval",
            "2",
            *TP,
        )
    )
    assert "weights only" in out
    records = metrics(run)
    assert (
        records[0]["samples"] == [0, 8] and records[0]["learning-rate"] == 0.0 and len(records) == 2
    )
    ok(pool.run(1, train, sample, "--save", str(run), "--load", str(run), "--exit-interval", "3"))
    assert metrics(run)[-1]["iteration"] == 3


def test_weights_of_another_shape_are_refused_by_name(
    pool: Pool, sample: Path, reference: Path, tmp_path: Path
) -> None:
    """A checkpoint that does not record its settings, on two stages of a pipeline."""
    folder = tmp_path / "weights" / "iter_0000020"
    shutil.copytree(reference / folder.name, folder)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("20\n")
    (folder / "state.json").write_text(
        json.dumps({"iteration": 0, "consumed_train_samples": 0, "optimizer": False})
    )
    (folder / "manifest.json").unlink()
    words = ["--load", str(folder.parent), "--finetune", "--num-layers", "2", "--add-qkv-bias"]
    words += ["--ffn-hidden-size", "128", "--pipeline-model-parallel-size", "2"]
    (first, _, err), (second, *_) = pool.run(2, train, sample, *words)
    assert (first, second) == (2, 2), err
    for part in (
        f"{folder} does not fit this model: ",
        "decoder.layers.mlp.linear_fc2.weight is [2, 48, 128] here and [4, 48, 96] in the ",
        "decoder.layers.self_attention.linear_qkv.bias is [2, 96] here and not in the ",
        "; give the settings of the model that it was saved with",
    ):
        assert part in err, err
