"""evaluate: raw text against probabilities token by token, references, averaged checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.models import tool as convert
from tests.evaluation.hf_models import logits, opened
from tests.pool import Pool, command
from tests.sample import QUICKSTART, metrics, train


def _documents(name: str, count: int) -> list[str]:
    lines = (QUICKSTART / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[-count:]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few documents of two languages, longer and shorter than a window of 64 tokens."""
    folder = tmp_path_factory.mktemp("held_out")
    paths = {name: folder / f"{name}.jsonl" for name in ("en", "zh")}
    for name, path in paths.items():
        texts = [*_documents(name, 3), *(text[:40] for text in _documents(name, 6))]
        path.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    return paths


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _summed_loss(run: str, texts: list[str]) -> float:
    """Nats of all documents: each one separately, in pieces of 64 tokens, in float64."""

    def body(session: Any, tokenizer: Any) -> float:
        total = 0.0
        for text in texts:
            stream = [tokenizer.eod, *tokenizer.encode(text)]
            for at in range(0, len(stream) - 1, 64):
                piece = stream[at : at + 65]
                rows = logits(session, piece[:-1]).double().log_softmax(-1)
                total -= sum(float(row[label]) for row, label in zip(rows, piece[1:], strict=True))
        return total

    return opened(run, [], 1, body)


def _evaluate(pool: Pool, world: int, *words: str) -> dict[str, Any]:
    answers = pool.run(world, command, "evaluate", *words, "--json")
    assert [code for code, _, _ in answers] == [0] * world, answers
    assert [out for _, out, _ in answers[1:]] == [""] * (world - 1)
    return json.loads(answers[0][1])


def _flags(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in ("--text", f"{name}={path}")]


def test_raw_text_has_the_probability_of_its_documents_and_the_bytes_of_its_file(
    pool: Pool, reference: Path, files: dict[str, Path]
) -> None:
    report = _evaluate(pool, 1, "--load", str(reference), *_flags(files))
    assert list(report["validation"]) == ["en", "zh"]
    assert "documents begin after the end-of-document token" in report["notes"][0]
    for name, values in report["validation"].items():
        texts = _texts(files[name])
        (nats,) = pool.run(1, _summed_loss, str(reference), texts)
        assert values["loss"] * values["tokens"] == pytest.approx(nats, rel=1e-5)
        assert values["bits_per_byte"] == pytest.approx(
            nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, ["--tensor-model-parallel-size", "2"]),
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, ["--micro-batch-size", "3"]),
    ],
)
def test_raw_text_is_the_same_on_every_layout(
    pool: Pool, reference: Path, files: dict[str, Path], world: int, flags: list[str]
) -> None:
    one = _evaluate(pool, 1, "--load", str(reference), *_flags(files))["validation"]
    other = _evaluate(pool, world, "--load", str(reference), *_flags(files), *flags)["validation"]
    for name, values in one.items():
        assert other[name]["tokens"] == values["tokens"]
        assert other[name]["loss"] == pytest.approx(values["loss"], rel=1e-5)


def test_the_reference_is_evaluated_on_the_same_windows_and_compared(
    pool: Pool, reference: Path
) -> None:
    alone = _evaluate(pool, 1, "--load", str(reference))
    before = _evaluate(pool, 1, "--load", str(reference), "--ckpt-step", "10")
    report = _evaluate(
        pool, 1, "--load", str(reference), "--reference", str(reference / "iter_0000010")
    )
    assert report["validation"] == alone["validation"]
    assert (report["reference"]["iteration"], report["reference"]["validation"]) == (
        10,
        before["validation"],
    )
    for name, change in report["change"].items():
        for key in ("loss", "bits_per_byte"):
            assert change[key] == pytest.approx(
                100 * (alone["validation"][name][key] / before["validation"][name][key] - 1)
            )
    assert set(report["change"]) == set(alone["validation"])


def test_the_table_has_a_line_for_each_domain(pool: Pool, reference: Path) -> None:
    ((code, out, err),) = pool.run(
        1,
        command,
        "evaluate",
        "--load",
        str(reference),
        "--reference",
        str(reference / "iter_0000010"),
    )
    assert code == 0, err
    table = out[out.index("against the reference") :].splitlines()
    assert [line.split()[0] for line in table[2:]] == ["en", "zh", "en-zh", "instruct"]
    assert all(line.count("%") == 2 for line in table[2:])


def test_the_function_returns_what_the_command_prints(
    pool: Pool, reference: Path, files: dict[str, Path]
) -> None:
    step = str(reference / "iter_0000010")
    words = ["--load", str(reference), "--reference", step, "--micro-batch-size", "3"]
    printed = _evaluate(pool, 1, *words, *_flags(files))
    call = {"texts": files, "reference": step, "settings": {"micro_batch_size": 3}}
    returned = pool.run(2, _call, str(reference), call)
    for result in returned:
        assert result["total"].keys() == {"loss", "ppl", "bits_per_byte", "tokens"}
        assert result["reference"]["iteration"] == 10
        assert result["change"].keys() == printed["change"].keys()
        for name, values in printed["validation"].items():
            assert result["validation"][name] == pytest.approx(values, rel=1e-6)
    assert returned[0] == returned[1]


def _call(load: str, call: dict[str, Any]) -> dict[str, Any]:
    from megatron_chatflow.evaluation.evaluate import evaluate

    return dataclasses.asdict(evaluate(load, **call))


@pytest.mark.slow
def test_two_tokenizers_are_compared_by_the_bytes_of_the_same_documents(
    pool: Pool, sample: Path, reference: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    from megatron_chatflow.cli.preprocess import main as preprocess

    words = [
        "--input",
        QUICKSTART / "data" / "en.jsonl",
        "--output-prefix",
        tmp_path / "en",
        "--append-eod",
        "--workers",
        "1",
    ]
    assert (
        preprocess([str(word) for word in [*words, "--tokenizer-type", "ByteLevelTokenizer"]]) == 0
    )
    run = tmp_path / "bytes"
    flags = [
        "--data-path",
        str(tmp_path / "en_text_document"),
        "--tokenizer-type",
        "ByteLevelTokenizer",
    ]
    config = tmp_path / "run.yaml"
    config.write_text(
        "\n".join(
            line
            for line in (sample / "run.yaml").read_text().splitlines()
            if "curriculum" not in line
        ),
        encoding="utf-8",
    )
    ((code, _, err),) = pool.run(
        1,
        command,
        "train",
        "--config",
        str(config),
        *flags,
        "--save",
        str(run),
        "--train-iters",
        "4",
    )
    assert code == 0, err
    report = _evaluate(pool, 1, "--load", str(reference), "--reference", str(run), *_flags(files))
    for name, path in files.items():
        here, there = report["validation"][name], report["reference"]["validation"][name]
        assert there["tokens"] == sum(len(text.encode()) for text in _texts(path)) > here["tokens"]
        assert there["bits_per_byte"] == pytest.approx(there["loss"] / math.log(2))
        assert (
            report["change"][name]["loss"] is None
            and report["change"][name]["bits_per_byte"] is not None
        )
    code, _, err = command("evaluate", "--load", str(reference), "--reference", str(run))
    assert (
        code == 2
        and (
            "its tokenizer bytes did not make the corpora, tokenizer.model did; compare the two "
            "on raw text"
        )
        in err
    )


def _parameters(run: str, flags: list[str], average: int) -> dict[str, Any]:
    def body(session: Any, tokenizer: Any) -> dict[str, Any]:
        return {
            name: parameter.detach().clone().numpy()
            for name, parameter in session.model[0].named_parameters()
        }

    return opened(run, flags, average, body)


def test_averaged_weights_are_the_uniform_mean_of_the_last_checkpoints(
    pool: Pool, reference: Path
) -> None:
    import numpy as np

    parts = [
        pool.run(1, _parameters, str(reference), ["--ckpt-step", step], 1)[0]
        for step in ("10", "20")
    ]
    (mean,) = pool.run(1, _parameters, str(reference), [], 2)
    assert any((parts[0][name] != parts[1][name]).any() for name in mean)
    for name, values in mean.items():
        exact = (parts[0][name].astype(np.float64) + parts[1][name].astype(np.float64)) / 2
        assert np.abs(values - exact).max() <= 1e-7 * max(1.0, np.abs(exact).max())


def test_the_running_mean_is_evaluated_in_place_of_the_weights_and_next_to_them(
    pool: Pool, averaged: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    report = _evaluate(
        pool, 1, "--load", str(averaged), "--use-ema", "--reference", str(averaged), *_flags(files)
    )
    assert (
        report["checkpoint"] == f"running mean of the weights in {averaged}/iter_0000006"
        and report["iteration"] == 6
    )
    ((code, _, err),) = pool.run(
        1, convert, "--load-dir", averaged, "--save-dir", tmp_path / "hf", "--use-ema"
    )
    assert code == 0, err
    converted = _evaluate(
        pool,
        1,
        "--load",
        str(tmp_path / "hf"),
        "--document-start",
        "eod",
        "--bf16",
        "--seq-length",
        "64",
        *_flags(files),
    )
    weights = _evaluate(pool, 1, "--load", str(averaged), *_flags(files))["validation"]
    assert report["reference"]["validation"] == weights
    for name, values in report["validation"].items():
        assert values["loss"] == pytest.approx(converted["validation"][name]["loss"], rel=1e-4)
        assert abs(values["loss"] / weights[name]["loss"] - 1) > 1e-3


def _means() -> tuple[bool, bool]:
    import torch

    from megatron_chatflow.checkpoint.averaging import mean

    parts = [
        torch.randn(5, 3, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(6)
    ]
    exact = torch.stack([part.double() for part in parts]).mean(0)
    return torch.equal(mean(parts[:1]), parts[0]), bool(
        ((mean(parts).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-9).all()
    )


def test_the_mean_of_tensors_is_taken_in_float32_and_of_one_is_itself(pool: Pool) -> None:
    assert pool.run(1, _means) == [(True, True)]


REFUSED = {
    "more checkpoints than there are": (
        ["--average-checkpoints", "3"],
        "average_checkpoints is 3, and the complete checkpoints of RUN up to iter_0000020 "
        "are 2 (iteration 10, 20); give --average-checkpoints a "
        "number from 1 to 2",
    ),
    "more than there are up to a step": (
        ["--average-checkpoints", "2", "--ckpt-step", "10"],
        "up to iter_0000010 are 1 (iteration 10)",
    ),
    "none to average": (["--average-checkpoints", "0"], "average_checkpoints is 0"),
    "a running mean that is not there": (
        ["--use-ema"],
        (
            "RUN/iter_0000020 holds no running mean of the weights: it was trained without "
            "--ema-decay; drop --use-ema to take its weights"
        ),
    ),
    "a mean of running means": (
        ["--use-ema", "--average-checkpoints", "2"],
        "use_ema and average_checkpoints 2 are two ways to average; drop",
    ),
    "a text without a name": (
        ["--text", "held_out.jsonl"],
        "write --text NAME=FILE, e.g. --text zh=held_out.jsonl",
    ),
    "a text that is not there": (["--text", "en=/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    "an empty text": (
        ["--text", "en=/dev/null"],
        "the file holds no text; give one with documents",
    ),
    "a start without text": (
        ["--document-start", "eod"],
        "--document-start has no effect without raw text; drop",
    ),
    "a reference that is no run": (
        ["--reference", "/nowhere"],
        "reference /nowhere: /nowhere is not a run directory",
    ),
    "a reference without that checkpoint": (
        ["--reference", "RUN/iter_0000007"],
        "is not a complete checkpoint; give --ckpt-step one of 10, 20",
    ),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_opened(
    reference: Path, words: list[str], message: str
) -> None:
    run = str(reference)
    code, out, err = command(
        "evaluate", "--load", run, *(word.replace("RUN", run) for word in words)
    )
    assert (code, out) == (2, "") and message.replace("RUN", run) in err


@pytest.mark.slow
def test_a_domain_that_trains_on_prompts_counts_their_tokens(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    text = (sample / "curriculum.yaml").read_text(encoding="utf-8")
    tokens, losses = {}, {}
    for key in ("false", "true"):
        changed = text.replace("kind: instruct", f"kind: instruct\n    train_on_prompt: {key}")
        (sample / f"prompts_{key}.yaml").write_text(changed, encoding="utf-8")
        run = tmp_path / key
        flags = [
            "--curriculum",
            str(sample / f"prompts_{key}.yaml"),
            "--save",
            str(run),
            "--train-iters",
            "20",
        ]
        (done,) = pool.run(1, train, sample, *flags)
        assert done[0] == 0, done
        tokens[key] = _evaluate(pool, 1, "--load", str(run))["validation"]["instruct"]["tokens"]
        losses[key] = [record["domains"]["instruct"].get("loss") for record in metrics(run)]
    assert tokens["true"] > tokens["false"]
    first = next(i for i, loss in enumerate(losses["true"]) if loss is not None)
    assert losses["true"][first] != losses["false"][first]
