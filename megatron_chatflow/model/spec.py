"""Layer specs: which classes megatron-core builds its layers from."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_chatflow.config import Config
from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.distributed import cuda_shim
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.fp8.context import Fp8Context
from megatron_chatflow.fp8.linear import ReferenceColumnParallelLinear, ReferenceRowParallelLinear
from megatron_chatflow.fp8.recipe import is_bf16_layer
from megatron_chatflow.fp8.transformer_engine import device_reason, transformer_engine_reason
from megatron_chatflow.model.attention import PortableAttention
from megatron_chatflow.model.fused import FusedRMSNorm, PortableSwiGLU

__all__ = [
    "PortableNorm",
    "SeparateNorm",
    "block_spec",
    "choose_transformer_impl",
    "transformer_engine_reason",
]


class PortableNorm:
    """LayerNorm or RMSNorm whose gradients megatron-core reduces under sequence parallelism."""

    kinds: ClassVar[dict[str, type[torch.nn.Module]]] = {
        "LayerNorm": torch.nn.LayerNorm,
        "RMSNorm": FusedRMSNorm,
    }

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
    ) -> torch.nn.Module:
        """Return a norm over the last dimension of size `hidden_size`."""
        norm = cls.kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # The mark by which megatron-core finds it.
            parameter.sequence_parallel = (  # pyright: ignore[reportAttributeAccessIssue]
                config.sequence_parallel
            )
        return norm


class _EmptyState:
    """The empty state of Transformer Engine's norms.

    With it, the keys of both implementations in checkpoints are the same.
    """

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Ignore the empty state."""


class _LayerNorm(_EmptyState, torch.nn.LayerNorm):
    pass


class _RMSNorm(_EmptyState, FusedRMSNorm):
    pass


class SeparateNorm(PortableNorm):
    """A norm that Transformer Engine does not fuse into the next linear layer.

    These are the final norm and those of queries and keys.
    """

    kinds: ClassVar[dict[str, type[torch.nn.Module]]] = {
        "LayerNorm": _LayerNorm,
        "RMSNorm": _RMSNorm,
    }


def choose_transformer_impl(config: Config) -> tuple[str, str | None]:
    """Return (the implementation, a note or None).

    The note gives the reason where the slower implementation is chosen by default, or where FP8 is
    computed by the reference. Raises ConfigError where the implementation that was asked for, or
    FP8, cannot run on this machine.
    """
    wanted, precision, reason = (
        config.model.transformer_impl,
        config.precision,
        transformer_engine_reason(),
    )
    if wanted == "transformer_engine" and reason:
        raise ConfigError(
            f"transformer_impl transformer_engine cannot run: {reason}; write "
            f"--transformer-impl local or leave it out"
        )
    chosen = wanted or ("local" if reason else "transformer_engine")
    if chosen == "local":
        _check_recompute(config)
    if precision.fp8_format is not None:
        return chosen, _fp8_note(precision, chosen, reason)
    return chosen, f"layers are the portable ones: {reason}" if reason and not wanted else None


def _check_recompute(config: Config) -> None:
    t, p = config.training, config.precision
    if "layernorm" in (t.recompute_modules or ()):
        raise ConfigError(
            "recompute_modules layernorm needs Transformer Engine, where megatron-core "
            "looks for FP8 state; drop layernorm"
        )
    if (
        t.recompute_granularity
        and p.fp8_format is not None
        and p.fp8_recipe == "delayed"
        and t.recompute_modules != ["core_attn"]
    ):
        raise ConfigError(
            f"recompute_granularity {t.recompute_granularity} does not go with fp8_recipe "
            f"delayed without CUDA: the second forward pass would count "
            "as another; choose another --fp8-recipe, or recompute core_attn only"
        )


def _fp8_note(precision: PrecisionSettings, chosen: str, reason: str | None) -> str | None:
    asked = f"fp8_format {precision.fp8_format}"
    if chosen == "transformer_engine":
        device = device_reason(
            precision.fp8_recipe, torch.cuda.get_device_capability(), torch.version.cuda or ""
        )
        if device:
            raise ConfigError(
                f"{asked} with fp8_recipe {precision.fp8_recipe} cannot run: {device}; "
                f"choose another --fp8-recipe or drop --fp8-format"
            )
        return None
    if not cuda_shim.is_needed():
        cause = reason or "transformer_impl is local"
        raise ConfigError(
            f"{asked} needs Transformer Engine on CUDA, and {cause}; "
            + (
                "repair the installation or drop --fp8-format"
                if reason
                else "drop --transformer-impl or --fp8-format"
            )
        )
    if precision.fp8_param_gather:
        raise ConfigError(
            "fp8_param_gather needs Transformer Engine, and there is no CUDA device; drop "
            "--fp8-param-gather"
        )
    return (
        f"FP8 ({precision.fp8_recipe}) is the reference in plain torch, for rehearsal: its "
        f"values and scales are Transformer Engine's, "
        f"its speed is not; layers are the portable ones: {reason}"
    )


def block_spec(
    config: TransformerConfig,
    transformer_impl: str,
    vp_stage: int | None,
    precision: PrecisionSettings,
    fp8_context: Fp8Context | None,
) -> TransformerBlockSubmodules:
    """Return the spec of the layers of this pipeline rank's model chunk, final norm included.

    With a `fp8_context`, the portable layers compute in FP8.
    """
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return TransformerBlockSubmodules(
            [get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)] * count,
            TENorm,  # pyright: ignore[reportArgumentType]  # megatron-core takes classes too
        )
    layer: Any = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = PortableNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PortableAttention
    attention.q_layernorm = attention.k_layernorm = (
        SeparateNorm if config.qk_layernorm else IdentityOp
    )
    if config.use_te_activation_func:
        layer.submodules.mlp.submodules.activation_func = PortableSwiGLU
    layers = [layer] * count
    if fp8_context is not None:
        first, fp8 = get_transformer_layer_offset(config, vp_stage), _in_fp8(layer, fp8_context)
        layers = [
            layer if is_bf16_layer(precision, first + i, config.num_layers) else fp8
            for i in range(count)
        ]
    norm: Any = SeparateNorm  # annotated as an instance in megatron-core
    return TransformerBlockSubmodules(layers, norm)


def _in_fp8(layer: Any, fp8_context: Fp8Context) -> ModuleSpec:
    """Return the same layer with the four linear layers of the reference."""
    column, row = (
        ModuleSpec(module, params={"fp8_context": fp8_context})
        for module in (ReferenceColumnParallelLinear, ReferenceRowParallelLinear)
    )
    attention = copy.copy(layer.submodules.self_attention)
    attention.submodules = copy.copy(attention.submodules)
    attention.submodules.linear_qkv, attention.submodules.linear_proj = column, row
    mlp = copy.copy(layer.submodules.mlp)
    mlp.submodules = copy.copy(mlp.submodules)
    mlp.submodules.linear_fc1, mlp.submodules.linear_fc2 = column, row
    submodules = copy.copy(layer.submodules)
    submodules.self_attention, submodules.mlp = attention, mlp
    return ModuleSpec(layer.module, params=layer.params, submodules=submodules)
