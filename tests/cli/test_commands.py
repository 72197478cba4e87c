"""plan, locate, evaluate and generate on the reference run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_chatflow.curriculum import BlendPlan
from tests.pool import Pool, command


def test_plan_prints_every_stage_and_draws_the_plot(sample: Path) -> None:
    plot = sample / "plan.png"
    code, out, err = command("plan", "--config", str(sample / "run.yaml"), "--plot", str(plot))
    assert code == 0, err
    for part in (
        "stage english",
        "stage bilingual",
        "stage instruct",
        "the complete run: 160 samples",
        "instruct",
    ):
        assert part in out
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_data_path_means_a_constant_curriculum(sample: Path) -> None:
    words = [
        "plan",
        "--data-path",
        "1",
        str(sample / "en_text_document"),
        "3",
        str(sample / "zh_text_document"),
    ]
    words += ["--seq-length", "64", "--train-samples", "100", "--vocab-size", "4096"]
    code, out, err = command(*words)
    assert code == 0, err
    complete = out[out.index("the complete run") :]
    assert re.search(r"en +25\.0% +25 ", complete) and re.search(r"zh +75\.0% +75 ", complete)


def test_locate_prints_the_documents_and_their_text(reference: Path, sample: Path) -> None:
    code, out, err = command("locate", "--checkpoint", str(reference), "--iteration", "12")
    assert code == 0, err
    plan = BlendPlan.from_json((reference / "plan.json").read_text())
    domains, ordinals = plan.locate(88, 96)
    found = re.findall(r"^sample (\d+): domain (\S+), ordinal (\d+), epoch 0$", out, re.MULTILINE)
    assert found == [
        (str(88 + i), plan.domain_names[d], str(o))
        for i, (d, o) in enumerate(zip(domains, ordinals, strict=True))
    ]
    assert (
        out.count("  document ") >= 8 and "iteration 12: samples 88 to 95, stage bilingual" in out
    )
    again = command("locate", "--config", str(sample / "run.yaml"), "--iteration", "12")
    assert again == (0, out, "")


def test_locate_prints_the_full_text_of_a_sample_as_it_is_in_the_source(
    reference: Path,
) -> None:
    from tests.sample import QUICKSTART

    english = [
        json.loads(line)["text"]
        for line in (QUICKSTART / "data" / "en.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plan = BlendPlan.from_json((reference / "plan.json").read_text())
    domains, _ = plan.locate(0, 160)
    sample = next(n for n in range(160) if plan.domain_names[domains[n]] == "en")
    code, out, _ = command("locate", "--checkpoint", str(reference), "--sample", str(sample))
    assert code == 0
    for document, text in re.findall(r"document (\d+), tokens \d+ to \d+: (.+)", out):
        shown = eval(text)  # printed with repr
        assert shown.strip("\ufffd ") in english[int(document)]


def test_locate_refuses_what_is_not_in_the_run(reference: Path) -> None:
    for words, part in (
        (["--iteration", "21"], "1 to 20"),
        (["--sample", "160"], "0 to 159"),
        (["--iteration", "0"], "1 to 20"),
    ):
        code, _, err = command("locate", "--checkpoint", str(reference), *words)
        assert code == 2 and part in err


def test_evaluate_gives_the_losses_that_training_logged(pool: Pool, reference: Path) -> None:
    logged = [
        json.loads(line)
        for line in (reference / "metrics.jsonl").read_text().splitlines()
        if '"validation"' in line
    ]
    ((code, out, err),) = pool.run(1, command, "evaluate", "--load", str(reference), "--json")
    assert code == 0, err
    assert json.loads(out)["validation"] == logged[-1]["validation"]
    ((code, out, _),) = pool.run(
        1, command, "evaluate", "--load", str(reference), "--ckpt-step", "10", "--json"
    )
    assert json.loads(out)["validation"] == logged[1]["validation"]


@pytest.mark.slow
def test_evaluate_agrees_on_every_layout(pool: Pool, reference: Path) -> None:
    ((_, out, _),) = pool.run(1, command, "evaluate", "--load", str(reference), "--json")
    one = json.loads(out)["validation"]
    ((_, every, _),) = pool.run(
        1, command, "evaluate", "--load", str(reference), "--json", "--eval-iters", "1000"
    )
    for world, flags in (
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, ["--tensor-model-parallel-size", "2"]),
        (2, ["--micro-batch-size", "3", "--global-batch-size", "6"]),
    ):
        (code, out, err), *_ = pool.run(
            world,
            command,
            "evaluate",
            "--load",
            str(reference),
            "--json",
            *flags,
            "--eval-iters",
            "1000",
        )
        assert code == 0, err
        for name, values in json.loads(every)["validation"].items():
            other = json.loads(out)["validation"][name]
            assert other["tokens"] == values["tokens"] > one[name]["tokens"]
            assert abs(other["loss"] / values["loss"] - 1) < 1e-5


def test_evaluate_and_generate_without_a_checkpoint_are_refused(
    reference: Path, tmp_path: Path
) -> None:
    for words in (["evaluate"], ["generate", "--prompt", "x"]):
        assert command(*words)[0] == 2
        code, _, err = command(*words, "--load", str(tmp_path))
        assert code == 2 and "no config.yaml" in err
    shutil.copy(reference / "config.yaml", tmp_path)
    code, _, err = command("evaluate", "--load", str(tmp_path))
    assert code == 2 and "holds no checkpoint" in err
