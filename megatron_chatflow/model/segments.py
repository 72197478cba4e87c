"""Arguments of GPTModel that keep attention inside the documents of one window."""

from __future__ import annotations

from typing import Any

import torch


def attention_arguments(segment_ids: torch.Tensor, transformer_engine: bool) -> dict[str, Any]:
    """Keyword arguments that confine attention to equal segment numbers.

    Args:
        segment_ids: int [b, s], rising within a window; all 0 where a window is one piece.
        transformer_engine: whether the layers are Transformer Engine's (packed ``thd`` sequences)
        or portable (a mask).

    Returns:
        ``attention_mask`` (None means causal; bool [b, 1, s, s], True where forbidden) and
        ``packed_seq_params``. Rotary positions are relative, so a mask alone gives packed documents
        the attention that each would have separately.
    """
    if transformer_engine:
        return {"attention_mask": None, "packed_seq_params": _packed(segment_ids)}
    if not bool(segment_ids.any()):
        return {"attention_mask": None, "packed_seq_params": None}
    s = segment_ids.shape[1]
    future = torch.ones(s, s, dtype=torch.bool, device=segment_ids.device).triu(1)
    other = segment_ids[:, :, None] != segment_ids[:, None, :]
    return {"attention_mask": (future | other)[:, None], "packed_seq_params": None}


def _packed(segment_ids: torch.Tensor) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begin = starts.flatten().nonzero().flatten().to(torch.int32)
    bounds = torch.cat([begin, begin.new_tensor([segment_ids.numel()])])
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
