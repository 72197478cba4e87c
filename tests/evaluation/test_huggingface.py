"""evaluate and generate directly on a Hugging Face folder, against transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.pool import Pool, command

pytestmark = pytest.mark.slow
TEXT = "The quick brown fox. 敏捷的狐狸。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of random weights with grouped queries and scaled rotary positions."""
    from tests.conversion.models import build

    return build(tmp_path_factory.mktemp("hf") / "llama3", "llama3")


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, []),
        (3, ["--tensor-model-parallel-size", "3"]),
        (2, ["--pipeline-model-parallel-size", "2"]),
    ],
)
def test_greedy_text_is_that_of_transformers(
    pool: Pool, folder: Path, world: int, flags: list[str]
) -> None:
    from megatron_chatflow.tokenizer import load_tokenizer
    from tests.conversion.models import greedy

    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)
    ids = tokenizer.encode(TEXT)
    expected = greedy(folder, ids, 12)
    words = ["generate", "--load", folder, "--prompt", TEXT, "--max-new-tokens", "12", *flags]
    (code, out, err), *_ = pool.run(world, command, *map(str, words))
    assert code == 0, err
    if tokenizer.eod in expected:
        expected = expected[: expected.index(tokenizer.eod)]
    assert out == tokenizer.decode(ids + expected) + "\n"


def test_bits_per_byte_are_those_of_transformers_logits(
    pool: Pool, folder: Path, tmp_path: Path
) -> None:
    import numpy as np

    from megatron_chatflow.tokenizer import load_tokenizer
    from tests.conversion.models import reference_logits

    (tmp_path / "a.txt").write_text(f"{TEXT}\nAnother line.\n", encoding="utf-8")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)
    streams = [[tokenizer.eod, *tokenizer.encode(line)] for line in (TEXT, "Another line.")]
    nats = 0.0
    for stream, logits in zip(
        streams, reference_logits(folder, [stream[:-1] for stream in streams]), strict=True
    ):
        rows = logits.astype(np.float64)
        nats -= sum(
            row[label] - np.logaddexp.reduce(row)
            for row, label in zip(rows, stream[1:], strict=True)
        )
    ((code, out, err),) = pool.run(
        1,
        command,
        "evaluate",
        "--load",
        str(folder),
        "--text",
        f"a={tmp_path / 'a.txt'}",
        "--seq-length",
        "128",
        "--json",
    )
    assert code == 0, err
    report = json.loads(out)
    size = len(TEXT.encode()) + len(b"Another line.")
    assert report["checkpoint"] == str(folder)
    assert report["validation"]["a"]["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / size, rel=1e-4
    )


def test_a_folder_is_a_reference_for_a_run_with_another_tokenizer(
    pool: Pool, folder: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    words = [
        "--load",
        str(reference),
        "--reference",
        str(folder),
        "--text",
        f"a={tmp_path / 'a.txt'}",
    ]
    ((code, out, err),) = pool.run(1, command, "evaluate", *words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["reference"]["checkpoint"] == str(folder)
    here, there = (
        part["validation"]["a"]["bits_per_byte"] for part in (report, report["reference"])
    )
    assert report["change"]["a"] == {
        "loss": None,
        "bits_per_byte": pytest.approx(100 * (here / there - 1)),
    }


def test_what_only_runs_have_is_refused_on_a_folder(pool: Pool, folder: Path) -> None:
    for words, message in (
        (
            ["--ckpt-step", "10"],
            "is a Hugging Face folder, which has no iterations; drop --ckpt-step",
        ),
        (
            ["--average-checkpoints", "2"],
            "is a Hugging Face folder, which has no iterations; drop --average-checkpoints",
        ),
        (
            ["--use-ema"],
            "is a Hugging Face folder, which has no running mean of the weights; drop --use-ema",
        ),
        ([], "nothing to read; give --curriculum FILE"),
    ):
        ((code, _, err),) = pool.run(1, command, "evaluate", "--load", str(folder), *words)
        assert code == 2 and message in err
