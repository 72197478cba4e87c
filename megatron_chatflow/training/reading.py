"""A checkpoint's tensors, whole and by name, read in one process without megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensor_names(folder: Path) -> list[str]:
    """The names of a checkpoint's tensors, sorted: weights, ``optimizer.state.*`` and, with --ema-decay, ``ema.*``."""
    return sorted(name for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items() if _is_tensor(entry))


def read_tensors(folder: Path, names: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a checkpoint, all or those named, in their stored type; one at a time, so memory holds no more than the largest."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in tensor_names(folder) if names is None else names:
        state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)}
        load(state, checkpoint_id=folder, no_dist=True)
        yield name, state[name]


def _is_tensor(entry: object) -> bool:
    return isinstance(entry, TensorStorageMetadata)
