"""Settings of activation recomputation: what has no meaning is refused with the fix."""

from __future__ import annotations

import pytest

from megatron_chatflow.errors import ChatflowError
from tests.planner.measure import LLAMA, small


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recompute_method": "uniform"}, "has no effect without recompute_granularity"),
        ({"recompute_modules": ["mlp"]}, "has no effect without recompute_granularity"),
        (
            {"recompute_granularity": "full"},
            "add --recompute-method uniform --recompute-num-layers 1",
        ),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 5,
            },
            "from 1 to 4",
        ),
        (
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 3,
            },
            "not a multiple of recompute_num_layers 3",
        ),
        (
            {"recompute_granularity": "full", "recompute_modules": ["mlp"]},
            "belongs to recompute_granularity selective",
        ),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 1},
            "drop --recompute-num-layers or write full",
        ),
        (
            {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
            "the parts of a layer are core_attn, mlp, layernorm",
        ),
        (
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["layernorm"],
                "bf16": True,
                "fp8_format": "hybrid",
            },
            "does not go with fp8_recipe delayed",
        ),
    ],
)
def test_what_recomputation_cannot_mean_is_refused(
    settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ChatflowError, match=sentence):
        small(1, LLAMA, **settings)


def test_a_model_chunk_is_what_recomputation_counts_layers_in() -> None:
    interleaved = {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "global_batch_size": 4,
    }
    with pytest.raises(ChatflowError, match="a model chunk has 1 layers"):
        small(
            2,
            LLAMA,
            recompute_granularity="full",
            recompute_method="block",
            recompute_num_layers=2,
            **interleaved,
        )


def test_selective_recomputation_means_attention_by_default() -> None:
    assert small(1, LLAMA, recompute_granularity="selective").training.recompute_modules == [
        "core_attn"
    ]
