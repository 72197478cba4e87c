"""megatron-core's linear layers with bfloat16 products in float32, where a CPU is faster so.

All of its linear layers, the output layer too, end in one of two autograd functions of
`tensor_parallel.layers`; `install` puts these in their place. What travels between ranks, and
in which type, is as there.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch.distributed import ProcessGroup

from megatron_chatflow.distributed.bf16_matmul import mm_in_float32, uses_float32
from megatron_chatflow.fp8.linear import Collective

_trained, _frozen = (
    layers.LinearWithGradAccumulationAndAsyncCommunication,
    layers.LinearWithFrozenWeight,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        collective: Collective,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.collective = collective
        total = collective.gather(x)
        y = mm_in_float32(total.flatten(0, -2), weight.t())
        y = torch.ops.aten._unsafe_view(
            y, [*total.shape[:-1], y.shape[-1]]
        )  # as torch.matmul: no view, so it may be changed in place
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dx = ctx.collective.reduce(mm_in_float32(rows, weight).view(*grad.shape[:-1], -1))
        dw = (
            mm_in_float32(rows.t(), ctx.collective.gather(x).flatten(0, -2))
            if ctx.needs_input_grad[1]
            else None
        )
        return dx, dw, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class _Trained:
    """Takes the place of `LinearWithGradAccumulationAndAsyncCommunication`."""

    @staticmethod
    def apply(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        fusion: bool,
        sums: bool,
        gathers: bool,
        buffer: list[torch.Tensor] | None,
        limit: int | None,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        if fusion or buffer is not None or not uses_float32(x, weight):
            return _trained.apply(x, weight, bias, fusion, sums, gathers, buffer, limit, group)
        return _Linear.apply(x, weight, bias, Collective(group, gathers, sums))


class _Frozen:
    """Takes the place of `LinearWithFrozenWeight`, whose input is gathered already."""

    @staticmethod
    def apply(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sums: bool,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        if not uses_float32(x, weight):
            return _frozen.apply(x, weight, bias, sums, group)
        return _Linear.apply(x, weight, bias, Collective(group, False, sums))


def install() -> None:
    """Replace megatron-core's linear functions, where the CPU has no bfloat16 units."""
    if uses_float32():
        layers.LinearWithGradAccumulationAndAsyncCommunication, layers.LinearWithFrozenWeight = (
            _Trained,
            _Frozen,
        )
