"""Bytes on one rank: weights, gradients, optimizer, activations; and the size of a checkpoint.

The activations follow Korthikanti et al. 2022 (arXiv 2205.05198), section 4: what the backward pass
needs is counted tensor by tensor. Where the paper's layer (LayerNorm, GELU, 4 h wide, 16 bit, all
heads with keys of their own) is meant, the terms add up to its equations.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_chatflow.config import Config, padded_vocab_size
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
"""Share of a device's memory that is left to what is not counted: the CUDA context, NCCL's buffers,
kernels' workspaces, gradients of activations in the backward pass, and fragmentation."""


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage; all but the first three in bytes."""

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
        """All bytes."""
        return (
            self.weights
            + self.fp8_weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
        )


def element_size(config: Config) -> int:
    """Bytes of one element of weights and activations."""
    return 2 if config.training.bf16 else 4


def optimizer_bytes(config: Config) -> int:
    """Bytes that the optimizer keeps for a parameter: the float32 main copy under bf16, and Adam's
    two float32 moments or SGD's momentum.
    """
    o = config.optimizer
    return (4 if config.training.bf16 else 0) + (
        8 if o.optimizer == "adam" else 4 if o.sgd_momentum else 0
    )


def gradient_bytes(config: Config) -> int:
    """Bytes of one element of the gradient buffer."""
    return 4 if config.training.accumulate_allreduce_grads_in_fp32 else element_size(config)


def fp8_layers(config: Config, layers: list[int]) -> int:
    """How many of these layers compute in FP8."""
    p = config.precision
    if p.fp8_format is None:
        return 0
    if not p.first_last_layers_bf16:
        return len(layers)
    inside = range(
        p.num_layers_at_start_in_bf16, config.model.num_layers - p.num_layers_at_end_in_bf16
    )
    return sum(layer in inside for layer in layers)


def layer_activations(config: Config, *, fp8: bool = False) -> int:
    """Bytes that one token leaves behind in one layer on one rank, until its backward pass.

    Attention is taken to be fused (Transformer Engine, or scaled_dot_product_attention): nothing of
    the size seq_length x seq_length is kept, only its output and a float32 a head. Norms are taken
    to keep their input and float32 statistics; SwiGLU its input. What `recompute_granularity
    selective` computes again is left out; what `full` does is `stage_activations`' matter.

    Args:
        config: resolved settings.
        fp8: whether the layer computes in FP8: then the inputs of its four products are kept in one
        byte.
    """
    m, p, t, e = config.model, config.parallel, config.training, element_size(config)
    tp, h, ffn = p.tensor_model_parallel_size, m.hidden_size, m.ffn_hidden_size
    heads, groups = head_widths(config)
    again = t.recompute_modules if t.recompute_granularity == "selective" else []
    product = 1 if fp8 else e
    rotary = m.position_embedding_type == "rope"
    statistics = 8 if m.normalization == "LayerNorm" else 4
    outside = 2 * h * e  # inputs of both norms
    if (
        "layernorm" not in again
    ):  # their statistics; inputs of query-key-value and of the first feed-forward product
        outside += 2 * statistics + h * product + h * (e if "mlp" in again else product)
    outside += 2 * h if m.hidden_dropout else 0  # two masks
    attention = (heads + 2 * groups) * e + heads * e  # q, k and v in one buffer; the output
    attention += 4 * m.num_attention_heads if "core_attn" not in again else 0  # log-sum-exp
    attention += (
        (heads + groups) * e if rotary or m.qk_layernorm else 0
    )  # q and k rotated or normalised, while v holds the buffer
    if (
        groups < tp * m.kv_channels
    ):  # fewer key heads than ranks: queries, keys and values of all ranks are gathered
        attention += (tp - 1) * (heads + 2 * groups) * e + (tp * m.kv_channels - groups) * e
    attention += statistics * (heads + groups) // m.kv_channels if m.qk_layernorm else 0
    attention += (
        heads * e if groups < heads and (m.qk_layernorm or not rotary) else 0
    )  # q of several heads a group, taken out of the buffer
    attention += (
        heads if fp8 else 0
    )  # the projection's input, beside the output that attention itself needs
    feed_forward = (
        (2 * ffn if m.swiglu else ffn) * e + ffn * product if "mlp" not in again else 0
    )  # before and after the activation function
    tables = (
        2 * int(m.kv_channels * m.rotary_percent) * e // t.micro_batch_size if rotary else 0
    )  # cosines and sines for q and for k
    return outside // (tp if p.sequence_parallel else 1) + (attention + feed_forward) // tp + tables


def chunk_activations(config: Config, layer: float, layers: float) -> tuple[float, float]:
    """(Bytes that one token leaves behind in one model chunk, bytes that it takes for a while where
    layers are computed again).

    Args:
        config: resolved settings.
        layer: bytes of one of its layers without `recompute_granularity full`.
        layers: in the chunk.
    """
    t = config.training
    if t.recompute_granularity != "full":
        return layers * layer, 0
    whole = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    border = (
        config.model.hidden_size * element_size(config) / whole
    )  # what goes into a group of layers
    if not layers:
        return 0, 0
    if t.recompute_method == "uniform":
        return layers / t.recompute_num_layers * border, t.recompute_num_layers * layer
    again = min(t.recompute_num_layers, layers)
    return again * border + (layers - again) * layer, layer


def stage_activations(config: Config, layout: Layout, stage: int) -> int:
    """Bytes of activations on one rank of a pipeline stage when most micro-batches are in flight,
    logits left out.
    """
    m, t, e = config.model, config.training, element_size(config)
    tokens = config.data.seq_length * t.micro_batch_size
    whole = layout.tp if config.parallel.sequence_parallel else 1
    layers = stage_layers(config, stage)
    in_fp8 = fp8_layers(config, layers)
    a_token = in_fp8 * layer_activations(config, fp8=True) + (
        len(layers) - in_fp8
    ) * layer_activations(config)
    flying = chunks_in_flight(layout, stage, micro_batches(config, layout))
    kept, again = chunk_activations(config, a_token / max(1, len(layers)), len(layers) / layout.vpp)
    held = int(tokens * (kept * flying + again))
    if stage == 0 and m.hidden_dropout:
        held += tokens * m.hidden_size // whole * -(-flying // layout.vpp)  # the embedding's mask
    if layout.pp > 1:
        held += tokens * m.hidden_size * e // whole * flying  # what each chunk sent on
    if stage == layout.pp - 1:
        held += (
            2 * tokens * m.hidden_size * e // whole
        )  # inputs of the last norm and of the output layer, of one micro-batch
    return held


def stage_logits(config: Config, vocab_size: int, layout: Layout, stage: int) -> int:
    """Bytes of one micro-batch's logits on one rank of a pipeline stage: as computed, and in
    float32 for the loss.
    """
    if stage != layout.pp - 1:
        return 0
    columns = padded_vocab_size(config, vocab_size) // layout.tp
    return (
        config.data.seq_length
        * config.training.micro_batch_size
        * columns
        * (6 if config.training.bf16 else 4)
    )


def stage_memory(config: Config, vocab_size: int, layout: Layout, stage: int) -> StageMemory:
    """What one rank of a pipeline stage holds when it is fullest.

    The distributed optimizer's part is a data-parallel rank's; without it every rank keeps the
    state of all its parameters.

    Args:
        config: resolved settings.
        vocab_size: size before padding.
        layout: of the run.
        stage: 0 to pp - 1.
    """
    layers = stage_layers(config, stage)
    count = stage_parameters(config, vocab_size, layout, stage)
    matrices = fp8_layers(config, layers) * layer_matrices(config, layout.tp)
    replaced = matrices if config.precision.fp8_param_gather else 0
    return StageMemory(
        stage=stage,
        layers=len(layers),
        parameters=count,
        weights=(count - replaced) * element_size(config),
        fp8_weights=2 * matrices,
        gradients=count * gradient_bytes(config),
        optimizer=-(
            -count
            * optimizer_bytes(config)
            // (layout.dp if config.parallel.use_distributed_optimizer else 1)
        ),
        activations=stage_activations(config, layout, stage),
        logits=stage_logits(config, vocab_size, layout, stage),
    )


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint of a model with so many parameters, the vocabulary's padding
    included: weights, and the optimizer's state unless it is not saved."""
    return parameters * (
        element_size(config) + (0 if config.checkpoint.no_save_optim else optimizer_bytes(config))
    )


def cures(config: Config, dp: int, activations: float) -> str:
    """What would lower the memory of the fullest stage.

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
