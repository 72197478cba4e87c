"""Causal grouped-query attention in blocks of queries, with nothing of the size s x s in memory.

A block of queries sees the keys up to its last one only, which halves the work, and its scores stay
in the processor's cache between the products and the softmax. All query heads of a group go through
one product with the group's keys, which are never repeated. The backward pass keeps queries, keys
and values and computes the probabilities again. Scores are in the tensors' own type, as in
megatron-core's unfused attention; the softmax, and the sums over blocks in the gradients of keys
and values, are float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_chatflow.distributed.bf16_matmul import bmm

ROWS = 128
"""Queries of a block, over all heads of a group."""
SCORES = 300_000
"""Scores of a block, over all groups that go through together: what fits the second-level cache."""


def _blocks(groups: int, length: int, heads: int) -> Iterator[tuple[slice, slice]]:
    """(groups, queries) of each block; `heads`: query heads of a group."""
    step = max(1, ROWS // heads)
    for first in range(0, length, step):
        last = min(first + step, length)
        together = max(1, SCORES // ((last - first) * heads * last))
        for group in range(0, groups, together):
            yield slice(group, min(group + together, groups)), slice(first, last)


def _by_group(t: torch.Tensor, groups: int) -> torch.Tensor:
    """[s, b, n, d] -> contiguous [b x groups, n / groups, s, d]."""
    s, b, n, d = t.shape
    return t.reshape(s, b * groups, n // groups, d).permute(1, 2, 0, 3).contiguous()


def _from_groups(t: torch.Tensor, batch: int) -> torch.Tensor:
    """[b x groups, n / groups, s, d] -> [s, b, n, d]."""
    _, _, s, d = t.shape
    return t.reshape(batch, -1, s, d).permute(2, 0, 1, 3)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, queries: slice, forbidden: torch.Tensor | None
) -> torch.Tensor:
    """Return the softmax of a block's scores, [groups, heads x queries, keys].

    The scaled queries are [groups, heads, queries, d], the keys [groups, keys, d].
    """
    groups, heads, count, d = q.shape
    scores = bmm(q.reshape(groups, heads * count, d), k.transpose(1, 2))
    by_query = scores.view(groups, heads, count, -1)
    if forbidden is None:
        by_query[..., queries].masked_fill_(
            torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1), -torch.inf
        )
    else:
        by_query.masked_fill_(forbidden[:, None, queries, : queries.stop], -torch.inf)
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        batch, groups = k.shape[1:3]
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        queries, keys, values = (
            _by_group(q * scale, groups),
            _by_group(k, groups)[:, 0],
            _by_group(v, groups)[:, 0],
        )
        out = torch.empty_like(queries)
        for group, block in _blocks(len(queries), len(q), queries.shape[1]):
            until = block.stop
            p = _probabilities(
                queries[group, :, block], keys[group, :until], block, _of(mask, group, groups)
            )
            out[group, :, block] = bmm(p, values[group, :until]).view_as(out[group, :, block])
        return _from_groups(out, batch)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, mask = ctx.saved_tensors
        batch, groups = k.shape[1:3]
        queries, grads = _by_group(q * ctx.scale, groups), _by_group(grad, groups)
        keys, values = _by_group(k, groups)[:, 0], _by_group(v, groups)[:, 0]
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = (
            torch.zeros_like(keys, dtype=torch.float32),
            torch.zeros_like(values, dtype=torch.float32),
        )
        for group, block in _blocks(len(queries), len(q), queries.shape[1]):
            until = block.stop
            some, key, value = queries[group, :, block], keys[group, :until], values[group, :until]
            g = grads[group, :, block].reshape(len(some), -1, q.shape[-1])
            p = _probabilities(some, key, block, _of(mask, group, groups))
            grad_v[group, :until] += bmm(p.transpose(1, 2), g)
            grad_scores = torch.ops.aten._softmax_backward_data(
                bmm(g, value.transpose(1, 2)), p, -1, p.dtype
            )
            grad_q[group, :, block] = bmm(grad_scores, key).view_as(some)
            grad_k[group, :until] += bmm(grad_scores.transpose(1, 2), some.reshape_as(g))
        grad_k, grad_v = (_from_groups(t[:, None].to(q.dtype), batch) for t in (grad_k, grad_v))
        return _from_groups(grad_q.mul_(ctx.scale), batch), grad_k, grad_v, None, None


def _of(mask: torch.Tensor | None, group: slice, groups: int) -> torch.Tensor | None:
    """Return the masks of these groups, [groups, s, s]; `mask` is per sample, [b, 1, s, s]."""
    return (
        None
        if mask is None
        else mask[torch.arange(group.start, group.stop, device=mask.device) // groups, 0]
    )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return softmax(scale q k' + mask) v, [s, b, heads, d].

    Args:
        q: [s, b, heads, d].
        k: [s, b, groups, d]; heads is a multiple of groups.
        v: likewise.
        mask: None for causal, or bool [b, 1, s, s], True where attention is forbidden; a later key
            always is.
        scale: of the scores.
    """
    return _Attention.apply(q, k, v, mask, scale)
