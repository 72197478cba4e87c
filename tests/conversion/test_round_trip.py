"""Models of every family to run directories and back, held against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_chatflow.tokenizer import load_tokenizer
from tests.conversion.models import (
    FAMILIES,
    TEXTS,
    build,
    greedy,
    reference_logits,
    run_logits,
    tensors,
    tool,
)
from tests.pool import Pool, command
from tests.sample import train

Folders = Callable[[str], Path]
LAYOUTS = {
    "one process": (1, ()),
    "TP 3": (3, ("--tensor-model-parallel-size", "3")),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
}


def rows_of(family: str, folder: Path) -> list[list[int]]:
    """Four texts in four languages as ids; for scaled rotations a long row as well, since they
    differ only far from the start.
    """
    if family == "llama2":
        tokenizer = load_tokenizer(
            "SentencePieceTokenizer", tokenizer_model=folder / "tokenizer.model"
        )
    else:
        tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder)
    rows = [tokenizer.encode(text) for text in TEXTS]
    return [*rows, (sum(rows, []) * 20)[:700]] if family in ("llama3", "linear") else rows


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    pool: Pool, folders: Folders, runs: Folders, family: str
) -> None:
    rows = rows_of(family, folders(family))
    wanted = reference_logits(folders(family), rows)
    for world, words in LAYOUTS.values():
        found = next(
            answer
            for answer in pool.run(world, run_logits, runs(family), rows, *words)
            if answer is not None
        )
        assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) < 1e-4
    assert max(np.abs(w).max() for w in wanted) > 1


def _direct_logits(
    folder: Path, run: Path, rows: list[list[int]], words: tuple[str, ...]
) -> list[np.ndarray] | None:
    return run_logits(run, rows, *words, direct=folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_weights_loaded_in_place_are_those_of_the_checkpoint(
    pool: Pool, folders: Folders, runs: Folders, family: str
) -> None:
    rows = rows_of(family, folders(family))[:2]
    for world, words in LAYOUTS.values():
        (first, *_), (second, *_) = (
            [answer for answer in answers if answer is not None]
            for answers in (
                pool.run(world, run_logits, runs(family), rows, *words),
                pool.run(world, _direct_logits, folders(family), runs(family), rows, words),
            )
        )
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("family", "flag"),
    [("llama3", "--no-use-rope-scaling"), ("linear", "--rotary-seq-len-interpolation-factor=1")],
)
def test_the_scaling_of_the_rotations_is_part_of_it(
    pool: Pool, folders: Folders, runs: Folders, family: str, flag: str
) -> None:
    rows = rows_of(family, folders(family))
    (found,) = pool.run(1, run_logits, runs(family), rows, flag)
    assert np.abs(found[-1] - reference_logits(folders(family), rows)[-1]).max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_back_again_every_tensor_and_file_is_the_same_and_transformers_loads_it(
    pool: Pool, folders: Folders, runs: Folders, family: str, tmp_path: Path
) -> None:
    folder, back = folders(family), tmp_path / "back"
    ((code, out, err),) = pool.run(1, tool, "--load-dir", runs(family), "--save-dir", back)
    assert code == 0, err
    before, after = tensors(folder), tensors(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.equal(after[name]), name
    kept = {p.name for p in folder.iterdir() if not p.name.startswith("model")}
    assert kept == {p.name for p in back.iterdir() if not p.name.startswith("model")}
    for name in kept:
        if name.endswith(".json"):
            assert json.loads((folder / name).read_text()) == json.loads(
                (back / name).read_text()
            ), name
        else:
            assert (folder / name).read_bytes() == (back / name).read_bytes(), name
    ids = rows_of(family, folder)[1]
    assert greedy(folder, ids, 12) == greedy(back, ids, 12)


def settings_for(run: Path, sample: Path, folder: Path) -> Path:
    """A run.yaml with the sample's corpora and batches, and the model and tokenizer of a converted
    run; returns its folder.
    """
    settings = yaml.safe_load((sample / "run.yaml").read_text())
    converted = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"model": converted["model"], "tokenizer": converted["tokenizer"]}
    settings["tokenizer"]["tokenizer_model"] = str(run / converted["tokenizer"]["tokenizer_model"])
    settings["training"]["bf16"] = False
    settings["data"]["curriculum"] = str(sample / "curriculum.yaml")
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_converted_model_writes_what_transformers_writes(
    pool: Pool, sample: Path, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    run, tokenizer = (
        runs("llama2"),
        load_tokenizer(
            "SentencePieceTokenizer", tokenizer_model=folders("llama2") / "tokenizer.model"
        ),
    )
    words = [
        "--config",
        str(settings_for(run, sample, tmp_path) / "run.yaml"),
        "--load",
        str(run),
        "--prompt",
        "文件",
        "--max-new-tokens",
        "8",
    ]
    ((code, out, err),) = pool.run(1, command, "generate", *words)
    assert code == 0, err
    ids = tokenizer.encode("文件")
    assert out == tokenizer.decode(ids + greedy(folders("llama2"), ids, 8)) + "\n"


def test_a_converted_model_is_evaluated_trained_on_and_converted_back(
    pool: Pool, sample: Path, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    run, tuned, back = runs("llama2"), tmp_path / "tuned", tmp_path / "back"
    config = str(settings_for(run, sample, tmp_path) / "run.yaml")
    words = [
        "--load",
        str(run),
        "--finetune",
        "--save",
        str(tuned),
        "--train-iters",
        "3",
        "--lr",
        "1e-4",
        "--min-lr",
        "0",
        "--eval-interval",
        "3",
    ]
    for code, _, err in pool.run(2, train, tmp_path, *words):
        assert code == 0, err
    ((code, out, err),) = pool.run(
        1, command, "evaluate", "--load", str(run), "--config", config, "--json"
    )
    assert code == 0, err
    before = next(
        json.loads(line)
        for line in (tuned / "metrics.jsonl").read_text().splitlines()
        if '"validation"' in line
    )
    for name, values in json.loads(out)["validation"].items():
        assert values["loss"] == pytest.approx(before["validation"][name]["loss"], rel=1e-5)
    ((code, _, err),) = pool.run(1, tool, "--load-dir", tuned, "--save-dir", back)
    assert code == 0, err
    first, trained = tensors(folders("llama2")), tensors(back)
    assert {name: t.shape for name, t in first.items()} == {
        name: t.shape for name, t in trained.items()
    }
    change = max(float((first[name].float() - trained[name].float()).abs().max()) for name in first)
    assert 1e-5 < change < 1e-2
    assert json.loads((back / "config.json").read_text())["max_position_embeddings"] == 512


@pytest.mark.slow
def test_one_key_head_over_three_tensor_ranks_goes_both_ways(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    """9 query heads share a key head that no rank has for itself: logits, generated text, training,
    and the way back.
    """
    folder, run, tuned, back = (tmp_path / name for name in ("hf", "run", "tuned", "back"))
    build(folder, "llama2", num_key_value_heads=1, head_dim=12, dtype="float32")
    ((code, _, err),) = pool.run(1, tool, "--load-dir", folder, "--save-dir", run)
    assert code == 0, err
    rows, layout = rows_of("llama2", folder), LAYOUTS["TP 3"][1]

    def apart(weights: Path, reference: Path) -> float:
        found = next(
            answer
            for answer in pool.run(3, run_logits, weights, rows, *layout)
            if answer is not None
        )
        return max(
            np.abs(a - b).max()
            for a, b in zip(found, reference_logits(reference, rows), strict=True)
        )

    assert apart(run, folder) < 1e-4
    words = ["--config", str(settings_for(run, sample, tmp_path) / "run.yaml"), "--load", str(run)]
    tokenizer = load_tokenizer("SentencePieceTokenizer", tokenizer_model=folder / "tokenizer.model")
    (code, out, err), *_ = pool.run(
        3, command, "generate", *words, "--prompt", "文件", "--max-new-tokens", "8", *layout
    )
    assert code == 0, err
    ids = tokenizer.encode("文件")
    assert out == tokenizer.decode(ids + greedy(folder, ids, 8)) + "\n"
    words += ["--finetune", "--save", str(tuned), "--train-iters", "3"]
    words += ["--lr", "1e-3", "--min-lr", "0", "--lr-warmup-iters", "0"]
    for code, _, err in pool.run(3, train, tmp_path, *words[2:], *layout):
        assert code == 0, err
    ((code, _, err),) = pool.run(1, tool, "--load-dir", tuned, "--save-dir", back)
    assert code == 0, err
    assert apart(tuned, back) < 1e-4 < 1e-2 < apart(tuned, folder)


def _call_both_ways(folder: Path, run: Path, back: Path) -> tuple[Path, Path]:
    from megatron_chatflow.conversion.convert import convert_from_hf, convert_to_hf

    return convert_from_hf(folder, run), convert_to_hf(str(run), str(back))


def test_the_functions_write_the_files_of_the_command(
    pool: Pool, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    assert pool.run(1, _call_both_ways, folders("qwen2"), run, back) == [(run, back)]
    ((code, _, err),) = pool.run(
        1, tool, "--load-dir", runs("qwen2"), "--save-dir", tmp_path / "wanted"
    )
    assert code == 0, err
    for wanted, found in ((runs("qwen2"), run), (tmp_path / "wanted", back)):
        names = {path.relative_to(wanted) for path in wanted.rglob("*") if path.is_file()}
        assert names == {path.relative_to(found) for path in found.rglob("*") if path.is_file()}
        for name in names:
            assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
