"""FP8 runs without Transformer Engine: training, exact resumption, layouts, checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from tests.pool import Pool
from tests.sample import largest_difference, metrics, train

MODEL = [
    "--hidden-size",
    "128",
    "--ffn-hidden-size",
    "256",
    "--bf16",
    "--lr",
    "1e-3",
    "--min-lr",
    "1e-4",
    "--lr-decay-iters",
    "20",
    "--micro-batch-size",
    "4",
]
RECIPES = {
    "delayed": [
        "--fp8-format",
        "hybrid",
        "--fp8-recipe",
        "delayed",
        "--fp8-amax-history-len",
        "4",
        "--fp8-amax-compute-algo",
        "max",
    ],
    "tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"],
    "blockwise": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
    "mxfp8": ["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"],
}
TP, SP = ["--tensor-model-parallel-size", "2"], ["--sequence-parallel"]


def run(pool: Pool, sample: Path, name: str, world: int, *words: str) -> list[dict]:
    """Return the records of a run; every rank must have succeeded."""
    folder = sample / f"fp8-{name}"
    for code, out, err in pool.run(world, train, sample, "--save", str(folder), *MODEL, *words):
        assert code == 0, (out, err)
    return metrics(folder)


@pytest.fixture(scope="module")
def bf16(pool: Pool, sample: Path) -> list[dict]:
    return run(pool, sample, "bf16", 1, "--train-iters", "12")


@pytest.fixture(scope="module")
def one(pool: Pool, sample: Path) -> dict[str, list[dict]]:
    """Each recipe on one process, 12 iterations of two micro-batches."""
    return {
        recipe: run(pool, sample, recipe, 1, *flags, "--train-iters", "12")
        for recipe, flags in RECIPES.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_descends_close_to_bfloat16_and_not_equal_to_it(
    one: dict, bf16: list[dict], recipe: str
) -> None:
    losses, plain = ([record["lm loss"] for record in records] for records in (one[recipe], bf16))
    assert losses[-1] < losses[0] - 0.5
    assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.1
    assert losses[0] != plain[0]


def test_recipes_differ_from_each_other(one: dict) -> None:
    assert len({records[5]["lm loss"] for records in one.values()}) == len(RECIPES)


def test_the_reference_says_once_that_it_is_one(pool: Pool, sample: Path) -> None:
    (_, out, _), (_, other, _) = pool.run(
        2, train, sample, *MODEL, *RECIPES["delayed"], "--train-iters", "1", *TP
    )
    assert out.count("FP8 (delayed) is the reference in plain torch") == 1
    assert "reference" not in other


@pytest.mark.parametrize(
    "recipe",
    [
        "delayed",
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in ("tensorwise", "blockwise", "mxfp8")
        ),
    ],
)
def test_tensor_parallelism_changes_little_and_sequence_parallelism_next_to_nothing(
    pool: Pool, sample: Path, one: dict, recipe: str
) -> None:
    split = run(pool, sample, f"{recipe}-tp", 2, *RECIPES[recipe], *TP, "--train-iters", "6")
    sharded = run(pool, sample, f"{recipe}-sp", 2, *RECIPES[recipe], *TP, *SP, "--train-iters", "6")
    assert largest_difference(split, one[recipe][:6]) < 2e-3
    assert sharded[0]["lm loss"] == split[0]["lm loss"]
    assert largest_difference(sharded, split) < 2e-4


def test_delayed_scaling_is_the_same_for_every_pipeline(
    pool: Pool, sample: Path, one: dict
) -> None:
    pipeline = [
        "--pipeline-model-parallel-size",
        "2",
        "--num-layers-per-virtual-pipeline-stage",
        "1",
        "--train-iters",
        "6",
    ]
    piped = run(pool, sample, "pp", 2, *RECIPES["delayed"], *pipeline)
    assert [record["lm loss"] for record in piped[:2]] == [
        record["lm loss"] for record in one["delayed"][:2]
    ]
    assert (
        largest_difference(piped, one["delayed"][:6]) < 2e-4
    )  # a rounding of the optimizer's, grown by every cast since


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_delayed_scaling_resumes_to_the_same_bits_whenever_it_is_validated(
    pool: Pool, sample: Path, world: int
) -> None:
    flags = [*RECIPES["delayed"], "--train-iters", "6", "--micro-batch-size", "2"]
    uninterrupted = run(pool, sample, f"uninterrupted-{world}", world, *flags)
    name = f"parts-{world}"
    run(pool, sample, name, world, *flags, "--exit-interval", "3", "--eval-interval", "2")
    parts = run(
        pool,
        sample,
        name,
        world,
        *flags,
        "--load",
        str(sample / f"fp8-{name}"),
        "--eval-interval",
        "2",
    )
    assert parts == uninterrupted


@pytest.mark.slow
def test_checkpoints_pass_between_fp8_and_bfloat16(
    pool: Pool, sample: Path, one: dict, bf16: list[dict]
) -> None:
    flags = ["--finetune", "--train-iters", "2", "--eval-interval", "2"]
    for source, name, words in (
        ("delayed", "into-bf16", []),
        ("bf16", "into-delayed", RECIPES["delayed"]),
        ("delayed", "into-mx", RECIPES["mxfp8"]),
    ):
        records = run(
            pool, sample, name, 1, *words, *flags, "--load", str(sample / f"fp8-{source}")
        )
        trained = {"delayed": one["delayed"], "bf16": bf16}[source]
        assert records[0]["lm loss"] < trained[0]["lm loss"] - 0.3, name
        held_out = json.loads(
            (sample / f"fp8-{name}" / "metrics.jsonl").read_text().splitlines()[0]
        )
        assert held_out["iteration"] == 0 and all(
            values["loss"] < 8 for values in held_out["validation"].values()
        )


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def save_evil(folder: Path, marker: Path, *words: str) -> tuple[int, str, str]:
    """Train with layers whose saved state is a pickle that touches a file when it is loaded."""
    from megatron_chatflow.fp8 import linear

    pack, linear.extra_state.pack = (
        linear.extra_state.pack,
        lambda *_, **__: torch.frombuffer(bytearray(pickle.dumps(Evil(marker))), dtype=torch.uint8),
    )
    try:
        return train(folder, *words)
    finally:
        linear.extra_state.pack = pack


def test_what_a_layer_would_unpickle_is_read_before_any_layer_sees_it(
    pool: Pool, sample: Path, tmp_path: Path
) -> None:
    words = [*MODEL, *RECIPES["delayed"], "--train-iters", "1"]
    ((code, _, err),) = pool.run(
        1, save_evil, sample, tmp_path / "executed", "--save", str(tmp_path / "evil"), *words
    )
    assert code == 0, err
    for flags in (RECIPES["delayed"], RECIPES["mxfp8"], []):
        ((code, _, err),) = pool.run(
            1,
            train,
            sample,
            "--load",
            str(tmp_path / "evil"),
            "--finetune",
            *MODEL,
            *flags,
            "--train-iters",
            "1",
        )
        assert (
            code == 2
            and "is not read: something pickled in it is not what a checkpoint holds (it refers to "
            in err
        ), (code, err)
    assert not (tmp_path / "executed").exists()


def _first_layers(words: list[str]) -> list[str]:
    from megatron_chatflow.config import make_parser, parse, resolve
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.model.gpt import build_model

    launch = read_launch()
    common = [
        "--num-layers",
        "4",
        "--num-attention-heads",
        "4",
        "--seq-length",
        "64",
        "--train-iters",
        "1",
        "--swiglu",
    ]
    config = resolve(
        parse(make_parser("chatflow train", ""), [*common, *MODEL, *words])[0], launch.world_size
    )
    process_groups.initialize(launch, config.parallel, 4)
    found = []
    for chunk in build_model(config, 100, "local", wrap=False):
        for layer in chunk.module.decoder.layers:
            linears = (
                layer.self_attention.linear_qkv,
                layer.self_attention.linear_proj,
                layer.mlp.linear_fc1,
                layer.mlp.linear_fc2,
            )
            found.append(
                f"{layer.layer_number - 1} "
                f"{len({hasattr(linear, 'products') for linear in linears})} "
                f"{hasattr(linears[0], 'products')}"
            )
    process_groups.shut_down()
    return found


def test_the_first_and_last_layers_stay_in_bfloat16_wherever_they_are_built(pool: Pool) -> None:
    words = [
        *RECIPES["tensorwise"],
        "--first-last-layers-bf16",
        "--num-layers-at-start-in-bf16",
        "1",
        "--num-layers-at-end-in-bf16",
        "2",
    ]
    wanted = ["0 1 False", "1 1 True", "2 1 False", "3 1 False"]
    assert pool.run(1, _first_layers, words) == [wanted]
    halves = pool.run(2, _first_layers, [*words, "--pipeline-model-parallel-size", "2"])
    assert halves == [wanted[:2], wanted[2:]]
