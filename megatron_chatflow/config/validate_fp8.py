"""Check the FP8 settings against the model, the layout and the batch.

What would run differently from what was written, or would fail on the cluster, is an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_chatflow.config.schema import ModelConfig
from megatron_chatflow.config.schema.precision import BF16_LAYERS
from megatron_chatflow.config.schema.section import flag_name


def _bf16(config: ModelConfig) -> Iterator[str]:
    if config.precision.fp8_format is not None and not config.training.bf16:
        yield (
            f"fp8_format {config.precision.fp8_format} needs bf16 for all that is not FP8; add "
            "--bf16 or drop --fp8-format"
        )


def _bf16_layers(config: ModelConfig) -> Iterator[str]:
    p, layers = config.precision, config.model.num_layers
    if p.fp8_format is None or not p.first_last_layers_bf16:
        return
    per_stage = layers // config.parallel.pipeline_model_parallel_size
    for name in BF16_LAYERS:
        if getattr(p, name) > per_stage:
            yield (
                f"{name} {getattr(p, name)} is more than the {per_stage} layers of a "
                f"pipeline stage; lower {flag_name(name)}"
            )
    if p.num_layers_at_start_in_bf16 + p.num_layers_at_end_in_bf16 >= layers:
        yield (
            f"num_layers_at_start_in_bf16 {p.num_layers_at_start_in_bf16} and "
            f"num_layers_at_end_in_bf16 {p.num_layers_at_end_in_bf16} leave none of "
            f"{layers} layers for fp8_format {p.fp8_format}; lower one of them or drop --fp8-format"
        )


def _parameters(config: ModelConfig) -> Iterator[str]:
    if not config.precision.fp8_param_gather:
        return
    if not config.parallel.use_distributed_optimizer:
        yield (
            "fp8_param_gather needs use_distributed_optimizer; add "
            "--use-distributed-optimizer or drop --fp8-param-gather"
        )
    if config.training.use_cpu_initialization:
        yield (
            "fp8_param_gather contradicts use_cpu_initialization, which fills weights in "
            "place; drop one of them"
        )


def _matrix_sides(config: ModelConfig) -> Iterator[str]:
    """Check that the FP8 kernels take the sides of every matrix on one tensor-parallel rank."""
    m, p, tp = config.model, config.precision, config.parallel.tensor_model_parallel_size
    if p.fp8_format is None:
        return
    multiple = 32 if p.fp8_recipe == "mxfp8" else 16
    heads, groups = m.num_attention_heads, m.key_value_heads
    share = f" / tensor_model_parallel_size {tp}" if tp > 1 else ""
    for what, size, flags in (
        ("hidden_size", m.hidden_size, "--hidden-size"),
        (
            f"num_attention_heads x kv_channels{share}",
            heads * m.kv_channels // tp,
            "--num-attention-heads or --kv-channels",
        ),
        (
            f"(num_attention_heads + 2 x num_query_groups) x kv_channels{share}",
            (heads + 2 * groups) * m.kv_channels // tp,
            "--num-query-groups or --kv-channels",
        ),
        (f"ffn_hidden_size{share}", m.ffn_hidden_size // tp, "--ffn-hidden-size"),
    ):
        if size % multiple:
            yield (
                f"{what} is {size}, not a multiple of {multiple}, which fp8_recipe "
                f"{p.fp8_recipe} needs; change {flags} or drop --fp8-format"
            )


def _tokens(config: ModelConfig) -> Iterator[str]:
    """Check that the FP8 kernels take the number of tokens of a micro-batch on one rank."""
    p, tp = config.precision, config.parallel.tensor_model_parallel_size
    if p.fp8_format is None:
        return
    sharded = config.parallel.sequence_parallel
    tokens = config.data.seq_length * config.training.micro_batch_size // (tp if sharded else 1)
    multiple = {"mxfp8": 32, "blockwise": 128 if sharded else 8}.get(p.fp8_recipe, 8)
    share = f" / tensor_model_parallel_size {tp} (sequence_parallel)" if sharded else ""
    if tokens % multiple:
        yield (
            f"seq_length x micro_batch_size{share} is {tokens}, not a multiple of {multiple}, "
            f"which fp8_recipe {p.fp8_recipe} needs; change --seq-length or --micro-batch-size"
        )
    if sharded and p.fp8_recipe == "blockwise" and config.model.hidden_size % 128:
        yield (
            f"hidden_size {config.model.hidden_size} is not a multiple of 128, which "
            "fp8_recipe blockwise needs with sequence_parallel; "
            "change --hidden-size or drop --sequence-parallel"
        )


FP8_CHECKS: tuple[tuple[str, Callable[[ModelConfig], Iterator[str]], tuple[str, ...]], ...] = (
    ("fp8 bf16", _bf16, ("precision", "training")),
    ("fp8 layers", _bf16_layers, ("precision", "model", "parallel")),
    ("fp8 parameters", _parameters, ("precision", "training", "parallel")),
    ("fp8 sides", _matrix_sides, ("precision", "tensor")),
    ("fp8 tokens", _tokens, ("precision", "training", "data", "sequence")),
)
"""(name, check, the sections and the checks of `config/validate.py` that it needs without error)"""
