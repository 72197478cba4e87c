"""The section ``precision``: FP8."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, flag_name

DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "tp_only_amax_red")
"""Settings that only the delayed recipe reads."""

BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
"""Settings that only --first-last-layers-bf16 reads."""


@dataclass(frozen=True)
class PrecisionSettings(Section):
    """FP8 in the linear layers of the transformer layers; everything else is --bf16."""

    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Compute in FP8: hybrid is E4M3 forward and E5M2 for gradients, e4m3 is E4M3 everywhere; off
    by default. Without CUDA a reference in plain torch replaces Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Source of the scales: delayed (magnitudes of earlier iterations), tensorwise (the tensor's
    own), blockwise (128 values at a time, Hopper), mxfp8 (32 values at a time, Blackwell). The last
    two need --fp8-format e4m3."""
    fp8_margin: int = 0
    """Powers of two of headroom in the scales of --fp8-recipe delayed."""
    fp8_amax_history_len: int = 1
    """Iterations of history of --fp8-recipe delayed."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Magnitude of the history that --fp8-recipe delayed takes."""
    fp8_param_gather: bool = False
    """Store the weights of the linear layers in FP8 and gather them so; needs Transformer Engine
    and --use-distributed-optimizer.
    """
    tp_only_amax_red: bool = False
    """Under --fp8-recipe delayed reduce magnitudes over the tensor-parallel processes only, not
    over the data-parallel ones.
    """
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in bfloat16."""
    num_layers_at_start_in_bf16: int = 1
    """Number of first layers that --first-last-layers-bf16 keeps in bfloat16."""
    num_layers_at_end_in_bf16: int = 1
    """Number of last layers that --first-last-layers-bf16 keeps in bfloat16."""

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        errors = super().validate()
        if self.fp8_format is None:
            return errors + [
                f"{self._given(name)} has no effect without fp8_format; add "
                f"--fp8-format hybrid or drop {flag_name(name)}"
                for name in self._changed()
            ]
        if self.fp8_recipe in ("blockwise", "mxfp8") and self.fp8_format == "hybrid":
            errors.append(
                f"fp8_format hybrid with fp8_recipe {self.fp8_recipe} would make gradients E5M2, "
                "and blocks this small have no need of its range; write --fp8-format e4m3"
            )
        if self.fp8_amax_history_len == 0:
            errors.append(
                "fp8_amax_history_len is 0; give --fp8-amax-history-len a positive number"
            )
        if self.fp8_recipe == "delayed":
            errors += self._delayed_errors()
        else:
            errors += [
                f"{self._given(name)} has no effect with fp8_recipe {self.fp8_recipe}; "
                f"drop {flag_name(name)} or write --fp8-recipe delayed"
                for name in DELAYED_ONLY
                if name in self._changed()
            ]
        if self.fp8_param_gather and self.fp8_recipe == "mxfp8":
            errors.append(
                "fp8_param_gather is not supported with fp8_recipe mxfp8, whose weights would "
                "have to be kept twice; drop --fp8-param-gather"
            )
        if not self.first_last_layers_bf16:
            errors += [
                f"{name} {getattr(self, name)} has no effect without first_last_layers_bf16; add "
                f"--first-last-layers-bf16 or drop {flag_name(name)}"
                for name in BF16_LAYERS
                if name in self._changed()
            ]
        return errors

    def _delayed_errors(self) -> list[str]:
        errors = []
        if self.fp8_amax_compute_algo == "most_recent" and self.fp8_amax_history_len > 1:
            errors.append(
                f"fp8_amax_history_len {self.fp8_amax_history_len} has no effect with "
                "fp8_amax_compute_algo most_recent; "
                "write --fp8-amax-compute-algo max or drop --fp8-amax-history-len"
            )
        if self.first_last_layers_bf16:
            errors.append(
                "first_last_layers_bf16 does not go with fp8_recipe delayed, whose scales are "
                "updated for all layers at once; choose another --fp8-recipe or drop "
                "--first-last-layers-bf16"
            )
        return errors

    def _changed(self) -> list[str]:
        """Return the names of the settings that differ from their default."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def _given(self, name: str) -> str:
        value = getattr(self, name)
        return name if value is True else f"{name} {value}"
