"""Portable forms of what Transformer Engine has fused CUDA kernels for: few passes over memory.

Each is one autograd function over plain torch that keeps its input and computes the rest again in
the backward pass. Rows are worked on a block at a time, so that what one operation writes is still
in the processor's cache when the next one reads it; a row's result does not depend on the block it
is in. Sums inside are float32 whatever the tensors are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_chatflow.model import float32_linear

BLOCK = 1 << 19
"""Elements of a block: a few of them in float32 fit the second-level cache."""


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.flatten(0, -2).chunk(2, -1)
        out = x.new_empty(gate.shape)
        for block in _blocks(*gate.shape):
            torch.mul(torch.nn.functional.silu(gate[block]), up[block], out=out[block])
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        gate, up = x.flatten(0, -2).chunk(2, -1)
        grad_gate, grad_up = result.flatten(0, -2).chunk(2, -1)
        grad = grad.reshape(gate.shape)
        for block in _blocks(*gate.shape):
            torch.mul(grad[block], torch.nn.functional.silu(gate[block]), out=grad_up[block])
            torch.ops.aten.silu_backward.grad_input(
                grad[block] * up[block], gate[block], grad_input=grad_gate[block]
            )
        return result


class PortableSwiGLU(MegatronModule):
    """silu(first half) x second half of the last dimension."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 f] -> [..., f]."""
        return _SwiGLU.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = (
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
            .square_()
            .div_(rows.shape[1])
            .add_(eps)
            .rsqrt_()
        )
        out = torch.empty_like(rows)
        for block in _blocks(*rows.shape):
            out[block] = rows[block] * scale[block] * weight
        ctx.save_for_backward(x, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        result, grad_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=torch.float32)
        for block in _blocks(*rows.shape):
            normed = rows[block] * scale[block]
            product = normed * grad[block]
            grad_weight += product.sum(0)
            mean = torch.mv(product, weight.float()).div_(rows.shape[1]).unsqueeze_(1)
            result[block] = (
                (grad[block] * weight.float()).addcmul_(normed, mean, value=-1).mul_(scale[block])
            )
        return result.view(x.shape), grad_weight.to(weight.dtype), None


class FusedRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in fewer passes: x / sqrt(mean(x^2) + eps) x weight, over the last axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return _RMSNorm.apply(x, self.weight, self.eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    out = x.new_empty(x.shape)
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def rotary(
    t: torch.Tensor, freqs: torch.Tensor, *, interleaved: bool = False, **kwargs: Any
) -> torch.Tensor:
    """Rotate pairs (i, i + r/2) of the first r elements of each head by their position's angles.

    Args:
        t: [s, b, heads, d].
        freqs: float32 [s, 1, 1, r], the angles, the second half a copy of the first.
        interleaved: megatron-core's contract; always False here.
        kwargs: likewise.
    """
    assert not interleaved
    angles = freqs[..., : freqs.shape[-1] // 2]
    return _Rotary.apply(t, angles.cos().to(t.dtype), angles.sin().to(t.dtype))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        rows, columns, ranks = logits.flatten(0, -2), logits.shape[-1], group.size()
        label = labels.flatten() - group.rank() * columns
        here = (label >= 0) & (label < columns)
        label = label.masked_fill_(~here, 0)[:, None]
        wanted = rows.gather(1, label)[:, 0].float()
        own = torch.empty_like(wanted)  # log of the sum of exponentials over this rank's columns
        for block in _blocks(*rows.shape):
            own[block] = (
                wanted[block]
                - rows[block].log_softmax(1, dtype=torch.float32).gather(1, label[block])[:, 0]
            )
        total = own
        if ranks > 1:
            largest = own.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([(own - largest).exp_(), wanted.masked_fill_(~here, 0)])
            torch.distributed.all_reduce(sums, group=group)
            total, wanted = sums[0].log_().add_(largest), sums[1]
        ctx.save_for_backward(logits, (own - total).exp_(), label, here)
        return (total - wanted).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, share, label, here = (
            ctx.saved_tensors
        )  # share: of the total sum of exponentials, in this rank's columns
        rows, grad = logits.flatten(0, -2), grad.reshape(-1, 1)
        result = torch.empty_like(rows)
        for block in _blocks(*rows.shape):
            torch.mul(rows[block].softmax(1), share[block, None] * grad[block], out=result[block])
        result.scatter_add_(1, label, (grad * -here[:, None].float()).to(result.dtype))
        return result.view(logits.shape), None, None


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: torch.distributed.ProcessGroup, *args: Any
) -> torch.Tensor:
    """Return -log softmax(logits)[label] in nats, float32 [s, b].

    The vocabulary is split over the ranks of `group`.

    Args:
        logits: [s, b, vocabulary / ranks], of any float type; this rank's columns.
        labels: int64 [s, b], below the vocabulary.
        group: the tensor-parallel group.
        args: megatron-core's contract, for CUDA graphs.
    """
    return _CrossEntropy.apply(logits, labels, group)


def install() -> None:
    """Make megatron-core call these functions where it would call Transformer Engine.

    They take effect where TransformerConfig turns the fusion on.
    """
    rope_utils.fused_apply_rotary_pos_emb = rotary
    language_module.te_parallel_cross_entropy = cross_entropy
    float32_linear.install()
