"""A checkpoint's tensors, whole and by name, read in one process without megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_chatflow.training.safe_reading import check_pickles


def tensor_names(folder: Path) -> list[str]:
    """The names of a checkpoint's tensors, sorted: weights, ``optimizer.state.*`` and, with --ema-decay, ``ema.*``.

    Raises UsageError where the checkpoint's pickles hold what does not belong there.
    """
    check_pickles(folder)
    return sorted(name for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items() if _is_tensor(entry))


def read_tensors(folder: Path, names: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a checkpoint, all or those named, in their stored type; one at a time, so memory holds no more than the largest."""
    names = tensor_names(folder) if names is None else names
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in names:
        state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)}
        load(state, checkpoint_id=folder, no_dist=True)
        yield name, state[name]


def _is_tensor(entry: object) -> bool:
    return isinstance(entry, TensorStorageMetadata)


def read_common(folder: Path) -> dict[str, Any]:
    """What all ranks have in common: the optimizer's settings and counts. Read with `weights_only`: it holds no code."""
    return torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
