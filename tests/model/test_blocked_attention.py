"""Attention in blocks against torch's in double precision."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_fused import agree

SEGMENTS = {"causal": None, "packed": [[0] * 40, [0] * 13 + [1] * 20 + [2] * 7]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("rows", "scores"), [(128, 300_000), (12, 300_000), (12, 500)])
def test_value_and_gradients_are_those_of_attention(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    segments: str,
    heads: int,
    rows: int,
    scores: int,
) -> None:
    from megatron_chatflow.model import blocked_attention

    monkeypatch.setattr(blocked_attention, "ROWS", rows)
    monkeypatch.setattr(blocked_attention, "SCORES", scores)
    documents = torch.tensor(SEGMENTS[segments] or [[0] * 40] * 2)
    apart = documents[:, None, :, None] != documents[:, None, None, :]
    forbidden = apart | torch.ones(40, 40, dtype=torch.bool).triu(1)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=~forbidden, scale=0.2, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3)

    generator = torch.Generator().manual_seed(heads)
    inputs = [torch.randn(40, 2, n, 8, generator=generator) for n in (heads, 2, 2)]
    mask = None if segments == "causal" else forbidden
    agree(lambda q, k, v: blocked_attention.attention(q, k, v, mask, 0.2), plain, inputs, dtype)
