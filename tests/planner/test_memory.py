"""Bytes of a rank against the papers' formulas and against what torch really keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_chatflow.config import load_values
from megatron_chatflow.planner.memory import (
    checkpoint_bytes,
    chunk_activations,
    layer_activations,
    stage_logits,
    stage_memory,
)
from megatron_chatflow.planner.parameters import layout_of
from tests.planner.measure import LLAMA, VOCAB, saved_in_a_layer, small, states
from tests.pool import Pool


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (4, False), (4, True)])
def test_the_layer_of_korthikanti_takes_34_bytes_a_position(
    tp: int, sequence_parallel: bool
) -> None:
    model = {"hidden_size": 1024, "hidden_dropout": 0.1, "num_attention_heads": 16}
    config = small(
        tp, model, bf16=True, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel
    )
    paper = 1024 * (
        34 / tp if sequence_parallel else 10 + 24 / tp
    )  # equations 2 and 4, without attention's s x s terms (section 5)
    statistics = 16 / (tp if sequence_parallel else 1) + 4 * 16 / tp
    assert layer_activations(config) == paper + statistics


@pytest.mark.parametrize(
    ("distributed", "bytes_a_parameter"),
    [(False, 18), (True, 6 + 12 / 8)],
)
def test_weights_and_states_take_what_megatron_reports(
    distributed: bool, bytes_a_parameter: float
) -> None:
    config = small(8, LLAMA, bf16=True, use_distributed_optimizer=distributed)
    memory = stage_memory(config, VOCAB, layout_of(config, 8), 0)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(
        bytes_a_parameter * memory.parameters, rel=1e-6
    )


def test_logits_are_those_of_one_micro_batch_on_the_last_stage() -> None:
    config = small(
        4, LLAMA, bf16=True, pipeline_model_parallel_size=2, tensor_model_parallel_size=2
    )
    layout = layout_of(config, 4)
    assert stage_logits(config, VOCAB, layout, 0) == 0
    assert stage_logits(config, VOCAB, layout, 1) == 2 * 128 * (1024 // 2) * 6


def test_fp8_keeps_inputs_of_products_in_one_byte_and_the_weights_twice_more() -> None:
    model = LLAMA | {"ffn_hidden_size": 192}
    plain = small(1, model, bf16=True)
    fp8 = small(
        1, model, bf16=True, fp8_format="e4m3", fp8_recipe="blockwise", first_last_layers_bf16=True
    )
    h, heads, ffn = 64, 64, 192
    assert layer_activations(plain) - layer_activations(plain, fp8=True) == 2 * h - heads + ffn
    without, with_fp8 = (
        stage_memory(config, VOCAB, layout_of(config, 1), 0) for config in (plain, fp8)
    )
    assert with_fp8.fp8_weights == 2 * 2 * (
        h * 64 + h * 64 + h * 64 + 3 * h * ffn
    )  # two of four layers; q, k and v, projection
    assert with_fp8.weights == without.weights and with_fp8.activations < without.activations


LOG_SUM_EXP = 4 * 4
"""Bytes a token of four heads: Transformer Engine's attention keeps them, the portable one does
not.
"""
LAYERS = {
    "GPT-2": {},
    "GPT-2 with rotary positions": {"position_embedding_type": "rope"},
    "LLaMA with torch's LayerNorm": LLAMA,
    "LLaMA": LLAMA | {"normalization": "RMSNorm"},
    "norms on queries and keys": LLAMA | {"qk_layernorm": True},
    "neither positions nor biases": LLAMA | {"position_embedding_type": "none"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_autograd_keeps_the_activations_that_the_closed_form_says(pool: Pool, name: str) -> None:
    config = small(1, LAYERS[name])
    (measured,) = pool.run(1, saved_in_a_layer, config)
    assert measured + LOG_SUM_EXP == pytest.approx(layer_activations(config), rel=0.003)


RECOMPUTED = {
    "core_attn": ({"recompute_granularity": "selective"}, 0),
    "mlp": ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, LOG_SUM_EXP),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_keeps_what_the_closed_form_says(pool: Pool, name: str) -> None:
    settings, not_kept = RECOMPUTED[name]
    config = small(1, LLAMA, **settings)
    (measured,) = pool.run(1, saved_in_a_layer, config)
    assert measured + not_kept == pytest.approx(layer_activations(config), rel=0.003)
    assert layer_activations(config) < layer_activations(small(1, LLAMA))


def test_full_recomputation_keeps_the_borders_of_its_groups(pool: Pool) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    config = small(1, LLAMA, recompute_num_layers=1, **full)
    (measured,) = pool.run(1, saved_in_a_layer, config)
    assert measured == pytest.approx(64 * 4, rel=0.003)
    layer = layer_activations(config)
    assert chunk_activations(config, layer, 4) == (4 * 64 * 4, layer)
    assert chunk_activations(small(1, LLAMA, recompute_num_layers=2, **full), layer, 4) == (
        2 * 64 * 4,
        2 * layer,
    )
    block = small(
        1, LLAMA, recompute_granularity="full", recompute_method="block", recompute_num_layers=3
    )
    assert chunk_activations(block, layer, 4) == (3 * 64 * 4 + layer, layer)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_keep_the_activations_that_the_closed_form_says(
    pool: Pool, sequence_parallel: bool
) -> None:
    config = small(2, LLAMA, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    for measured in pool.run(2, saved_in_a_layer, config):
        assert measured + LOG_SUM_EXP / 2 == pytest.approx(layer_activations(config), rel=0.003)


def test_one_key_head_over_two_tensor_ranks_is_counted_with_what_is_gathered(pool: Pool) -> None:
    config = small(2, LLAMA | {"num_query_groups": 1}, tensor_model_parallel_size=2)
    for measured in pool.run(2, saved_in_a_layer, config):
        assert measured + LOG_SUM_EXP / 2 == pytest.approx(layer_activations(config), rel=0.003)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_step_leaves_the_states_that_the_closed_form_says(
    pool: Pool, bf16: bool, distributed: bool
) -> None:
    config = small(2, LLAMA, bf16=bf16, use_distributed_optimizer=distributed)
    memory = stage_memory(config, VOCAB, layout_of(config, 2), 0)
    measured = pool.run(2, states, config)
    for rank in measured:
        assert (rank["weights"], rank["gradients"]) == (memory.weights, memory.gradients)
    assert sum(rank["optimizer"] for rank in measured) / 2 == pytest.approx(
        memory.optimizer, rel=0.001
    )


def test_a_checkpoint_on_disk_has_the_size_that_the_closed_form_says(reference: Path) -> None:
    values = load_values(reference / "config.yaml")
    config = small(1, {}).replace(**values)
    parameters = stage_memory(config, 4096, layout_of(config, 1), 0).parameters
    on_disk = sum(path.stat().st_size for path in (reference / "iter_0000020").rglob("*"))
    assert on_disk == pytest.approx(checkpoint_bytes(config, parameters), rel=0.05)
