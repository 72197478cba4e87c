"""A running mean of the weights (EMA), kept next to them and saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

PREFIX = "ema."
"""Before the name of a weight in a checkpoint: its mean."""


class WeightAverage:
    """Running mean in float32 of this rank's weights.

    After every iteration: mean <- decay x mean + (1 - decay) x weight.
    """

    def __init__(self, model: list[MegatronModule], decay: float) -> None:
        """The mean begins at the weights of `model` as they are now."""
        self._decay = decay
        self._means = {
            parameter: parameter.detach().float().clone()
            for chunk in model
            for parameter in chunk.parameters()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more iteration in."""
        for parameter, mean in self._means.items():
            mean.lerp_(parameter.float(), 1 - self._decay)

    def sharded_state(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the means as entries of a sharded state dict.

        They are those of `weights`, a model chunk's, under names with PREFIX.
        """
        return {
            name: _renamed(entry, self._means[entry.data])
            for name, entry in weights.items()
            if _is_weight(entry)
        }

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Any], loaded: Mapping[str, torch.Tensor]) -> None:
        """Copy means that were loaded by `sharded_state` of `weights`."""
        for name, mean in loaded.items():
            self._means[weights[name].data].copy_(mean)


def mean_instead(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state dict of a model chunk with the means asked for in place of the weights."""
    return {
        name: _renamed(entry, torch.empty_like(entry.data, dtype=torch.float32))
        if _is_weight(entry)
        else entry
        for name, entry in weights.items()
    }


def _is_weight(entry: Any) -> bool:
    return isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(
        entry.data, torch.nn.Parameter
    )


def _renamed(entry: Any, data: torch.Tensor) -> Any:
    kind = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}
    return replace(entry, key=PREFIX + entry.key, data=data, **kind)
