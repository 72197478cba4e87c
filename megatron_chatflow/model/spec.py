"""Layer specs: which classes megatron-core builds its layers from."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_chatflow.config import UsageError
from megatron_chatflow.engine import cpu
from megatron_chatflow.model.attention import PortableAttention


class PortableNorm:
    """torch's LayerNorm or RMSNorm, marked so that megatron-core reduces its gradients under sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object) -> torch.nn.Module:
        """A norm over the last dimension of size `hidden_size`."""
        kind = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def transformer_engine_reason() -> str | None:
    """Why Transformer Engine layers cannot run here, or None where they can."""
    if cpu.is_needed():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"transformer_engine does not import ({error})"
    return None


def choose_transformer_impl(wanted: str | None) -> tuple[str, str | None]:
    """(the implementation, the reason where it is the slower one and nobody asked for it). Raises UsageError where the wanted one cannot run."""
    reason = transformer_engine_reason()
    if wanted == "transformer_engine" and reason:
        raise UsageError(f"transformer_impl transformer_engine cannot run: {reason}; write --transformer-impl local or leave it out")
    if wanted:
        return wanted, None
    return ("local", f"layers are the portable ones: {reason}") if reason else ("transformer_engine", None)


def block_spec(config: TransformerConfig, transformer_impl: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The spec of the layers of this pipeline rank's model chunk, final norm included."""
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization), PortableNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = PortableNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PortableAttention
        attention.q_layernorm = attention.k_layernorm = PortableNorm if config.qk_layernorm else IdentityOp
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)
