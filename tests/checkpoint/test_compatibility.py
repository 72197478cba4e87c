"""A checkpoint that does not record its settings is compared with the model by its tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.sample import train


def without_settings(run: Path, to: Path) -> Path:
    """A copy of a run's last checkpoint that records neither settings nor hashes."""
    (step,) = [int((run / "latest_checkpointed_iteration.txt").read_text())]
    folder = f"iter_{step:07d}"
    shutil.copytree(run / folder, to / folder)
    (to / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    state = json.loads((to / folder / "state.json").read_text())
    kept = {key: value for key, value in state.items() if key not in ("settings", "sealed")}
    (to / folder / "state.json").write_text(json.dumps(kept))
    (to / folder / "manifest.json").unlink()
    return to


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("--vocab-size 8192", ["vocab_size is 8192 here, and ", " has rows for 4096 tokens; give"]),
        (
            "--num-layers 3",
            ["fc1.weight is [3, 192, 48] here and [4, 192, 48]", "proj.weight is [3"],
        ),
        (
            "--hidden-size 64 --kv-channels 12",
            ["final_layernorm.weight is [64] here and [48] in the checkpoint", "qkv.weight is [4"],
        ),
        (
            "--num-attention-heads 2 --kv-channels 12",
            ["linear_qkv.weight is [4, 72, 48] here and [4, 96, 48]"],
        ),
        (
            "--ffn-hidden-size 128",
            ["fc1.weight is [4, 256, 48] here and [4, 192, 48]", "fc2.weight is [4, 48, 128]"],
        ),
        (
            "--normalization LayerNorm --qk-layernorm",
            ["decoder.final_layernorm.bias is [48] here and not in the checkpoint", "q_layernorm"],
        ),
        (
            "--no-untie-embeddings-and-output-weights",
            ["output_layer.weight is [4096, 48] in the checkpoint and not here; give the settings"],
        ),
        (
            "--optimizer sgd",
            ["optimizer is sgd here and adam in the checkpoint", "--no-load-optim"],
        ),
        ("--optimizer sgd --sgd-momentum 0", ["optimizer is sgd here and adam in the checkpoint"]),
    ],
)
def test_another_model_is_refused_with_every_tensor_that_differs(
    pool: Pool, sample: Path, reference: Path, tmp_path: Path, words: str, messages: list[str]
) -> None:
    run = without_settings(reference, tmp_path / "run")
    longer = ["--load", str(run), "--train-iters", "21", "--override-opt_param-scheduler"]
    ((code, _, err),) = pool.run(1, train, sample, *longer, *words.split())
    assert code == 2 and len(err.splitlines()) == 1, err
    assert all(message in err for message in messages), err


def test_the_same_model_is_loaded_with_a_note_on_any_padding_and_layout(
    pool: Pool, sample: Path, reference: Path, tmp_path: Path
) -> None:
    run = without_settings(reference, tmp_path / "run")
    words = ["--load", str(run), "--train-iters", "21", "--override-opt_param-scheduler"]
    words += ["--make-vocab-size-divisible-by", "5000", "--pipeline-model-parallel-size", "2"]
    results = pool.run(2, train, sample, *words)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "does not record" in results[0][1]
