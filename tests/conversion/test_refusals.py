"""What cannot be converted is refused in one sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.models import tensors, tool
from tests.pool import Pool

Folders = Callable[[str], Path]
TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def save(folder: Path, **changes: Any) -> None:
    """The weights of a folder of one file with tensors added (or taken out: None)."""
    from safetensors.torch import save_file

    kept = {
        name: tensor for name, tensor in (tensors(folder) | changes).items() if tensor is not None
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def without_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_shard(folder: Path) -> None:
    os.truncate(sorted(folder.glob("model-*.safetensors"))[1], 100)


def misplaced(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = sorted(set(index["weight_map"].values()))[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def small_vocabulary(folder: Path) -> None:
    weights = tensors(folder)
    edit(folder / "config.json", vocab_size=400)
    save(
        folder,
        **{
            name: weights[name][:400].clone()
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        },
    )


def other_bias(folder: Path) -> None:
    import torch

    save(folder, **{"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})


def two_types(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    save(folder, **{name: tensors(folder)[name].double()})


def integers(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    save(folder, **{name: tensors(folder)[name].char()})


def untied(folder: Path) -> None:
    import torch

    save(
        folder, **{"lm_head.weight": torch.zeros_like(tensors(folder)["model.embed_tokens.weight"])}
    )


def wrong_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=128)


CASES = [
    ("llama3", without_shard, "model-00002-of-"),
    ("llama3", cut_shard, "is damaged"),
    ("llama3", misplaced, "lacks model.norm.weight"),
    ("mistral", pickled, "pytorch_model.bin, which is a pickle"),
    ("mistral", small_vocabulary, "the tokenizer has 457 tokens and the model has 400 rows"),
    ("mistral", lambda f: edit(f / "config.json", vocab_size=512), "should be [512, 72]"),
    (
        "mistral",
        lambda f: (f / "tokenizer.json").unlink(),
        "neither tokenizer.json nor tokenizer.model",
    ),
    ("mistral", lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    ("mistral", lambda f: edit(f / "config.json", model_type="gpt2"), "is another architecture"),
    ("mistral", other_bias, "model.layers.0.self_attn.q_norm.weight first of 1"),
    ("mistral", wrong_shape, "should be [128, 72]"),
    ("mistral", two_types, "of several types"),
    ("mistral", integers, "is of type I8"),
    ("qwen2", untied, "differs from the embedding"),
    (
        "qwen2",
        lambda f: edit(f / "config.json", model_type="llama"),
        "first of 12; it cannot be converted",
    ),
]


@pytest.mark.parametrize(
    ("family", "damage", "named"), CASES, ids=[str(i) for i in range(len(CASES))]
)
def test_a_folder_that_cannot_be_converted(
    pool: Pool, folders: Folders, tmp_path: Path, family: str, damage: Any, named: str
) -> None:
    folder, target = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(folders(family), folder)
    damage(folder)
    ((code, _, err),) = pool.run(1, tool, "--load-dir", folder, "--save-dir", target)
    assert (code, named in err) == (2, True), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def edit_yaml(path: Path, section: str, **changes: Any) -> None:
    import yaml

    content = yaml.safe_load(path.read_text())
    content[section] |= changes
    path.write_text(yaml.safe_dump(content))


def flip(run: Path) -> None:
    (shards,) = (run / "iter_0000000").glob("*.distcp")
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip, "is not what was written (SHA-256 differs)"),
        (
            lambda r: edit_yaml(
                r / "config.yaml", "model", position_embedding_type="learned_absolute"
            ),
            "position_embedding_type is learned_absolute",
        ),
        (
            lambda r: edit_yaml(r / "config.yaml", "model", add_bias_linear=True),
            "add_bias_linear is True",
        ),
        (lambda r: edit_yaml(r / "config.yaml", "model", num_layers=6), "it is of another model"),
        (
            lambda r: edit_yaml(
                r / "config.yaml", "model", untie_embeddings_and_output_weights=True
            ),
            "has no output_layer.weight",
        ),
        (
            lambda r: edit_yaml(r / "config.yaml", "tokenizer", vocab_size=1000),
            "embedding.word_embeddings.weight is [512, 72]",
        ),
        (lambda r: shutil.rmtree(r / "huggingface"), "is not there"),
        (
            lambda r: (r / "latest_checkpointed_iteration.txt").unlink(),
            "latest_checkpointed_iteration.txt is missing",
        ),
        (lambda r: (r / "iter_0000000" / "state.json").unlink(), "is not a complete checkpoint"),
    ],
)
def test_a_run_directory_that_cannot_be_converted(
    pool: Pool, runs: Folders, tmp_path: Path, damage: Any, named: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("qwen2"), run)
    damage(run)
    ((code, _, err),) = pool.run(1, tool, "--load-dir", run, "--save-dir", tmp_path / "back")
    assert (code, named in err) == (2, True), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_is_there_already_is_left_alone(
    pool: Pool, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("x")
    for load in (folders("mistral"), runs("qwen2")):
        ((code, _, err),) = pool.run(1, tool, "--load-dir", load, "--save-dir", tmp_path)
        assert code == 2 and "is there already" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--save-dir is missing"),
        (["--load-dir", "{}", "--save-dir", "out"], "neither config.json"),
        (
            ["--load-dir", "{}", "--save-dir", "out", "--target-tensor-parallel-size", "8"],
            "for every tensor and pipeline size",
        ),
        (
            ["--load-dir", "{}", "--save-dir", "out", "--loader", "llama"],
            "which way follows from --load-dir",
        ),
        (["--load-dir", "{}", "--save-dir", "out", "--tp", "8"], "unknown flag --tp"),
        (["--load-dir", "{}", "--save-dir", "out", "--new-rows", "zero"], "invalid choice: 'zero'"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(tmp_path: Path, words: list[str], named: str) -> None:
    code, _, err = tool(*(word.format(tmp_path) for word in words))
    assert (code, named in err) == (2, True), err


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "--load-dir", "nowhere", "--save-dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (
        done.returncode == 2
        and "nowhere has neither config.json" in done.stderr
        and done.stderr.count("\n") == 1
    ), done.stderr


def test_flags_that_have_no_meaning_on_this_way_are_refused(
    pool: Pool, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    for load, words, named in (
        (folders("mistral"), ["--ckpt-step", "3"], "drop --ckpt-step"),
        (folders("mistral"), ["--new-rows", "mean"], "there are no new rows"),
        (runs("qwen2"), ["--new-output-rows", "mean"], "drop --new-rows"),
    ):
        ((code, _, err),) = pool.run(
            1, tool, "--load-dir", load, "--save-dir", tmp_path / "out", *words
        )
        assert code == 2 and named in err


def alone(*words: object) -> tuple[int, str, str]:
    """`tool` as one process, on whichever rank of the pool."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        return tool(*words)
    finally:
        os.environ |= dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"), "0")
        os.environ["MASTER_PORT"] = "0"


@pytest.mark.slow
def test_of_two_conversions_into_one_folder_the_second_is_refused(
    pool: Pool, folders: Folders, runs: Folders, tmp_path: Path
) -> None:
    from megatron_chatflow.checkpoint.lease import Lease

    for load in (folders("mistral"), runs("qwen2")):
        with Lease.next_to(tmp_path / "out", "save-dir") as lease:
            lease.acquire()
            ((code, _, err),) = pool.run(
                1, tool, "--load-dir", load, "--save-dir", tmp_path / "out"
            )
        assert code == 2 and "save-dir" in err and "another process writes there" in err, err
        assert list(tmp_path.iterdir()) == []
    results = pool.run(2, alone, "--load-dir", folders("mistral"), "--save-dir", tmp_path / "out")
    assert sorted(code for code, _, _ in results) == [0, 2], results
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
