"""Parameters and operations of the model and of one rank's part of it, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config import Config, ModelConfig, padded_vocab_size
from megatron_chatflow.config.pipeline_layout import split_layers, virtual_pipeline_size


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups of processes."""

    tp: int
    """Tensor-parallel size: processes that share a layer."""
    pp: int
    """Pipeline-parallel size: stages."""
    vpp: int
    """Model chunks per stage; 1 without the interleaved schedule."""
    dp: int
    """Data-parallel size: processes with the same part of the model."""


def layout_of(config: Config, world_size: int) -> Layout:
    """Return the layout of resolved settings over `world_size` processes."""
    p = config.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    return Layout(
        tp, pp, virtual_pipeline_size(p, config.model.num_layers), world_size // (tp * pp)
    )


def stage_layers(config: Config, stage: int) -> list[int]:
    """Return the layers (from 0) of a pipeline stage.

    With the interleaved schedule a stage holds every pp-th chunk.
    """
    return [
        layer
        for chunk in split_layers(config.parallel, config.model.num_layers)[stage]
        for layer in chunk
    ]


def head_widths(config: ModelConfig) -> tuple[int, int]:
    """Return the elements of all query heads, and of all key (or value) heads, of one token."""
    m = config.model
    return m.num_attention_heads * m.kv_channels, m.key_value_heads * m.kv_channels


def layer_matrices(config: ModelConfig, tp: int) -> int:
    """Return the elements of the weight matrices of one layer on one tensor-parallel rank.

    They are query-key-value, projection and the two of the feed-forward layer.
    """
    m = config.model
    queries, keys = head_widths(config)
    attention = 2 * queries + 2 * keys  # query-key-value, projection
    feed_forward = m.ffn_hidden_size * (3 if m.swiglu else 2)
    return m.hidden_size * (attention + feed_forward) // tp


def layer_parameters(config: ModelConfig, tp: int) -> int:
    """Return the parameters of one layer on one tensor-parallel rank.

    Norms and the biases of the two projections back into the residual stream are complete on each.
    """
    m = config.model
    queries, keys = head_widths(config)
    count = layer_matrices(config, tp) + 2 * norm_parameters(config, m.hidden_size)
    if m.qk_layernorm:
        count += 2 * norm_parameters(config, m.kv_channels)
    qkv_bias, fc1_bias = queries + 2 * keys, m.ffn_hidden_size * (2 if m.swiglu else 1)
    if m.add_bias_linear:
        count += (qkv_bias + fc1_bias) // tp + 2 * m.hidden_size
    elif m.add_qkv_bias:
        count += qkv_bias // tp
    return count


def norm_parameters(config: ModelConfig, width: int) -> int:
    """Return the parameters of one norm over `width` elements: a bias only in LayerNorm."""
    return width * (2 if config.model.normalization == "LayerNorm" else 1)


def position_parameters(config: ModelConfig) -> int:
    """Return the parameters of the table of learned positions, 0 without one."""
    m = config.model
    learned = m.position_embedding_type == "learned_absolute"
    return m.max_position_embeddings * m.hidden_size if learned else 0


def stage_parameters(config: ModelConfig, vocab_size: int, layout: Layout, stage: int) -> int:
    """Return the parameters on one rank of a pipeline stage, padding of the vocabulary included.

    The last stage of several holds a copy of the input embedding where it is tied to the output
    layer.

    Args:
        config: resolved settings.
        vocab_size: size before padding.
        layout: of the run.
        stage: 0 to pp - 1.
    """
    m = config.model
    first, last = stage == 0, stage == layout.pp - 1
    embedding = padded_vocab_size(config, vocab_size) // layout.tp * m.hidden_size
    count = len(stage_layers(config, stage)) * layer_parameters(config, layout.tp)
    if first:
        count += embedding + position_parameters(config)
    if last:
        count += norm_parameters(config, m.hidden_size)
        if m.untie_embeddings_and_output_weights or not first:
            count += embedding
    return count


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the parameters of the entire model, padding of the vocabulary left out."""
    m = config.model
    embeddings = 2 if m.untie_embeddings_and_output_weights else 1
    return (
        m.num_layers * layer_parameters(config, tp=1)
        + norm_parameters(config, m.hidden_size)
        + embeddings * vocab_size * m.hidden_size
        + position_parameters(config)
    )


def scaling_law_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return N of the scaling laws: non-embedding parameters and the output layer.

    The tables of input embeddings and learned positions are left out. A tied embedding is the
    output layer, so it is counted once. The padding of the vocabulary is left out.
    """
    untied = config.model.untie_embeddings_and_output_weights
    tables = position_parameters(config) + untied * vocab_size * config.model.hidden_size
    return count_parameters(config, vocab_size) - tables


def flops_per_token(config: ModelConfig, vocab_size: int) -> float:
    """Return the floating-point operations of training on one token.

    They are 6 per matrix parameter, and 12 x seq_length x head width per layer for attention.
    Counted as Megatron does: full (not halved) causal attention, the padded output layer, no
    recomputation.
    """
    m = config.model
    queries, _ = head_widths(config)
    output_layer = padded_vocab_size(config, vocab_size) * m.hidden_size
    matrices = m.num_layers * layer_matrices(config, tp=1) + output_layer
    return 6.0 * matrices + 12.0 * m.num_layers * config.data.seq_length * queries
