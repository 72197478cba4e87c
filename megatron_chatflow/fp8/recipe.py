"""What the FP8 settings mean: the formats, which layers stay bfloat16, and megatron-core's names
for the same. Pure functions of the settings.
"""

from __future__ import annotations

from typing import Any

from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.fp8.formats import E4M3, E5M2, Format


def formats(precision: PrecisionSettings) -> tuple[Format, Format]:
    """(format of inputs and weights, format of gradients)."""
    return E4M3, E5M2 if precision.fp8_format == "hybrid" else E4M3


def is_bf16_layer(precision: PrecisionSettings, layer: int, num_layers: int) -> bool:
    """Whether the layer of this global number (from 0) stays in bfloat16."""
    if precision.fp8_format is None:
        return True
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return precision.first_last_layers_bf16 and not start <= layer < num_layers - end


def transformer_settings(precision: PrecisionSettings) -> dict[str, Any]:
    """TransformerConfig fields that make megatron-core run Transformer Engine's layers with these
    settings; none where FP8 is off.
    """
    if precision.fp8_format is None:
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "fp8_param": precision.fp8_param_gather,
        "tp_only_amax_red": precision.tp_only_amax_red,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
    }
