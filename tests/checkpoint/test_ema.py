"""The running mean of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_chatflow.checkpoint.tensor_reader import read_tensors
from tests.pool import Pool, command
from tests.sample import metrics, train

FLAGS = [
    "--train-iters",
    "4",
    "--lr-decay-iters",
    "20",
    "--lr-warmup-iters",
    "0",
    "--ema-decay",
    "0.7",
]
TP, PP = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def ok(results: list[tuple[int, str, str]]) -> str:
    assert {code for code, _, _ in results} == {0}, results
    return results[0][1]


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    return dict(read_tensors(run / f"iter_{iteration:07d}"))


@pytest.fixture(scope="module")
def uninterrupted(pool: Pool, sample: Path) -> Path:
    """Four iterations of one process, each saved."""
    run = sample / "ema uninterrupted"
    ok(pool.run(1, train, sample, "--save", str(run), "--save-interval", "1", *FLAGS))
    return run


@pytest.mark.parametrize(
    ("name", "world", "flags"),
    [
        ("one", 1, []),
        pytest.param("TP2", 2, TP, marks=pytest.mark.slow),
        pytest.param("sharded", 2, SHARDED, marks=pytest.mark.slow),
    ],
)
def test_the_saved_mean_is_the_mean_of_the_weights(
    pool: Pool, sample: Path, name: str, world: int, flags: list[str]
) -> None:
    still, run = sample / f"ema still {name}", sample / f"ema {name}"
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
    ok(pool.run(world, train, sample, "--save", str(run), "--save-interval", "1", *FLAGS, *flags))
    means = {
        key: t.double() for key, t in tensors(still, 1).items() if not key.startswith("optimizer.")
    }
    for iteration in range(1, 5):
        here = tensors(run, iteration)
        for key, mean in means.items():
            means[key] = 0.7 * mean + 0.3 * here[key].double()
            assert torch.allclose(here[f"ema.{key}"].double(), means[key], rtol=1e-5, atol=1e-7), (
                key
            )
            assert not torch.equal(here[f"ema.{key}"], here[key]), key


@pytest.mark.slow
def test_the_mean_resumes_to_the_same_bits_and_in_another_layout(
    pool: Pool, sample: Path, uninterrupted: Path
) -> None:
    parts, other = sample / "ema parts", sample / "ema other"
    for run, world, flags in ((parts, 1, []), (other, 2, PP)):
        ok(pool.run(1, train, sample, "--save", str(run), "--exit-interval", "2", *FLAGS))
        ok(pool.run(world, train, sample, "--save", str(run), "--load", str(run), *FLAGS, *flags))
    wanted = tensors(uninterrupted, 4)
    assert metrics(parts) == metrics(uninterrupted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in tensors(parts, 4).items())
    assert all(
        torch.allclose(tensor, wanted[key], atol=1e-4)
        for key, tensor in tensors(other, 4).items()
        if key.startswith("ema.")
    )


@pytest.mark.slow
def test_a_run_without_a_mean_begins_one_and_says_so(
    pool: Pool, sample: Path, reference: Path
) -> None:
    run = sample / "ema late"
    words = [
        "--load",
        str(reference),
        "--ckpt-step",
        "10",
        "--ema-decay",
        "0.5",
        "--exit-interval",
        "11",
    ]
    out = ok(pool.run(1, train, sample, "--save", str(run), *words))
    assert "has no mean of the weights" in out
    before, here = tensors(reference, 10), tensors(run, 11)
    for key, tensor in here.items():
        if key.startswith("ema."):
            assert torch.allclose(tensor, (before[key[4:]] + here[key[4:]]) / 2, atol=1e-7)


def load_mean_and_save(run: Path, target: Path, flags: list[str]) -> None:
    """Save the model after its weights were replaced by the mean, in the layout of `flags`."""
    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.checkpoint.run_directory import find_checkpoint, read_settings
    from megatron_chatflow.config import make_parser, parse
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.evaluation.eval_model import resolve_run_model
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups
    from megatron_chatflow.training.data_setup import open_inputs

    config, _ = parse(
        make_parser("test", ""), ["--load", str(run), *flags], read_settings(run, keep_layout=False)
    )
    launch = read_launch()
    eval_model = resolve_run_model(config, launch.world_size)
    with open_process_groups(eval_model.config, launch) as device:
        session = open_model(eval_model, open_inputs(eval_model.config).vocab_size, device)
        state_dict.load_average(find_checkpoint(run, None), session.model)
        state_dict.save(target, 1, session.model, None, {})


@pytest.mark.slow
def test_the_mean_loads_in_place_of_the_weights_in_any_layout(
    pool: Pool, sample: Path, uninterrupted: Path, reference: Path
) -> None:
    for world, flags in ((2, TP), (2, PP)):
        target = sample / f"mean only {world}{len(flags)}{flags[:1]}"
        pool.run(world, load_mean_and_save, uninterrupted, target, flags)
        wanted = tensors(uninterrupted, 4)
        found = tensors(target, 1)
        assert found and all(
            torch.equal(tensor, wanted[f"ema.{key}"]) for key, tensor in found.items()
        )
    with pytest.raises(RuntimeError, match="holds no running mean"):
        pool.run(1, load_mean_and_save, reference, sample / "never", [])


@pytest.mark.parametrize("value", ["0", "1", "1.5"])
def test_a_decay_outside_its_range_is_refused(sample: Path, value: str) -> None:
    code, _, err = command("train", "--config", str(sample / "run.yaml"), "--ema-decay", value)
    assert code == 2 and f"ema_decay is {float(value)}" in err
