"""What the FP8 settings mean: the formats, and which layers stay bfloat16."""

from __future__ import annotations

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
