"""Parameters of one rank's part of the model, counted from the settings."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config import Config, padded_vocab_size
from megatron_chatflow.config.pipeline_layout import split_layers, virtual_pipeline_size


@dataclass(frozen=True)
class Layout:
    """How many processes share what."""

    tp: int
    """Tensor-parallel size: processes that share a layer."""
    pp: int
    """Pipeline-parallel size: stages."""
    vpp: int
    """Model chunks of a stage; 1 without the interleaved schedule."""
    dp: int
    """Data-parallel size: processes with the same part of the model."""


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout of resolved settings over `world_size` processes."""
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    return Layout(
        tp, pp, virtual_pipeline_size(p, config.model.num_layers), world_size // (tp * pp)
    )


def stage_layers(config: Config, stage: int) -> list[int]:
    """Numbers (from 0) of the layers of a pipeline stage. Under the interleaved schedule a stage
    holds every pp-th chunk.
    """
    return [
        layer
        for chunk in split_layers(config.parallel, config.model.num_layers)[stage]
        for layer in chunk
    ]


def head_widths(config: Config) -> tuple[int, int]:
    """Elements of all query heads, and of all key (or value) heads, of one token."""
    m = config.model
    return m.num_attention_heads * m.kv_channels, (
        m.num_query_groups or m.num_attention_heads
    ) * m.kv_channels


def layer_matrices(config: Config) -> int:
    """Elements of the four weight matrices of one layer (query-key-value, projection, and the two
    of the feed-forward layer) on one tensor rank.
    """
    m, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, groups = head_widths(config)
    return (
        m.hidden_size * (2 * heads + 2 * groups + m.ffn_hidden_size * (3 if m.swiglu else 2)) // tp
    )


def layer_parameters(config: Config) -> int:
    """Parameters of one layer on one tensor rank. Norms and the biases of the two projections back
    into the residual stream are whole on each.
    """
    m, tp = config.model, config.parallel.tensor_model_parallel_size
    heads, groups = head_widths(config)
    per_norm = 2 if m.normalization == "LayerNorm" else 1
    count = (
        layer_matrices(config)
        + 2 * per_norm * m.hidden_size
        + (2 * per_norm * m.kv_channels if m.qk_layernorm else 0)
    )
    if m.add_bias_linear:
        return (
            count
            + (heads + 2 * groups + m.ffn_hidden_size * (2 if m.swiglu else 1)) // tp
            + 2 * m.hidden_size
        )
    return count + ((heads + 2 * groups) // tp if m.add_qkv_bias else 0)


def stage_parameters(config: Config, vocab_size: int, layout: Layout, stage: int) -> int:
    """Parameters on one rank of a pipeline stage, padding of the vocabulary included.

    The last stage of several holds the output layer also where it is tied to the input embedding:
    as a copy.

    Args:
        config: resolved settings.
        vocab_size: size before padding.
        layout: of the run.
        stage: 0 to pp - 1.
    """
    m = config.model
    first, last = stage == 0, stage == layout.pp - 1
    embedding = padded_vocab_size(config, vocab_size) // layout.tp * m.hidden_size
    count = len(stage_layers(config, stage)) * layer_parameters(config)
    if first:
        count += embedding + (
            m.max_position_embeddings * m.hidden_size
            if m.position_embedding_type == "learned_absolute"
            else 0
        )
    if last:
        count += m.hidden_size * (2 if m.normalization == "LayerNorm" else 1)
        if m.untie_embeddings_and_output_weights or not first:
            count += embedding
    return count
