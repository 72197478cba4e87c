"""Weights of a Hugging Face folder into a model of any layout, without a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.conversion.hf_model import Opened
from megatron_chatflow.conversion.torch_dist import Piece


@torch.no_grad()
def load_weights(opened: Opened, model: Sequence[MegatronModule]) -> None:
    """Fill this rank's model chunks.

    They were built with ``opened.config.model`` and ``opened.vocabulary.rows``.

    Every rank reads the tensors it has a part of, one at a time.
    """
    for chunk in model:
        for shard in _shards(getattr(chunk, "module", chunk)):
            lead = shard.prepend_axis_num
            piece = Piece(
                shard.key, shard.global_offset[0] if lead else None, shard.global_shape[lead:]
            )
            part = tuple(
                slice(start, start + length)
                for start, length in zip(shard.global_offset[lead:], shard.local_shape, strict=True)
            )
            assert shard.data is not None, "the shards of a model in memory have data"
            shard.data.copy_(opened.tensor(piece)[part])


def _shards(chunk: MegatronModule) -> Iterator[ShardedTensor]:
    for entry in chunk.sharded_state_dict().values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for shard in (
            built.values()
            if isinstance(built, dict)
            else built
            if isinstance(built, list)
            else [built]
        ):
            if isinstance(shard, ShardedTensor):
                yield shard
