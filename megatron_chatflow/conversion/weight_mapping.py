"""Which Hugging Face tensors make up a tensor of megatron-core's GPT, and how they lie in it.

megatron-core keys a tensor of all layers by one name, with the layers as first axis. Of one layer:

- `linear_qkv` holds for each group of query heads its queries, then its key, then its value: ``[q q
  k v | q q k v | ...]``.
- `linear_fc1` holds the gate above the up-projection.
- All others are the same on both sides. Both rotate a head's first half against its second.
"""

from __future__ import annotations

import torch

LAYERS = "decoder.layers."

_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "self_attention.linear_qkv.bias": (
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    ),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}

WORD_TABLES = {"embedding.word_embeddings.weight": "input", "output_layer.weight": "output"}
"""Tensors with a row for each token, and which side of the model they are."""


def huggingface_names(key: str, layer: int | None) -> tuple[str, ...]:
    """Return the tensors that make up megatron-core's `key`, in order.

    `layer` is None outside the layers.
    """
    if layer is None:
        return (_OUTSIDE[key],)
    return tuple(f"model.layers.{layer}.{name}" for name in _INSIDE[key.removeprefix(LAYERS)])


def join(key: str, parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Join Hugging Face's tensors, in the order of `huggingface_names`, to one layer's tensor.

    `groups` is the number of key heads.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return torch.cat(parts)
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(
        0, 1
    )


def split(key: str, tensor: torch.Tensor, groups: int, queries: int) -> list[torch.Tensor]:
    """The inverse of `join`; `queries` is the number of query heads in a group."""
    count = len(_INSIDE[key.removeprefix(LAYERS)]) if key.startswith(LAYERS) else 1
    if count == 1:
        return [tensor]
    if count == 2:
        return list(tensor.chunk(2))
    grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
    head = grouped.shape[1] // (queries + 2)
    return [part.flatten(0, 1) for part in grouped.split([queries * head, head, head], dim=1)]


def split_shapes(
    key: str, shape: tuple[int, ...], groups: int, queries: int
) -> list[tuple[int, ...]]:
    """The shapes of what `split` gives."""
    return [
        tuple(part.shape) for part in split(key, torch.empty(shape, device="meta"), groups, queries)
    ]
