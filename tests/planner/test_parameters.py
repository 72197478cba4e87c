"""The closed forms of parameters against the models that megatron-core builds, and against
arithmetic written out by hand.
"""

from __future__ import annotations

import pytest

from megatron_chatflow.config import Config
from megatron_chatflow.planner.parameters import layout_of, stage_layers, stage_parameters
from tests.planner.measure import LLAMA, VOCAB, rehearsed_parameters, small
from tests.pool import Pool


def llama2_70b(**parallel: int) -> Config:
    model = {
        **LLAMA,
        "num_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_query_groups": 8,
        "ffn_hidden_size": 28672,
    }
    world = parallel.get("tensor_model_parallel_size", 1) * parallel.get(
        "pipeline_model_parallel_size", 1
    )
    return small(world, model | {"normalization": "RMSNorm", "global_batch_size": 64}, **parallel)


def test_llama2_70b_has_the_parameters_of_its_paper() -> None:
    config = llama2_70b()
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert (
        stage_parameters(config, 32000, layout_of(config, 1), 0)
        == 80 * layer + 2 * 32000 * 8192 + 8192
        == 68_976_648_192
    )


def test_tensor_ranks_share_the_matrices_and_repeat_the_norms() -> None:
    config = llama2_70b(tensor_model_parallel_size=8, pipeline_model_parallel_size=8)
    layout = layout_of(config, 64)
    held = sum(8 * stage_parameters(config, 32000, layout, stage) for stage in range(8))
    assert held == 68_976_648_192 + 7 * (80 * 2 + 1) * 8192


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"pipeline_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 3, "num_layers_per_virtual_pipeline_stage": 2},
        {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2},
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t*4|t*3|t*4L"},
    ],
)
def test_every_layer_is_in_exactly_one_stage(parallel: dict) -> None:
    config = llama2_70b().replace(num_layers=12, **parallel)
    held = [
        stage_layers(config, stage) for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    assert sorted(layer for layers in held for layer in layers) == list(range(12))


CASES = {
    "GPT-2": ({}, {}),
    "GPT-2 over a pipeline, whose last stage copies the embedding": (
        {},
        {"pipeline_model_parallel_size": 2},
    ),
    "GPT-2 over both": ({}, {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2}),
    "LLaMA": (
        LLAMA | {"normalization": "RMSNorm"},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "Qwen": (
        LLAMA | {"add_qkv_bias": True, "qk_layernorm": True},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    "wide heads, interleaved": (
        LLAMA | {"kv_channels": 32, "position_embedding_type": "none", "global_batch_size": 32},
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
    "an uneven pipeline": (
        LLAMA,
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    ),
    "a loss accounted for": (
        LLAMA | {"num_layers": 7},
        {"pipeline_model_parallel_size": 4, "account_for_loss_in_pipeline_split": True},
    ),
    "a layout with a separate stage for the embedding": (
        LLAMA | {"global_batch_size": 32},
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|tt|t|tL"},
    ),
    "one key head over four ranks": (
        LLAMA | {"num_query_groups": 1, "add_qkv_bias": True},
        {"tensor_model_parallel_size": 4},
    ),
    "SwiGLU with biases and norms of two vectors": (
        {"swiglu": True, "qk_layernorm": True},
        {"tensor_model_parallel_size": 4},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_parameters_that_the_closed_form_says(pool: Pool, name: str) -> None:
    model, parallel = CASES[name]
    config = small(16, model, **parallel)
    layout = layout_of(config, 16)
    wanted = [
        stage_parameters(config, VOCAB, layout, rank // (layout.tp * layout.dp))
        for rank in range(16)
    ]
    assert pool.run(1, rehearsed_parameters, config, 16, list(range(16))) == [wanted]
