"""megatron-core's column- and row-parallel linear layers with FP8 products, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.distributed import (
    ProcessGroup,
    all_gather_into_tensor,
    all_reduce,
    get_world_size,
    reduce_scatter_tensor,
)

from megatron_chatflow.fp8 import extra_state
from megatron_chatflow.fp8.context import Fp8Context
from megatron_chatflow.fp8.gemm import Delayed, Tensors


class _Linear(torch.autograd.Function):
    """y = x w^T + b.

    Under sequence parallelism x is a shard of the tokens: it is gathered, then quantized, and its
    gradient reduced back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: _ReferenceLinear,
        training: bool,
        collective: Collective,
    ) -> torch.Tensor:
        assert x.dtype == weight.dtype == torch.bfloat16, "FP8 needs bfloat16"
        total = collective.gather(x)
        quantized = layer.quantized_weight(weight, training)
        y, saved = layer.products.forward(
            total.reshape(-1, total.shape[-1]), quantized, bias, training=training
        )
        if training:
            ctx.save_for_backward(*saved, *quantized)
            ctx.layer, ctx.collective, ctx.of_input, ctx.shape, ctx.has_bias = (
                layer,
                collective,
                len(saved),
                total.shape,
                bias is not None,
            )
            ctx.ends_the_pass = layer.fp8_context.take_first()
        return y.view(*total.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        dx, dw = ctx.layer.products.backward(
            grad, ctx.saved_tensors[: ctx.of_input], ctx.saved_tensors[ctx.of_input :]
        )
        dx = ctx.collective.reduce(dx.view(ctx.shape))
        db = grad.sum(0) if ctx.has_bias else None
        if ctx.ends_the_pass:
            ctx.layer.fp8_context.end_backward()
        return dx, dw, db, None, None, None


class Collective:
    """What column parallelism needs of the other tensor-parallel ranks.

    Nothing, a sum of dx, or a gathered x and a scattered sum of dx.
    """

    def __init__(self, group: ProcessGroup | None, gathers: bool, sums: bool) -> None:
        """Communicate in `group`: gather x, or sum dx, or neither."""
        self._group, self._gathers, self._sums = group, gathers, sums

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[s / ranks, b, h] -> [s, b, h]."""
        if not self._gathers:
            return x
        total = x.new_empty(x.shape[0] * get_world_size(self._group), *x.shape[1:])
        all_gather_into_tensor(total, x.contiguous(), group=self._group)
        return total

    def reduce(self, dx: torch.Tensor) -> torch.Tensor:
        """Return this rank's dx, its sum over ranks, or a shard [s / ranks, b, h] of the sum."""
        if self._gathers:
            shard = dx.new_empty(dx.shape[0] // get_world_size(self._group), *dx.shape[1:])
            reduce_scatter_tensor(shard, dx.contiguous(), group=self._group)
            return shard
        if self._sums:
            all_reduce(dx, group=self._group)
        return dx


class _ReferenceLinear:
    """Replaces the products of a megatron-core linear layer.

    Construction, communication, biases and checkpoints stay megatron-core's.
    """

    def __init__(self, *args: Any, fp8_context: Fp8Context, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8_context, self.products = fp8_context, fp8_context.products()
        self._quantized: tuple[int, Tensors] = (-1, ())

    def quantized_weight(self, weight: torch.Tensor, training: bool) -> Tensors:
        """The weight in FP8: made in the first micro-batch of an iteration, used in all of them."""
        if not training:
            return self.products.weight(weight, training=False)
        if self._quantized[0] != self.fp8_context.weights:
            self._quantized = self.fp8_context.weights, self.products.weight(weight, training=True)
        return self._quantized[1]

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: ProcessGroup | None,
        **of_other_backends: Any,
    ) -> torch.Tensor:
        collective = Collective(tp_group, sequence_parallel, allreduce_dgrad)
        return _Linear.apply(input, weight, bias, self, torch.is_grad_enabled(), collective)

    def get_extra_state(self) -> torch.Tensor:
        """Scales and histories of delayed scaling; empty for recipes without state."""
        if not isinstance(self.products, Delayed):
            return torch.empty(0, dtype=torch.uint8)
        return extra_state.pack(self.products.state(), hybrid=self.fp8_context.is_hybrid)

    def set_extra_state(self, saved: torch.Tensor | None) -> None:
        """Take scales and histories where this layer and the checkpoint have them.

        Otherwise start from scratch.
        """
        if isinstance(self.products, Delayed):
            delayed = self.fp8_context.delayed
            assert delayed is not None, "the products are those of delayed scaling"
            found = extra_state.unpack(saved, delayed.forward.length)
            if found is not None:
                self.products.load(found)


class ReferenceColumnParallelLinear(_ReferenceLinear, ColumnParallelLinear):
    """Weight rows shared among the tensor-parallel ranks."""


class ReferenceRowParallelLinear(_ReferenceLinear, RowParallelLinear):
    """Weight columns shared among the tensor-parallel ranks.

    megatron-core gathers the gradient before it reaches the products.
    """
