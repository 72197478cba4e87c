"""Write and read a checkpoint in megatron-core's torch_dist format, a tensor of a layer at a time.

Which tensors there are, and in which shape, is not written down here: a model of the settings is
built without memory, and its own sharded state dict determines them. So a folder written here is
what `train` would have saved, whatever tensor and pipeline size it is loaded with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
)
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_chatflow.config import Config, ModelConfig
from megatron_chatflow.config.schema import ParallelSettings, PrecisionSettings
from megatron_chatflow.config.schema.section import convert_to
from megatron_chatflow.conversion.weight_mapping import LAYERS
from megatron_chatflow.distributed.fake_ranks import rehearse
from megatron_chatflow.model.gpt import build_model
from megatron_chatflow.model.init import iterate_shards


@dataclass(frozen=True)
class Piece:
    """One tensor of one layer, or one outside the layers."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    """Without the axis of the layers."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of a model holds."""

    shapes: dict[str, tuple[int, ...]]
    """{key: shape}; inside the layers with their number as the first axis."""
    objects: dict[str, Any]
    """{key: value} of what is no weight: the (empty) states of the layers' modules."""

    def pieces(self) -> list[Piece]:
        """In the order of the model: embedding, layer by layer, final norm, output layer."""
        outside = [
            Piece(key, None, shape)
            for key, shape in self.shapes.items()
            if not key.startswith(LAYERS)
        ]
        inside = {key: shape for key, shape in self.shapes.items() if key.startswith(LAYERS)}
        count = next(iter(inside.values()))[0]
        layers = [
            Piece(key, layer, shape[1:]) for layer in range(count) for key, shape in inside.items()
        ]
        return (
            [p for p in outside if p.key.startswith("embedding.")]
            + layers
            + [p for p in outside if not p.key.startswith("embedding.")]
        )


def describe(config: Config, vocab_size: int) -> Contents:
    """Return what the model of these settings saves.

    Needs no process group and no memory. The layout in the settings is not read.
    """
    plain = convert_to(
        ModelConfig,
        config,
        model=config.model.resolve(config.data.seq_length),
        parallel=ParallelSettings(),
        precision=PrecisionSettings(),
        training=replace(config.training, bf16=False).resolve(1),
    )
    with rehearse(0, 1, plain.parallel, plain.model.num_layers):
        (model,) = build_model(plain, vocab_size, "local", wrap=False)
        state = model.sharded_state_dict()
    objects = {
        entry.unique_key: None if entry.data is None else torch.empty(0, dtype=torch.uint8)
        for entry in state.values()
        if isinstance(entry, ShardedObject)
    }
    shapes = {shard.key: shard.global_shape for shard in iterate_shards(state)}
    return Contents(shapes, objects)


class _Planner(DefaultSavePlanner):
    """Asks for a tensor when its turn to be written has come."""

    def __init__(
        self,
        contents: Contents,
        dtypes: dict[str, torch.dtype],
        make: Callable[[Piece], torch.Tensor],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._contents, self._dtypes, self._make = contents, dtypes, make
        self._pieces: dict[MetadataIndex, Piece] = {}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, BytesIOWriteData(0))
            for key in self._contents.objects
        ]
        for piece in self._contents.pieces():
            full = torch.Size(self._contents.shapes[piece.key])
            offsets = torch.Size([piece.layer or 0] + [0] * (len(full) - 1))
            chunk = ChunkStorageMetadata(
                offsets, torch.Size(full if piece.layer is None else (1, *piece.shape))
            )
            index = MetadataIndex(piece.key, offsets)
            data = TensorWriteData(chunk, TensorProperties(dtype=self._dtypes[piece.key]), full)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            self._pieces[index] = piece
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.offset is None:
            return [
                self._contents.objects[index.fqn]
            ]  # megatron-core keeps an object as a list of the shards of it
        piece = self._pieces[index]
        tensor = self._make(piece)
        assert tensor.shape == piece.shape and tensor.dtype == self._dtypes[piece.key], (
            f"{piece} was made as {tensor.shape}, {tensor.dtype}"
        )
        return tensor.contiguous() if piece.layer is None else tensor[None].contiguous()


def write(
    folder: Path,
    contents: Contents,
    dtypes: dict[str, torch.dtype],
    make: Callable[[Piece], torch.Tensor],
) -> None:
    """Fill an empty folder with a checkpoint.

    Args:
        folder: exists.
        contents: see `describe`.
        dtypes: of each key.
        make: gives a piece's tensor; called once for each, in the order of `Contents.pieces`. Only
        a few are kept at a time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_state_dict(
            {},
            storage_writer=_Writer(folder),
            planner=_Planner(contents, dtypes, make),
            no_dist=True,
        )
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Writer(FileSystemWriter):
    """A writer that leaves the folder's path and a random name out of ``.metadata``.

    The path would be pickled, and the same weights must give the same bytes.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()
