"""A copy of a checkpoint's tensors in memory shared with the process that writes its shards.

Each save copies into the same memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

_ALIGNMENT = 64
"""Bytes; a tensor's address is a multiple of its element size at least."""


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor is in the shared memory."""

    offset: int
    """In bytes."""
    dtype: torch.dtype
    shape: Sequence[int]

    def within(self, memory: mmap.mmap) -> torch.Tensor:
        """Return the tensor at this place; not a copy."""
        count = torch.Size(self.shape).numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).view(
            self.shape
        )


class SharedTensorBuffer:
    """Shared memory for the tensors of a checkpoint.

    It is kept from save to save, because new memory costs more than the copy.
    """

    def __init__(self) -> None:
        """Reserve nothing yet."""
        self.file: int | None = None
        """Descriptor of the memory, which another process can map; another one when a checkpoint is
        larger than those before.
        """
        self.size = 0
        """In bytes."""
        self._memory: mmap.mmap | None = None

    def copy(self, buckets: list[Any]) -> list[Any]:
        """Copy the tensors of megatron-core's write buckets into the shared memory.

        Returns the buckets with a `TensorSlot` in place of each tensor.

        Raises:
            OSError: there is no memory; what was here before still is.
        """
        # Lay the tensors out one after the other, each at a multiple of _ALIGNMENT bytes.
        staged, moves, end = [], [], 0
        for path, name, (objects, tensors) in buckets:
            slots = []
            for item, tensor in tensors:
                slot = TensorSlot(end, tensor.dtype, tuple(tensor.shape))
                slots.append((item, slot))
                moves.append((slot, tensor))
                # Round the size up: the next tensor begins aligned.
                end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            staged.append((path, name, (objects, slots)))
        self._reserve(end)
        for slot, tensor in moves:
            slot.within(self._memory).copy_(tensor)
        return staged

    def _reserve(self, size: int) -> None:
        if size <= self.size:
            return
        file = os.memfd_create("checkpoint")
        try:
            os.ftruncate(file, size)
            memory = mmap.mmap(file, size)
        except OSError:
            os.close(file)
            raise
        self.close()
        self.file, self.size, self._memory = file, size, memory

    def close(self) -> None:
        """Give the memory back."""
        if self.file is not None:
            os.close(self.file)
        self.file, self.size, self._memory = None, 0, None


def without_views(sharded_state: dict[str, Any]) -> None:
    """Give every CPU tensor of a sharded state dict its own storage over the same memory, in place.

    Weights and moments are views into megatron-core's buffers, and its writer clones views before
    they are copied here once more.
    """
    for entry in nested_values(sharded_state):
        data = getattr(entry, "data", None)
        if (
            isinstance(data, torch.Tensor)
            and data.device.type == "cpu"
            and data.is_contiguous()
            and data.numel()
        ):
            flat = data.detach().view(-1).view(torch.uint8)
            entry.data = torch.from_numpy(flat.numpy()).view(data.dtype).view(data.shape)
