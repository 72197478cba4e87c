"""New rows in SmolLM2-135M before any training: what each way to make them costs in English and
gives in Chinese, and what a replacement leaves.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_chatflow.tokenizer import load_tokenizer
from tests.conversion.models import run_logits, tensors, tool
from tests.pool import Pool, command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HOLD_OUT = ROOT / "examples" / "smollm2_zh" / "hold_out.py"
EXTEND = ROOT / "tools" / "extend_tokenizer.py"
HELD_OUT = 24_000
"""Bytes of the held-out .jsonl of a language: a dozen documents and more, that neither tokenizer
nor model has learnt from here.
"""


def script(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def held_out(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with en.jsonl and zh.jsonl to learn from, and en_test.jsonl and zh_test.jsonl to
    judge by.
    """
    folder = tmp_path_factory.mktemp("held_out")
    for name in ("en", "zh"):
        script(
            HOLD_OUT,
            corpora / f"{name}.jsonl",
            folder / f"{name}.jsonl",
            folder / f"{name}_test.jsonl",
            "--bytes",
            HELD_OUT,
        )
    return folder


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of examples/smollm2_zh."""
    target = tmp_path_factory.mktemp("extended") / "tokenizer"
    names = [f"{name}={held_out / f'{name}_test.jsonl'}" for name in ("zh", "en")]
    words = [
        "--input",
        held_out / "zh.jsonl",
        "--base-input",
        held_out / "en.jsonl",
        "--held-out",
        *names,
        "--new-tokens",
        "2000",
    ]
    script(
        EXTEND,
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        smollm2,
        *words,
        "--output",
        target,
    )
    return target


def test_new_rows_hardly_harm_english_and_means_beat_random_ones_in_chinese(
    pool: Pool, smollm2: Path, held_out: Path, tokenizer: Path, tmp_path: Path
) -> None:
    def bits(folder: Path) -> dict[str, float]:
        texts = [
            word
            for name in ("en", "zh")
            for word in ("--text", f"{name}={held_out / f'{name}_test.jsonl'}")
        ]
        words = [
            "--load",
            folder,
            "--seq-length",
            "1024",
            "--micro-batch-size",
            "1",
            *texts,
            "--json",
        ]
        ((code, out, err),) = pool.run(1, command, "evaluate", *map(str, words), timeout=1200)
        assert code == 0, err
        validation: dict[str, Any] = json.loads(out)["validation"]
        return {name: values["bits_per_byte"] for name, values in validation.items()}

    table = {"untouched": bits(smollm2)}
    for method in ("mean", "mean_all", "random"):
        run = tmp_path / method
        words = [
            "--load-dir",
            smollm2,
            "--save-dir",
            run,
            "--tokenizer-folder",
            tokenizer,
            "--new-rows",
            method,
        ]
        ((code, _, err),) = pool.run(1, tool, *words)
        assert code == 0, err
        table[method] = bits(run)
    before = table["untouched"]
    print(f"\n{'new rows':<10}{'en bits/byte':>14}{'change':>9}{'zh bits/byte':>14}{'change':>9}")
    for name, row in table.items():
        print(
            f"{name:<10}"
            + "".join(f"{row[k]:>14.4f}{row[k] / before[k] - 1:>+9.2%}" for k in ("en", "zh"))
        )
    for method in ("mean", "mean_all"):
        assert table[method]["en"] <= 1.01 * before["en"], method
        assert math.isfinite(table[method]["zh"]) and table[method]["zh"] < table["random"]["zh"], (
            method
        )


def test_replaced_rows_are_means_and_everything_else_keeps_its_bits(
    pool: Pool, smollm2: Path, corpora: Path, tmp_path: Path
) -> None:
    import torch

    words = [
        "--input",
        corpora / "hu.jsonl",
        "--base-input",
        corpora / "en.jsonl",
        "--replace",
        "--new-tokens",
        "2000",
    ]
    script(
        EXTEND,
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        smollm2,
        *words,
        "--output",
        tmp_path / "tokenizer",
    )
    runs = {"before": [], "after": ["--tokenizer-folder", tmp_path / "tokenizer"]}
    for name, flags in runs.items():
        ((code, _, err),) = pool.run(
            1, tool, "--load-dir", smollm2, "--save-dir", tmp_path / name, *flags
        )
        assert code == 0, err
    ((code, _, err),) = pool.run(
        1, tool, "--load-dir", tmp_path / "after", "--save-dir", tmp_path / "hf"
    )
    assert code == 0, err
    new = {
        token["id"]: token["pieces"]
        for token in json.loads((tmp_path / "tokenizer" / "token_map.json").read_text())["new"]
    }
    old, found = tensors(smollm2), tensors(tmp_path / "hf")
    rows, changed = old.pop("model.embed_tokens.weight"), found.pop("model.embed_tokens.weight")
    assert (
        len(new) == 2000
        and old.keys() == found.keys()
        and all(torch.equal(old[name], found[name]) for name in old)
    )
    assert all(torch.equal(changed[token], rows[pieces].mean(0)) for token, pieces in new.items())
    kept = torch.tensor([token for token in range(len(rows)) if token not in new])
    assert torch.equal(changed[kept], rows[kept])
    base = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=smollm2)
    texts = [
        base.encode(json.loads(line)["text"])[:100]
        for line in (corpora / "en.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    ]
    of_kept_tokens = [ids for ids in texts if not new.keys() & set(ids)]
    assert len(of_kept_tokens) > 20
    (before,), (after,) = (
        pool.run(1, run_logits, tmp_path / name, of_kept_tokens) for name in runs
    )
    assert all(np.array_equal(a[:, kept], b[:, kept]) for a, b in zip(before, after, strict=True))
