"""Portable attention: megatron-core's core_attention without Transformer Engine.

It is computed in blocks (`blocked_attention`), or by torch's scaled_dot_product_attention with
dropout and for generation with a cache.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_chatflow.distributed.bf16_matmul import uses_float32
from megatron_chatflow.model.blocked_attention import attention


class PortableAttention(MegatronModule):
    """Causal grouped-query attention, built as megatron-core builds `core_attention`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        # TransformerConfig fills in kv_channels.
        width = config.kv_channels
        self.softmax_scale = softmax_scale or width**-0.5  # pyright: ignore[reportOptionalOperand]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the attention output, [s, b, heads x d].

        One query against t > 1 keys (generation with a cache) attends to all of them.

        Args:
            query: [s, b, heads, d].
            key: [t, b, groups, d].
            value: likewise.
            attention_mask: None (causal) or bool [b, 1, s, t], True where attention is forbidden.
            packed_seq_params: always None.
            kwargs: other arguments of megatron-core.
        """
        assert packed_seq_params is None, (
            "packed windows reach the portable attention as a mask (model/segments.py)"
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        if not dropout and len(query) == len(key):
            return attention(query, key, value, attention_mask, self.softmax_scale).reshape(
                *query.shape[:2], -1
            )
        # [s, b, n, d] -> [b, n, s, d], the layout of scaled_dot_product_attention.
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None if attention_mask is None else ~attention_mask
        if uses_float32(q, k, v):
            q, k, v = q.float(), k.float(), v.float()
        fork = (
            # megatron-core annotates the tracker as None.
            get_cuda_rng_tracker().fork()  # pyright: ignore[reportOptionalMemberAccess]
            if dropout and not self.config.sequence_parallel
            else contextlib.nullcontext()
        )
        with fork:
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and q.shape[2] > 1,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.to(query.dtype).permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
