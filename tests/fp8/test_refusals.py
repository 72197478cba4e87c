"""FP8 settings that contradict each other, the model, the batch or the machine are rejected.

The message has both names and the fix.
"""

from __future__ import annotations

import pytest

from megatron_chatflow.config import Config, make_parser, parse, resolve
from megatron_chatflow.errors import ChatflowError
from tests.pool import Pool

WORDS = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256 "
    "--swiglu --seq-length 64 --micro-batch-size 2 --train-iters 2 "
    "--lr 1e-3"
)


def settled(words: str, world_size: int = 1) -> Config:
    return resolve(
        parse(make_parser("chatflow train", ""), f"{WORDS} {words}".split())[0], world_size
    )


HYBRID, E4M3 = "--bf16 --fp8-format hybrid", "--bf16 --fp8-format e4m3"
REFUSALS = [
    ("--fp8-format hybrid", ["fp8_format hybrid needs bf16", "add --bf16"]),
    (
        "--bf16 --fp8-recipe mxfp8",
        ["fp8_recipe mxfp8 has no effect without fp8_format", "--fp8-format"],
    ),
    ("--bf16 --fp8-margin 2", ["fp8_margin 2 has no effect without fp8_format"]),
    (
        "--bf16 --first-last-layers-bf16",
        ["first_last_layers_bf16 has no effect without fp8_format"],
    ),
    (
        f"{HYBRID} --fp8-recipe mxfp8",
        ["fp8_format hybrid with fp8_recipe mxfp8", "write --fp8-format e4m3"],
    ),
    (
        f"{HYBRID} --fp8-recipe blockwise",
        ["fp8_format hybrid with fp8_recipe blockwise", "write --fp8-format e4m3"],
    ),
    (
        f"{HYBRID} --fp8-recipe tensorwise --fp8-margin 1",
        ["fp8_margin 1 has no effect with fp8_recipe tensorwise"],
    ),
    (
        f"{HYBRID} --fp8-recipe tensorwise --tp-only-amax-red",
        ["tp_only_amax_red has no effect with fp8_recipe tensorwise"],
    ),
    (
        f"{HYBRID} --fp8-amax-history-len 16",
        ["fp8_amax_history_len 16 has no effect with fp8_amax_compute_algo most_recent"],
    ),
    (f"{HYBRID} --fp8-amax-history-len 0", ["fp8_amax_history_len is 0"]),
    (
        f"{HYBRID} --first-last-layers-bf16",
        [
            "first_last_layers_bf16 does not go with fp8_recipe delayed",
            "choose another --fp8-recipe",
        ],
    ),
    (
        f"{HYBRID} --fp8-recipe tensorwise --num-layers-at-end-in-bf16 2",
        ["num_layers_at_end_in_bf16 2 has no effect without first_last_layers_bf16"],
    ),
    (
        (
            f"{HYBRID} --fp8-recipe tensorwise --first-last-layers-bf16 "
            f"--num-layers-at-start-in-bf16 5"
        ),
        ["num_layers_at_start_in_bf16 5 is more than the 4 layers"],
    ),
    (
        (
            f"{HYBRID} --fp8-recipe tensorwise --first-last-layers-bf16 "
            f"--num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 2"
        ),
        ["leave none of 4 layers", "fp8_format hybrid"],
    ),
    (f"{HYBRID} --fp8-param-gather", ["fp8_param_gather needs use_distributed_optimizer"]),
    (
        f"{E4M3} --fp8-recipe mxfp8 --fp8-param-gather --use-distributed-optimizer",
        ["fp8_param_gather is not supported with fp8_recipe mxfp8"],
    ),
    (
        f"{HYBRID} --fp8-param-gather --use-distributed-optimizer --use-cpu-initialization",
        ["contradicts use_cpu_initialization"],
    ),
    (f"{HYBRID} --hidden-size 120", ["hidden_size is 120, not a multiple of 16"]),
    (f"{HYBRID} --ffn-hidden-size 200", ["ffn_hidden_size is 200, not a multiple of 16"]),
    (
        f"{E4M3} --fp8-recipe mxfp8 --ffn-hidden-size 272",
        ["ffn_hidden_size is 272, not a multiple of 32"],
    ),
    (f"{E4M3} --fp8-recipe mxfp8 --kv-channels 20", ["kv_channels is 80, not a multiple of 32"]),
    (
        f"{HYBRID} --seq-length 9 --micro-batch-size 1",
        ["seq_length x micro_batch_size is 9, not a multiple of 8"],
    ),
    (
        f"{E4M3} --fp8-recipe mxfp8 --seq-length 24",
        ["seq_length x micro_batch_size is 48, not a multiple of 32"],
    ),
    (f"{HYBRID} --no-fp8-wgrad", ["--no-fp8-wgrad", "ignores it"]),
    (f"{HYBRID} --fp8-interval 1", ["--fp8-interval"]),
]


@pytest.mark.parametrize(("words", "parts"), REFUSALS, ids=[words for words, _ in REFUSALS])
def test_a_contradiction_is_reported_with_both_names_and_the_fix(
    words: str, parts: list[str]
) -> None:
    with pytest.raises(ChatflowError) as refusal:
        settled(words)
    assert all(part in str(refusal.value) for part in parts), refusal.value
    assert "; " in str(refusal.value)


def test_a_shard_of_a_matrix_or_of_the_tokens_must_fit_too() -> None:
    with pytest.raises(
        ChatflowError,
        match=r"ffn_hidden_size / tensor_model_parallel_size 4 is 40, not a multiple of 16",
    ):
        settled(f"{HYBRID} --ffn-hidden-size 160 --tensor-model-parallel-size 4", 4)
    with pytest.raises(ChatflowError, match=r"\(sequence_parallel\) is 64, not a multiple of 128"):
        settled(
            f"{E4M3} --fp8-recipe blockwise --tensor-model-parallel-size 2 --sequence-parallel", 2
        )


@pytest.mark.parametrize(
    "words",
    [
        HYBRID,
        (
            f"{HYBRID} --fp8-recipe delayed --fp8-margin 1 --fp8-amax-history-len 32 "
            f"--fp8-amax-compute-algo max --tp-only-amax-red"
        ),
        (
            f"{HYBRID} --fp8-recipe tensorwise --first-last-layers-bf16 "
            f"--num-layers-at-start-in-bf16 2"
        ),
        f"{E4M3} --fp8-recipe blockwise",
        f"{E4M3} --fp8-recipe mxfp8",
        f"{HYBRID} --fp8-param-gather --use-distributed-optimizer",
    ],
)
def test_compatible_settings_are_accepted(words: str) -> None:
    assert settled(words).precision.fp8_format


def _choices() -> list[str]:
    """Return what `choose_transformer_impl` chooses on other machines."""
    from unittest import mock

    from megatron_chatflow.model import spec

    said = []
    for cuda, reason, words in (
        (False, "there is no CUDA device", HYBRID),
        (False, "there is no CUDA device", f"{HYBRID} --transformer-impl transformer_engine"),
        (
            False,
            "there is no CUDA device",
            f"{HYBRID} --fp8-param-gather --use-distributed-optimizer",
        ),
        (True, "transformer_engine does not import (no)", HYBRID),
        (True, None, f"{HYBRID} --transformer-impl local"),
        (True, None, HYBRID),
        (True, None, f"{E4M3} --fp8-recipe mxfp8"),
    ):
        with (
            mock.patch.object(spec, "transformer_engine_reason", return_value=reason),
            mock.patch.object(spec.cuda_shim, "is_needed", return_value=not cuda),
            mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
            mock.patch("torch.version.cuda", "13.0"),
        ):
            try:
                said.append(
                    ": ".join(str(part) for part in spec.choose_transformer_impl(settled(words)))
                )
            except ChatflowError as refusal:
                said.append(f"refused: {refusal}")
    return said


def test_fp8_never_runs_as_something_else_in_silence(pool: Pool) -> None:
    (said,) = pool.run(1, _choices)
    assert (
        said[0].startswith("local: FP8 (delayed) is the reference in plain torch")
        and "there is no CUDA device" in said[0]
    )
    assert said[1].startswith(
        "refused: transformer_impl transformer_engine cannot run: there is no CUDA device"
    )
    assert said[2].startswith("refused: fp8_param_gather needs Transformer Engine")
    assert said[3].startswith(
        "refused: fp8_format hybrid needs Transformer Engine on CUDA, and "
        "transformer_engine does not import (no)"
    )
    assert said[4].startswith(
        "refused: fp8_format hybrid needs Transformer Engine on CUDA, and transformer_impl "
        "is local; drop --transformer-impl"
    )
    assert said[5] == "transformer_engine: None"
    assert said[6].startswith(
        "refused: fp8_format e4m3 with fp8_recipe mxfp8 cannot run: mxfp8 needs compute "
        "capability 10.0"
    )


def _reasons() -> list[list[str | None]]:
    from megatron_chatflow.fp8.transformer_engine import device_reason, version_reason

    versions = [
        version_reason(version)
        for version in ("2.8.0", "2.9.0", "2.11.0+abc", "2.12.0", "3.0", "1.14")
    ]
    devices = [
        device_reason(recipe, capability, cuda)
        for recipe, capability, cuda in (
            ("delayed", (8, 9), "12.4"),
            ("delayed", (8, 0), "12.4"),
            ("tensorwise", (12, 0), "13.0"),
            ("blockwise", (9, 0), "12.9"),
            ("blockwise", (9, 0), "12.8"),
            ("blockwise", (8, 9), "12.9"),
            ("mxfp8", (10, 0), "13.0"),
            ("mxfp8", (9, 0), "13.0"),
            ("mxfp8", (12, 0), "13.0"),
        )
    ]
    return [versions, devices]


def test_releases_and_devices_that_cannot_are_named(pool: Pool) -> None:
    ((versions, devices),) = pool.run(1, _reasons)
    assert [reason is None for reason in versions] == [False, True, True, False, False, False]
    assert [reason is None for reason in devices] == [
        True,
        False,
        True,
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert "2.9 to 2.11" in versions[0] and "CUDA 12.9" in devices[4] and "8.0" in devices[1]
