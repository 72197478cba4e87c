"""Averaged weights to Hugging Face: what is written is what `evaluate` would load, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversion.models import tensors, tool
from tests.pool import Pool

WAYS = {
    "one": [],
    "mean of three": ["--average-checkpoints", "3"],
    "mean up to a step": ["--average-checkpoints", "2", "--ckpt-step", "4"],
    # fmt: skip
    "running mean": ["--use-ema"],
    "running mean of a step": ["--use-ema", "--ckpt-step", "4"],
}


def load_and_save(run: Path, target: Path, words: list[str]) -> None:
    """Load the weights as `evaluate` does with these flags, and save the model as a new run."""
    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.cli.evaluate import parser
    from megatron_chatflow.cli.model_source import parse_with_source
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups
    from megatron_chatflow.training.data_setup import open_tokenizer

    launch = read_launch()
    words = ["--load", str(run), *words]
    source, config, args = parse_with_source(parser(), words, launch.world_size)
    model = source.resolve(config, launch.world_size, args.average_checkpoints, args.use_ema)
    with open_process_groups(model.config, launch) as device:
        session = open_model(model, open_tokenizer(config)[1], device)
        state_dict.save(target, 1, session.model, None, {})
    shutil.copyfile(run / "config.yaml", target / "config.yaml")


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS.keys())
def test_what_is_written_is_what_evaluate_loads_bit_for_bit(
    pool: Pool, averaged: Path, tmp_path: Path, words: list[str]
) -> None:
    import torch

    pool.run(1, load_and_save, averaged, tmp_path / "loaded", words)
    for load, save, flags in (
        (tmp_path / "loaded", "wanted", []),
        (averaged, "found", words),
        (averaged, "plain", []),
    ):
        ((code, _, err),) = pool.run(
            1, tool, "--load-dir", load, "--save-dir", tmp_path / save, *flags
        )
        assert code == 0, err
    wanted, found, plain = (tensors(tmp_path / name) for name in ("wanted", "found", "plain"))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert any(not torch.equal(found[name], tensor) for name, tensor in plain.items()) == bool(
        words
    )


def test_the_mean_of_one_checkpoint_is_the_checkpoint(
    pool: Pool, averaged: Path, tmp_path: Path
) -> None:
    for name, words in (("plain", []), ("mean", ["--average-checkpoints", "1"])):
        ((code, _, err),) = pool.run(
            1, tool, "--load-dir", averaged, "--save-dir", tmp_path / name, *words
        )
        assert code == 0, err
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "mean").iterdir()}


def flip(run: Path) -> None:
    shards = next((run / "iter_0000002").glob("*.distcp"))
    content = bytearray(shards.read_bytes())
    content[len(content) // 2] ^= 1
    shards.write_bytes(content)


def test_every_checkpoint_of_a_mean_is_verified(pool: Pool, averaged: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(averaged, run)
    flip(run)
    ((code, _, err),) = pool.run(
        1, tool, "--load-dir", run, "--save-dir", tmp_path / "back", "--average-checkpoints", "3"
    )
    assert code == 2 and "iter_0000002 is damaged: " in err and not (tmp_path / "back").exists()
    ((code, _, err),) = pool.run(
        1, tool, "--load-dir", run, "--save-dir", tmp_path / "back", "--average-checkpoints", "2"
    )
    assert code == 0, err


def test_what_cannot_be_averaged_is_refused(
    pool: Pool, averaged: Path, reference: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    for load, words, sentence in (
        (
            reference,
            ["--use-ema"],
            (
                "iter_0000020 holds no running mean of the weights: it was trained without "
                "--ema-decay; drop --use-ema"
            ),
        ),
        (
            averaged,
            ["--use-ema", "--average-checkpoints", "2"],
            "use_ema and average_checkpoints 2 are two ways to average; drop",
        ),
        (
            averaged,
            ["--average-checkpoints", "4"],
            "average_checkpoints is 4, and the complete checkpoints",
        ),
        (averaged, ["--average-checkpoints", "0"], "average_checkpoints is 0"),
        (folders("qwen2"), ["--use-ema"], "which has no iterations; drop --use-ema"),
        (
            folders("qwen2"),
            ["--average-checkpoints", "2"],
            "which has no iterations; drop --average-checkpoints",
        ),
    ):
        ((code, _, err),) = pool.run(
            1, tool, "--load-dir", load, "--save-dir", tmp_path / "out", *words
        )
        assert (code, sentence in err, err.count("\n")) == (2, True, 1), err
    assert list(tmp_path.iterdir()) == []
