"""What the FP8 layers of one model chunk share: the recipe, and where in an iteration they are."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.fp8.delayed_scaling import DelayedScaling
from megatron_chatflow.fp8.gemm import Blockwise, Delayed, Mxfp8, Products, Tensorwise
from megatron_chatflow.fp8.recipe import formats


def delayed_scaling(precision: PrecisionSettings) -> DelayedScaling | None:
    """The delayed scaling of this rank, shared by its model chunks, or None for another recipe."""
    if precision.fp8_recipe != "delayed":
        return None
    group: Any = parallel_state.get_amax_reduction_group(
        with_context_parallel=True, tp_only_amax_red=precision.tp_only_amax_red
    )
    return DelayedScaling(
        formats(precision),
        length=precision.fp8_amax_history_len,
        algo=precision.fp8_amax_compute_algo,
        margin=precision.fp8_margin,
        group=group,
    )


class Fp8Context:
    """Follows the decoder of one model chunk through its passes.

    The timing is Transformer Engine's: forward scales are updated when the decoder's forward pass
    with gradients ends, backward scales when the backward pass reaches the end of the layer that
    came first in it, so both once a micro-batch; weights are quantised once an iteration.
    """

    def __init__(self, precision: PrecisionSettings, delayed: DelayedScaling | None) -> None:
        """Make the context of one model chunk; `delayed` is that of its rank."""
        self._recipe, self._forms, self.delayed = precision.fp8_recipe, formats(precision), delayed
        self.is_hybrid = precision.fp8_format == "hybrid"
        self.weights = 0
        """Counts the states of the weights: what was quantised under the same number need not be
        quantised again.
        """
        self._is_first = False

    def products(self) -> Products:
        """The products of one more layer."""
        if self.delayed is not None:
            return Delayed(self.delayed)
        return {"tensorwise": Tensorwise, "blockwise": Blockwise, "mxfp8": Mxfp8}[self._recipe](
            self._forms
        )

    def watch(self, decoder: TransformerBlock) -> None:
        """Follow this decoder from now on."""
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end_forward)

    def take_first(self) -> bool:
        """True once in a forward pass: for the layer that comes first."""
        first, self._is_first = self._is_first, False
        return first

    def _begin(self, decoder: TransformerBlock, arguments: Any) -> None:
        self._is_first = True
        # megatron-core's schedules number the micro-batches of an iteration; without a schedule
        # every pass is a first one.
        if getattr(decoder.layers[0], "current_microbatch", 0) <= 0:
            self.weights += 1

    def _end_forward(self, decoder: TransformerBlock, arguments: Any, output: Any) -> None:
        if self.delayed is not None and torch.is_grad_enabled():
            self.delayed.update(self.delayed.forward)

    def end_backward(self) -> None:
        """The backward pass is at its end."""
        if self.delayed is not None:
            self.delayed.update(self.delayed.backward)
