"""The first phase that trains only the rows of new tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_chatflow.checkpoint.tensor_reader import read_tensors
from tests.pool import Pool
from tests.sample import QUICKSTART, metrics, train

NEW = [5, 700, 701, 702, 1023]
FLAGS = [
    "--train-iters",
    "6",
    "--lr-decay-iters",
    "20",
    "--lr-warmup-iters",
    "0",
    "--lr",
    "3e-3",
    "--weight-decay",
    "0.1",
]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "one process": (1, []),
    "tensor-parallel, bf16": (2, [*TP, "--bf16"]),
    "pipeline, tied": (2, [*PP, "--no-untie-embeddings-and-output-weights"]),
    "distributed optimizer, bf16": (2, [*SHARDED, "--bf16"]),
}
DEFAULT = ("one process",)


def token_map(new: list[dict[str, Any]], vocab_size: int) -> str:
    """Return a token map of replaced tokens as JSON."""
    sizes = {"base_vocab_size": vocab_size, "vocab_size": vocab_size, "base_sha256": ""}
    return json.dumps({"version": 1, "kind": "replace", **sizes, "new": new})


@pytest.fixture(scope="module")
def phase(sample: Path) -> list[str]:
    """Flags that turn the phase on for three iterations, with a tokenizer folder whose map names
    NEW.
    """
    folder = sample / "extended"
    folder.mkdir()
    shutil.copy(QUICKSTART / "tokenizer.model", folder)
    entries = [{"id": i, "pieces": [3], "chars": [1]} for i in NEW]
    (folder / "token_map.json").write_text(token_map(entries, 1024))
    return [
        *FLAGS,
        "--tokenizer-model",
        str(folder / "tokenizer.model"),
        "--train-new-rows-samples",
        "20",
    ]


def ok(results: list[tuple[int, str, str]]) -> str:
    assert {code for code, _, _ in results} == {0}, results
    return results[0][1]


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, sample: Path, phase: list[str]) -> Path:
    """Six iterations of one process, each saved."""
    run = sample / "rows uninterrupted"
    ok(pool.run(1, train, sample, "--save", str(run), "--save-interval", "1", *phase))
    return run


def weights(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """The weights, and the optimizer's float32 copies, by name."""
    return {
        name: t for name, t in read_tensors(run / f"iter_{iteration:07d}") if ".exp_avg" not in name
    }


@pytest.mark.parametrize(
    "layout",
    [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_only_the_new_rows_change_in_the_phase_and_everything_after_it(
    pool: Pool, sample: Path, phase: list[str], layout: str
) -> None:
    world, flags = LAYOUTS[layout]
    still, run = sample / f"still {layout}", sample / f"rows {layout}"
    ok(
        pool.run(
            world,
            train,
            sample,
            "--save",
            str(still),
            *flags,
            "--train-iters",
            "1",
            "--lr-warmup-iters",
            "0",
            "--lr",
            "0",
            "--min-lr",
            "0",
        )
    )
    out = ok(
        pool.run(world, train, sample, "--save", str(run), "--save-interval", "1", *phase, *flags)
    )
    assert "from sample 24 on all weights are trained" in out
    before, at_end, after = weights(still, 1), weights(run, 3), weights(run, 4)
    names = [name for name in before if "word_embeddings" in name or "output_layer" in name]
    assert len(names) == (1 if "tied" in layout else 2) * (
        2 if "bf16" in layout or "distributed" in layout else 1
    ), names
    for name, tensor in before.items():
        changed = (
            (tensor != at_end[name]).flatten(1).any(1)
            if tensor.ndim > 1
            else tensor != at_end[name]
        )
        rows = changed.nonzero().flatten().tolist()
        if (
            "word_embeddings" in name and "tied" not in layout
        ):  # a token that was not read has no gradient there
            assert rows and set(rows) <= set(NEW), name
        else:
            assert rows == (NEW if name in names else []), name
        assert not torch.equal(at_end[name], after[name]), name


def test_the_first_step_of_all_weights_is_no_longer_than_adams_first(uninterrupted: Path) -> None:
    before, after = weights(uninterrupted, 3), weights(uninterrupted, 4)
    lr = metrics(uninterrupted)[3]["learning-rate"]
    for name, tensor in before.items():
        assert (
            (after[name] - tensor).abs() <= lr * (1 + 0.1 * tensor.abs()) * 1.001 + 1e-7
        ).all(), name


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_phase_resumes_to_the_same_bits_within_it_and_at_its_end(
    pool: Pool, sample: Path, uninterrupted: Path, phase: list[str], stop: int
) -> None:
    parts = sample / f"rows parts {stop}"
    ok(
        pool.run(
            1,
            train,
            sample,
            "--save",
            str(parts),
            "--exit-interval",
            str(stop),
            "--train-iters",
            "6",
            *phase[2:],
        )
    )
    ok(pool.run(1, train, sample, "--save", str(parts), "--load", str(parts), *phase))
    assert metrics(parts) == metrics(uninterrupted)
    assert all(
        torch.equal(tensor, weights(uninterrupted, 6)[name])
        for name, tensor in weights(parts, 6).items()
    )


def test_the_phase_is_refused_where_it_cannot_be(
    pool: Pool, sample: Path, phase: list[str], reference: Path
) -> None:
    def refused(*words: str) -> str:
        ((code, _, err),) = pool.run(1, train, sample, *words)
        assert code == 2, err
        return err

    assert "token_map.json, which tools/extend_tokenizer.py writes" in refused(
        "--train-new-rows-samples", "8"
    )
    assert "is at the start of a run" in refused("--load", str(reference), *phase[-4:-1], "1000")
    beyond = [{"id": 5000, "pieces": [3], "chars": [1]}]
    for text, part in (
        ("{}", "make the tokenizer with this release's tools"),
        (token_map([], 500), "no new tokens"),
        (token_map(beyond, 6000), "names token 5000"),
    ):
        folder = sample / "bad map"
        folder.mkdir(exist_ok=True)
        shutil.copy(QUICKSTART / "tokenizer.model", folder)
        (folder / "token_map.json").write_text(text)
        assert part in refused(
            "--tokenizer-model", str(folder / "tokenizer.model"), "--train-new-rows-samples", "8"
        )
