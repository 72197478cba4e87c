"""The mean of a run's last checkpoints.

A constant learning rate with averaged weights does what a decay does, and keeps what late data
taught.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.checkpoint import state_dict


def mean(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the uniform mean, in the type of the last tensor.

    The tensors are added up in float32 one after the other. One tensor is itself, bit for bit.
    """
    total, count = None, 0
    for tensor in tensors:
        total = tensor.float() if total is None else total + tensor.float()
        count, dtype = count + 1, tensor.dtype
    assert total is not None, "the mean of nothing"
    return (total / count).to(dtype)


@torch.no_grad()
def load_mean(folders: Sequence[Path], model: list[MegatronModule]) -> None:
    """Load the `mean` of the parameters of some checkpoints into a model of any layout.

    Everything else comes from the last checkpoint.

    Memory: one float32 copy of this rank's parameters in addition to the model.
    """
    parameters = [p for chunk in model for p in chunk.parameters()]
    sums = (
        [torch.zeros_like(p, dtype=torch.float32) for p in parameters] if len(folders) > 1 else []
    )
    for folder in folders:
        state_dict.load(folder, model, None)
        for total, parameter in zip(sums, parameters, strict=bool(sums)):
            total += parameter.float()
    for total, parameter in zip(sums, parameters, strict=bool(sums)):
        parameter.copy_(total / len(folders))
