"""Weights of a Hugging Face folder into a model of any layout, without a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.conversion.hf_model import Opened
from megatron_chatflow.conversion.torch_dist import Piece
from megatron_chatflow.model.init import iterate_shards


@torch.no_grad()
def load_weights(opened: Opened, model: Sequence[MegatronModule]) -> None:
    """Fill this rank's model chunks.

    They were built with ``opened.config.model`` and ``opened.vocabulary.rows``.

    Every rank reads the tensors it has a part of, one at a time.
    """
    for chunk in model:
        for shard in iterate_shards(getattr(chunk, "module", chunk).sharded_state_dict()):
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
