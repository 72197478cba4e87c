"""A checkpoint's main parameters and moments belong to its weights, whatever the buckets."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_chatflow.checkpoint import main_parameters
from megatron_chatflow.checkpoint.main_parameters import _agree
from megatron_chatflow.checkpoint.tensor_reader import read_tensors
from tests.pool import Pool
from tests.sample import largest_difference, metrics, train

SHIFTED = Path(__file__).with_name("data") / "shifted_optimizer"
"""A run of `tiny` by an earlier version: DP 2, `DISTRIBUTED`, `SMALL`, --bf16, iteration 2 of 6."""
DISTRIBUTED = ["--use-distributed-optimizer"]
SMALL = ["--overlap-grad-reduce", "--ddp-bucket-size", "200"]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
TIED = ["--no-untie-embeddings-and-output-weights"]
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "ffn_hidden_size": 14,
        "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "make_vocab_size_divisible_by": 2,
    },
    "training": {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 6},
    "optimizer": {"lr": 3e-3, "min_lr": 1e-3, "lr_decay_style": "cosine"},
    "data": {"seq_length": 8, "split": "1,0,0", "curriculum": "curriculum.yaml"},
    "tokenizer": {"tokenizer_type": "ByteLevelTokenizer"},
}  # fmt: skip


def build_tiny(folder: Path) -> Path:
    """A corpus of numbers, and a model of some 5,500 parameters in weights of odd sizes."""
    from megatron_chatflow.cli.preprocess import main as preprocess

    lines = [{"text": " ".join(str((i * i + j * 7) % 61) for j in range(40))} for i in range(20)]
    text, prefix = folder / "numbers.jsonl", folder / "numbers"
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--input", text, "--output-prefix", prefix, "--workers", "1", "--append-eod"]
    words += ["--tokenizer-type", "ByteLevelTokenizer"]
    assert preprocess([str(word) for word in words]) == 0
    curriculum = {
        "clock": "samples",
        "domains": {"numbers": {"path": "numbers_text_document"}},
        "stages": [{"name": "all", "at": 0, "weights": {"numbers": 1}}],
    }
    (folder / "curriculum.yaml").write_text(yaml.safe_dump(curriculum))
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


def go(pool: Pool, world: int, folder: Path, run: Path, *words: str) -> str:
    results = pool.run(world, train, folder, "--save", str(run), *words)
    for code, out, err in results:
        assert code == 0, (out, err)
    assert not any("padded with zeros" in err for _, _, err in results)  # megatron-core's own doubt
    return results[0][1]


def without_correction(folder: Path, *words: str) -> tuple[int, str, str]:
    """A run whose checkpoints are laid out by megatron-core alone."""
    kept = main_parameters.packed_offsets
    main_parameters.packed_offsets = lambda optimizer: contextlib.nullcontext()
    try:
        return train(folder, *words)
    finally:
        main_parameters.packed_offsets = kept


CASES = {
    "DP2": (2, [*DISTRIBUTED, *SMALL], 1, []),
    "DP2-bf16": (2, ["--bf16", *DISTRIBUTED, *SMALL], 1, ["--bf16"]),
    "PP2DP2-bf16": (4, ["--bf16", *PP, *DISTRIBUTED, *SMALL], 2, ["--bf16", *TP, *DISTRIBUTED]),
    "PP2DP2-tied": (4, [*PP, *DISTRIBUTED, *TIED], 2, [*DISTRIBUTED, *SMALL, *TIED]),
    "TP2DP4": (8, [*TP, *DISTRIBUTED, *SMALL], 2, [*PP, *DISTRIBUTED]),
    "TP2DP4-bf16": (8, ["--bf16", *TP, *DISTRIBUTED, *SMALL], 4, ["--bf16", *PP, *DISTRIBUTED]),
    "DP2-gather": (2, ["--bf16", *DISTRIBUTED, *SMALL, "--overlap-param-gather"], 1, ["--bf16"]),
}
"""{name: (ranks, flags, ranks of another layout, its flags)}.

In a pipeline, tied embeddings have a separate bucket, also without --overlap-grad-reduce.
"""


@pytest.mark.parametrize(
    "case",
    [name if name == "DP2-bf16" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_run_with_padded_buckets_resumes_with_its_own_state(
    pool: Pool, tiny: Path, tmp_path: Path, case: str
) -> None:
    world, flags, other_world, other_flags = CASES[case]
    uninterrupted, parts, other = tmp_path / "uninterrupted", tmp_path / "parts", tmp_path / "other"
    go(pool, world, tiny, uninterrupted, *flags, "--save-interval", "3")
    parts.mkdir()
    shutil.copytree(uninterrupted / "iter_0000003", parts / "iter_0000003")
    (parts / "latest_checkpointed_iteration.txt").write_text("3\n")
    shutil.copytree(parts, other)
    go(pool, world, tiny, parts, "--load", str(parts), *flags)
    saved = dict(read_tensors(uninterrupted / "iter_0000006"))
    assert sum(name.startswith("optimizer.state.param.") for name in saved) >= 8
    for name, tensor in read_tensors(parts / "iter_0000006"):
        assert torch.equal(tensor, saved[name]), name
    assert metrics(parts) == metrics(uninterrupted)[3:]
    go(pool, other_world, tiny, other, "--load", str(other), *other_flags)
    bound = 2e-3 if "bf16" in case else 1e-5
    assert largest_difference(metrics(other), metrics(uninterrupted)[3:]) < bound


def test_the_state_is_the_same_in_one_bucket_and_in_many(
    pool: Pool, tiny: Path, tmp_path: Path
) -> None:
    """Two ranks add up in the same order whatever the buckets; clipping would not."""
    words = ["--bf16", *DISTRIBUTED, "--train-iters", "2", "--clip-grad", "0"]
    go(pool, 2, tiny, tmp_path / "one", *words)
    go(pool, 2, tiny, tmp_path / "many", *words, *SMALL)
    one = dict(read_tensors(tmp_path / "one" / "iter_0000002"))
    for name, tensor in read_tensors(tmp_path / "many" / "iter_0000002"):
        assert torch.equal(tensor, one[name]), name


def test_a_checkpoint_whose_state_is_shifted_is_not_published(
    pool: Pool, tiny: Path, tmp_path: Path
) -> None:
    """What megatron-core writes without the correction: if this fails, it is needed no longer."""
    run = tmp_path / "run"
    words = ["--save", str(run), "--bf16", *DISTRIBUTED, *SMALL, "--train-iters", "2"]
    results = pool.run(2, without_correction, tiny, *words)
    for code, _, err in results:
        assert code == 1 and "padded with zeros" in err
    assert "stopped: the checkpoint is not saved" in results[0][2]
    assert "decoder.layers.mlp.linear_fc1.weight" in results[0][2]
    assert not list(run.glob("iter_*")) and not (run / "latest_checkpointed_iteration.txt").exists()
    words += ["--train-iters", "4", "--save-interval", "2", "--exit-on-failed-save"]
    ((code, out, _), _) = pool.run(2, without_correction, tiny, *words)
    assert code == 1 and "iteration        3" not in out
    assert not list(run.glob("iter_*"))


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, ["--bf16", *DISTRIBUTED, *SMALL]),
        (1, ["--bf16"]),
        (1, []),
        pytest.param(2, ["--bf16", *TP], marks=pytest.mark.slow),
        pytest.param(2, [*PP, *DISTRIBUTED], marks=pytest.mark.slow),
    ],
)
def test_a_shifted_checkpoint_is_refused_and_its_weights_are_not(
    pool: Pool, tiny: Path, world: int, flags: list[str]
) -> None:
    words = ["--load", str(SHIFTED), *flags]
    results = pool.run(world, train, tiny, *words)
    for code, _, err in results:
        assert code == 2, err
    err = results[0][2]
    assert "the optimizer's float32 parameters are not the weights in decoder." in err
    assert "add --no-load-optim" in err and "more tensors" in err
    for code, out, err in pool.run(world, train, tiny, *words, "--no-load-optim"):
        assert code == 0, (out, err)


def test_main_parameters_agree_with_the_weights_that_they_round_to_only() -> None:
    def agree(main: Any, weight: Any, dtype: torch.dtype, in_fp8: bool = False) -> bool:
        return _agree(torch.as_tensor(main), torch.as_tensor(weight, dtype=dtype), in_fp8=in_fp8)

    half, single = torch.bfloat16, torch.float32
    main = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert agree(main, main, single) and agree(main, main.to(half), half)
    assert not agree(main, main.roll(64), single) and not agree(main, main.roll(64).to(half), half)
    assert not agree(main, -main, half) and not agree(main, main.nextafter(main + 1), single)
    nudged = main.clone()
    nudged[77] *= 1.01  # more than the half of the last place that rounding may take
    assert not agree(nudged, main.to(half), half)
    inf, nan = float("inf"), float("nan")
    assert agree([nan, inf, -inf, 0.0], [nan, inf, -inf, 0.0], half)
    assert not agree([nan, 1.0], [1.0, 1.0], half) and not agree([1.0, 1.0], [nan, 1.0], half)
    tie = 1 + 2**-8  # between 1 and the next number, 1 + 2^-7
    assert agree([tie, -tie], [1.0, -1.0], half)
    assert agree([tie, -tie], [1 + 2**-7, -1 - 2**-7], half)
    assert not agree([tie], [1 + 2**-6], half)
    scale = main.abs().max() / 448
    fp8 = (main / scale).to(torch.float8_e4m3fn).float() * scale
    assert agree(main, fp8.to(half), half, in_fp8=True) and not agree(main, fp8.to(half), half)
    assert not agree(main.roll(64), fp8.to(half), half, in_fp8=True)
