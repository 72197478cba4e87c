"""FP8 settings that contradict each other, the model or the batch: what would run in another way
than was written, or stop on the cluster.
"""

from __future__ import annotations

import dataclasses

from megatron_chatflow.config.schema import Config, PrecisionSettings
from megatron_chatflow.errors import ConfigError

OF_DELAYED = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "tp_only_amax_red")
"""Settings that only the delayed recipe reads."""


def check_precision(config: Config) -> None:
    """Refuse contradictions among the FP8 settings. Layout and batches are resolved already. Raises
    ConfigError with both names and the cure.
    """
    p = config.precision
    if p.fp8_format is None:
        for name in _given(p):
            raise ConfigError(
                f"{name} {_value(p, name)}has no effect without fp8_format; add "
                f"--fp8-format hybrid or drop {_flag(name)}"
            )
        return
    if not config.training.bf16:
        raise ConfigError(
            f"fp8_format {p.fp8_format} needs bf16 for all that is not FP8; add --bf16 or "
            f"drop --fp8-format"
        )
    _check_recipe(p)
    _check_bf16_layers(config)
    _check_parameters(config)
    _check_sides(config)
    _check_tokens(config)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(precision: PrecisionSettings, name: str) -> str:
    value = getattr(precision, name)
    return "" if value is True else f"{value} "


def _given(precision: PrecisionSettings) -> list[str]:
    """Names of the settings that differ from their default."""
    return [
        f.name for f in dataclasses.fields(precision) if getattr(precision, f.name) != f.default
    ]


def _check_recipe(p: PrecisionSettings) -> None:
    if p.fp8_recipe in ("blockwise", "mxfp8") and p.fp8_format == "hybrid":
        raise ConfigError(
            f"fp8_format hybrid with fp8_recipe {p.fp8_recipe} would make gradients E5M2, "
            f"and blocks this small have no need of its range; "
            "write --fp8-format e4m3"
        )
    if p.fp8_amax_history_len < 1:
        raise ConfigError(
            "fp8_amax_history_len is 0; give --fp8-amax-history-len a positive number"
        )
    if p.fp8_recipe == "delayed":
        if p.fp8_amax_compute_algo == "most_recent" and p.fp8_amax_history_len > 1:
            raise ConfigError(
                f"fp8_amax_history_len {p.fp8_amax_history_len} has no effect with "
                f"fp8_amax_compute_algo most_recent; "
                "write --fp8-amax-compute-algo max or drop --fp8-amax-history-len"
            )
        if p.first_last_layers_bf16:
            raise ConfigError(
                "first_last_layers_bf16 does not go with fp8_recipe delayed, whose scales "
                "are updated for all layers at once; choose another "
                "--fp8-recipe or drop --first-last-layers-bf16"
            )
        return
    for name in OF_DELAYED:
        if name in _given(p):
            raise ConfigError(
                f"{name} {_value(p, name)}has no effect with fp8_recipe {p.fp8_recipe}; "
                f"drop {_flag(name)} or write --fp8-recipe delayed"
            )


def _check_bf16_layers(config: Config) -> None:
    p, layers, stages = (
        config.precision,
        config.model.num_layers,
        config.parallel.pipeline_model_parallel_size,
    )
    names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    if not p.first_last_layers_bf16:
        for name in names:
            if name in _given(p):
                raise ConfigError(
                    f"{name} {getattr(p, name)} has no effect without "
                    f"first_last_layers_bf16; add --first-last-layers-bf16 or drop "
                    f"{_flag(name)}"
                )
        return
    for name in names:
        if getattr(p, name) > layers // stages:
            raise ConfigError(
                f"{name} {getattr(p, name)} is more than the {layers // stages} layers of a "
                f"pipeline stage; lower {_flag(name)}"
            )
    if p.num_layers_at_start_in_bf16 + p.num_layers_at_end_in_bf16 >= layers:
        raise ConfigError(
            f"num_layers_at_start_in_bf16 {p.num_layers_at_start_in_bf16} and "
            f"num_layers_at_end_in_bf16 {p.num_layers_at_end_in_bf16} leave none of "
            f"{layers} layers for fp8_format {p.fp8_format}; lower one of them or drop --fp8-format"
        )


def _check_parameters(config: Config) -> None:
    p = config.precision
    if not p.fp8_param_gather:
        return
    if not config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "fp8_param_gather needs use_distributed_optimizer; add "
            "--use-distributed-optimizer or drop --fp8-param-gather"
        )
    if p.fp8_recipe == "mxfp8":
        raise ConfigError(
            "fp8_param_gather is not supported with fp8_recipe mxfp8, whose weights would "
            "have to be kept twice; drop --fp8-param-gather"
        )
    if config.training.use_cpu_initialization:
        raise ConfigError(
            "fp8_param_gather contradicts use_cpu_initialization, which fills weights in "
            "place; drop one of them"
        )


def _check_sides(config: Config) -> None:
    """Every matrix of a layer, as one tensor-parallel rank holds it, must have sides that the FP8
    kernels take.
    """
    m, p, tp = config.model, config.precision, config.parallel.tensor_model_parallel_size
    multiple = 32 if p.fp8_recipe == "mxfp8" else 16
    groups = m.num_query_groups or m.num_attention_heads
    share = f" / tensor_model_parallel_size {tp}" if tp > 1 else ""
    for what, size, cure in (
        ("hidden_size", m.hidden_size, "--hidden-size"),
        (
            f"num_attention_heads x kv_channels{share}",
            m.num_attention_heads * m.kv_channels // tp,
            "--num-attention-heads or --kv-channels",
        ),
        (
            f"(num_attention_heads + 2 x num_query_groups) x kv_channels{share}",
            (m.num_attention_heads + 2 * groups) * m.kv_channels // tp,
            "--num-query-groups or --kv-channels",
        ),
        (f"ffn_hidden_size{share}", m.ffn_hidden_size // tp, "--ffn-hidden-size"),
    ):
        if size % multiple:
            raise ConfigError(
                f"{what} is {size}, not a multiple of {multiple}, which fp8_recipe "
                f"{p.fp8_recipe} needs; change {cure} or drop --fp8-format"
            )


def _check_tokens(config: Config) -> None:
    p, tp = config.precision, config.parallel.tensor_model_parallel_size
    sharded = config.parallel.sequence_parallel
    tokens = config.data.seq_length * config.training.micro_batch_size // (tp if sharded else 1)
    multiple = {"mxfp8": 32, "blockwise": 128 if sharded else 8}.get(p.fp8_recipe, 8)
    what = "seq_length x micro_batch_size" + (
        f" / tensor_model_parallel_size {tp} (sequence_parallel)" if sharded else ""
    )
    if tokens % multiple:
        raise ConfigError(
            f"{what} is {tokens}, not a multiple of {multiple}, which fp8_recipe "
            f"{p.fp8_recipe} needs; change --seq-length or --micro-batch-size"
        )
    if sharded and p.fp8_recipe == "blockwise" and config.model.hidden_size % 128:
        raise ConfigError(
            f"hidden_size {config.model.hidden_size} is not a multiple of 128, which "
            f"fp8_recipe blockwise needs with sequence_parallel; "
            "change --hidden-size or drop --sequence-parallel"
        )
