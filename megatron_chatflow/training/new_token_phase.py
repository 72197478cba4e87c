"""A first phase that trains the new rows of the embedding and output layers, and nothing else.

Zero gradients alone would not keep the other weights constant. Two more things change weights:
weight decay, which is off during the phase, and moments of earlier steps, of which there are none,
since the phase is at the start of a run. A weight whose gradient and moments are zero takes a step
of exactly zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule


class NewRows:
    """The rows of this rank's embedding and output layers that belong to new tokens."""

    def __init__(self, model: list[MegatronModule], ids: np.ndarray) -> None:
        """Find the rows of this rank.

        Args:
            model: this rank's model chunks.
            ids: new tokens of the vocabulary, of which each tensor-parallel rank holds an equal
                slice.
        """
        self._parameters: list[Any] = [
            parameter for chunk in model for parameter in chunk.parameters()
        ]
        self._rows: list[tuple[Any, torch.Tensor]] = []
        for parameter in self._parameters:
            if getattr(parameter, "is_embedding_or_output_parameter", False):
                first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
                mine = ids[(ids >= first) & (ids < first + len(parameter))] - first
                self._rows.append((parameter, torch.from_numpy(mine).to(parameter.device)))

    @contextlib.contextmanager
    def alone(self, optimizer: MegatronOptimizer) -> Iterator[None]:
        """Inside, `optimizer` steps the new rows only.

        To be entered between the backward pass and the step: it clears all other gradients.
        """
        kept = [
            (parameter.main_grad, rows, parameter.main_grad[rows]) for parameter, rows in self._rows
        ]
        for parameter in self._parameters:
            parameter.main_grad.zero_()
        for gradient, rows, values in kept:
            gradient[rows] = values
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        yield
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def forget_moments(optimizer: MegatronOptimizer) -> None:
    """Clear the moments and step counts of an optimizer, in place, at the end of the phase.

    Adam corrects its moments by the number of steps made. With the phase's steps counted, the first
    steps of all other weights would be up to (1 - beta1) / sqrt(1 - beta2) times too long, 3.2 with
    the default betas.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:
            continue
        for state in part.optimizer.state.values():
            for value in filter(torch.is_tensor, state.values()):
                value.zero_()
        for group in part.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's AdamW counts here
                group["step"] = 0
