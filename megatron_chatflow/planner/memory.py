"""Bytes on one rank: weights, gradients, optimizer, activations; and the size of a checkpoint.

The activations follow Korthikanti et al. 2022 (arXiv 2205.05198), section 4: what the backward pass
needs is counted tensor by tensor. For the paper's layer (LayerNorm, GELU, width 4 h, 16 bit, one
key head per query head) the terms add up to its equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config import Config, ModelConfig, padded_vocab_size
from megatron_chatflow.planner.batches import chunks_in_flight, micro_batches
from megatron_chatflow.planner.parameters import (
    Layout,
    head_widths,
    layer_matrices,
    stage_layers,
    stage_parameters,
)

GIB = 2**30
RESERVE = 0.1
"""Fraction of a device's memory reserved for what is not counted: the CUDA context, NCCL's buffers,
kernel workspaces, gradients of activations in the backward pass, and fragmentation."""


@dataclass(frozen=True)
class StageMemory:
    """The memory of one rank of a pipeline stage; all but the first three fields in bytes."""

    stage: int
    layers: int
    parameters: int
    weights: int
    fp8_weights: int
    """FP8 copies of the layers' matrices that Transformer Engine keeps between micro-batches."""
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return (
            self.weights
            + self.fp8_weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
        )


def element_size(config: Config) -> int:
    """Return the bytes of one element of weights and activations."""
    return 2 if config.training.bf16 else 4


def optimizer_bytes(config: Config) -> int:
    """Return the bytes of optimizer state per parameter.

    They are the float32 main copy under bf16, and Adam's two float32 moments or SGD's momentum.
    """
    o = config.optimizer
    moments = 8 if o.optimizer == "adam" else 4 if o.sgd_momentum else 0
    return moments + (4 if config.training.bf16 else 0)


def gradient_bytes(config: Config) -> int:
    """Return the bytes of one element of the gradient buffer."""
    return 4 if config.training.accumulate_allreduce_grads_in_fp32 else element_size(config)


def fp8_layers(config: Config, layers: list[int]) -> int:
    """Return how many of these layers compute in FP8."""
    p = config.precision
    if p.fp8_format is None:
        return 0
    if not p.first_last_layers_bf16:
        return len(layers)
    inside = range(
        p.num_layers_at_start_in_bf16, config.model.num_layers - p.num_layers_at_end_in_bf16
    )
    return sum(layer in inside for layer in layers)


def layer_activations(config: ModelConfig, *, fp8: bool = False) -> int:
    """Return the bytes per token that one layer keeps on one rank until its backward pass.

    Attention is taken to be fused (Transformer Engine, or scaled_dot_product_attention): it keeps
    its output and one float32 per head, nothing of the size seq_length x seq_length. Norms are
    taken to keep their input and float32 statistics, SwiGLU its input. What `recompute_granularity
    selective` recomputes is left out; `stage_activations` accounts for `full`.

    Args:
        config: resolved settings.
        fp8: whether the layer computes in FP8, which stores the inputs of its four products in one
            byte.
    """
    m, p, t, e = config.model, config.parallel, config.training, element_size(config)
    tp, h, ffn = p.tensor_model_parallel_size, m.hidden_size, m.ffn_hidden_size
    queries, keys = head_widths(config)
    recomputed = (t.recompute_modules or []) if t.recompute_granularity == "selective" else []
    product = 1 if fp8 else e  # bytes of an element of a product's input
    rotary = m.position_embedding_type == "rope"
    statistics = 8 if m.normalization == "LayerNorm" else 4

    # The residual stream, [h] per token, split over the ranks by sequence parallelism only: the
    # inputs of both norms, their statistics, their outputs (the inputs of the query-key-value and
    # of the first feed-forward product), two dropout masks.
    residual = 2 * h * e
    if "layernorm" not in recomputed:
        residual += 2 * statistics + h * product + h * (e if "mlp" in recomputed else product)
    if m.hidden_dropout:
        residual += 2 * h

    # Attention, [queries] and [keys] per token, split over the tensor-parallel ranks: queries, keys
    # and values in one buffer, and the output.
    attention = (queries + 2 * keys) * e + queries * e
    if "core_attn" not in recomputed:
        attention += 4 * m.num_attention_heads  # log-sum-exp
    if rotary or m.qk_layernorm:
        attention += (queries + keys) * e  # rotated or normalized copies; values hold the buffer
    if keys < tp * m.kv_channels:  # fewer key heads than ranks: gathered from all ranks
        attention += (tp - 1) * (queries + 2 * keys) * e + (tp * m.kv_channels - keys) * e
    if m.qk_layernorm:
        attention += statistics * (queries + keys) // m.kv_channels
    if keys < queries and (m.qk_layernorm or not rotary):
        attention += queries * e  # queries of several heads per group, copied out of the buffer
    if fp8:
        attention += queries  # the projection's input, in addition to attention's own output

    # The feed-forward layer, [ffn] per token, split likewise: before and after the activation.
    feed_forward = 0
    if "mlp" not in recomputed:
        feed_forward = (2 * ffn if m.swiglu else ffn) * e + ffn * product

    # Cosines and sines for queries and for keys, one table per micro-batch.
    tables = 2 * int(m.kv_channels * m.rotary_percent) * e // t.micro_batch_size if rotary else 0
    shards = tp if p.sequence_parallel else 1
    return residual // shards + (attention + feed_forward) // tp + tables


def chunk_activations(config: ModelConfig, layer: float, layers: float) -> tuple[float, float]:
    """Return (bytes per token that one model chunk keeps, bytes during recomputation).

    Args:
        config: resolved settings.
        layer: bytes of one of its layers without `recompute_granularity full`.
        layers: in the chunk.
    """
    t, p = config.training, config.parallel
    count = t.recompute_num_layers
    if t.recompute_granularity != "full" or count is None:
        return layers * layer, 0
    if not layers:
        return 0, 0
    shards = p.tensor_model_parallel_size if p.sequence_parallel else 1
    group_input = config.model.hidden_size * element_size(config) / shards
    if t.recompute_method == "uniform":
        return layers / count * group_input, count * layer
    recomputed = min(count, layers)
    return recomputed * group_input + (layers - recomputed) * layer, layer


def stage_activations(config: ModelConfig, layout: Layout, stage: int) -> int:
    """Return the bytes of activations on one rank of a pipeline stage at the peak.

    That is when most micro-batches are in flight. Logits are left out.
    """
    m, t, e = config.model, config.training, element_size(config)
    tokens = config.data.seq_length * t.micro_batch_size
    shards = layout.tp if config.parallel.sequence_parallel else 1
    border = tokens * m.hidden_size // shards  # elements between two layers

    # The layers: a mean layer, as the chunks of a stage may mix FP8 and bfloat16 layers.
    layers = stage_layers(config, stage)
    in_fp8 = fp8_layers(config, layers)
    per_token = in_fp8 * layer_activations(config, fp8=True)
    per_token += (len(layers) - in_fp8) * layer_activations(config)
    in_flight = chunks_in_flight(layout, stage, micro_batches(config, layout))
    kept, recomputed = chunk_activations(
        config, per_token / max(1, len(layers)), len(layers) / layout.vpp
    )
    total = int(tokens * (kept * in_flight + recomputed))

    # What is outside the layers.
    if stage == 0 and m.hidden_dropout:
        total += border * -(-in_flight // layout.vpp)  # the embedding's dropout mask
    if layout.pp > 1:
        total += tokens * m.hidden_size * e // shards * in_flight  # outputs of the chunks
    if stage == layout.pp - 1:
        # Inputs of the last norm and of the output layer, of one micro-batch.
        total += 2 * tokens * m.hidden_size * e // shards
    return total


def stage_logits(config: ModelConfig, vocab_size: int, layout: Layout, stage: int) -> int:
    """Return the bytes of one micro-batch's logits on one rank of a pipeline stage.

    They are kept as computed, and in float32 for the loss.
    """
    if stage != layout.pp - 1:
        return 0
    columns = padded_vocab_size(config, vocab_size) // layout.tp
    per_element = 6 if config.training.bf16 else 4
    return config.data.seq_length * config.training.micro_batch_size * columns * per_element


def stage_memory(config: ModelConfig, vocab_size: int, layout: Layout, stage: int) -> StageMemory:
    """Return the memory of one rank of a pipeline stage at the peak.

    With the distributed optimizer the optimizer state is that of one data-parallel rank; without it
    every rank keeps the state of all its parameters.

    Args:
        config: resolved settings.
        vocab_size: size before padding.
        layout: of the run.
        stage: 0 to pp - 1.
    """
    layers = stage_layers(config, stage)
    count = stage_parameters(config, vocab_size, layout, stage)
    matrices = fp8_layers(config, layers) * layer_matrices(config, layout.tp)
    shards = layout.dp if config.parallel.use_distributed_optimizer else 1
    replaced = matrices if config.precision.fp8_param_gather else 0
    return StageMemory(
        stage=stage,
        layers=len(layers),
        parameters=count,
        weights=(count - replaced) * element_size(config),
        fp8_weights=2 * matrices,
        gradients=count * gradient_bytes(config),
        optimizer=-(-count * optimizer_bytes(config) // shards),
        activations=stage_activations(config, layout, stage),
        logits=stage_logits(config, vocab_size, layout, stage),
    )


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Return the bytes of one checkpoint: weights, and the optimizer state unless it is not saved.

    Args:
        config: resolved settings.
        parameters: of the entire model, padding of the vocabulary included.
    """
    state = 0 if config.checkpoint.no_save_optim else optimizer_bytes(config)
    return parameters * (element_size(config) + state)


def memory_advice(config: Config, dp: int, activations: float) -> str:
    """Return the flags that would lower the memory of the stage that needs most.

    Args:
        config: resolved settings.
        dp: data-parallel size.
        activations: their share of that stage's memory.
    """
    p, t = config.parallel, config.training
    found = ["raise --tensor-model-parallel-size or --pipeline-model-parallel-size"]
    if activations > 0.3 and t.recompute_granularity != "full":
        found.insert(
            0,
            "add --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        )
    if t.micro_batch_size > 1 and activations > 0.3:
        found.insert(0, "lower --micro-batch-size")
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        found.insert(0, "add --sequence-parallel")
    if dp > 1 and not p.use_distributed_optimizer:
        found.insert(0, "add --use-distributed-optimizer")
    return ", ".join(found)
