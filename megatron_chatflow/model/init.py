"""Initial weights that are the same for every layout.

megatron-core draws each rank's weights from that rank's own random stream, so another TP or PP
starts from other weights. Here a parameter is a function of (seed, its global name): the full
tensor is drawn and each rank keeps its part, as given by megatron-core's sharded state dict, by
which checkpoints are resharded too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_chatflow.utils.seeding import seed_from


@torch.no_grad()
def initialize_weights(model: GPTModel, seed: int, std: float, vocab_size: int) -> None:
    """Fill every parameter of `model` in place.

    Matrices are normal with `std`, norms 1, biases and rows beyond `vocab_size` (padding) 0. The
    projections back into the residual stream (``linear_proj``, ``linear_fc2``) get
    std / sqrt(2 x layers), as in GPT-2 and Megatron.
    """
    for shard in iterate_shards(model.sharded_state_dict()):
        _fill(shard, seed, std, model.config.num_layers, vocab_size)


def iterate_shards(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the tensors of a sharded state dict as they are written: factories cut theirs."""
    for entry in nested_values(state):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for part in nested_values(built) if isinstance(built, dict | list) else [built]:
            if isinstance(part, ShardedTensor):
                yield part


def _fill(shard: ShardedTensor, seed: int, std: float, num_layers: int, vocab_size: int) -> None:
    key, lead, data = shard.key, shard.prepend_axis_num, shard.data
    assert data is not None, "the shards of a model in memory have data"
    if key.endswith("norm.weight") or key.endswith("norm_weight"):
        data.fill_(1.0)
        return
    if key.endswith("bias"):
        data.zero_()
        return
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    name = f"{seed}/{key}/{shard.global_offset[:lead]}"
    generator = torch.Generator().manual_seed(seed_from(name))
    # Draw the full matrix, without the rows that pad the vocabulary.
    full = torch.zeros(shard.global_shape[lead:])
    padded = key.endswith(("word_embeddings.weight", "output_layer.weight"))
    drawn = full[:vocab_size] if padded else full
    drawn.normal_(0.0, std, generator=generator)
    # Keep the part of this rank.
    part = tuple(
        slice(start, start + length)
        for start, length in zip(shard.global_offset[lead:], shard.local_shape, strict=True)
    )
    data.copy_(full[part])
