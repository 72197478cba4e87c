"""A copy of the weights that a writing process shares with the training one, made once a save into the same memory.

megatron-core forks its writers. On a CPU the pages of weights, gradients and moments would then be copied one by one by the kernel as the next steps
write to them, which costs more than the whole save. So what is saved is copied into shared memory, and the rest is left out of the fork.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values

_LEAST = 1 << 20
"""Bytes from which a tensor is worth the trouble."""


class Staging:
    """Shared memory for the tensors of a checkpoint; kept from save to save, as fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], mmap.mmap] = {}

    def copy(self, buckets: list[Any]) -> list[Any]:
        """megatron-core's write buckets with every tensor replaced by a copy in shared memory."""
        staged = []
        for path, name, (objects, tensors) in buckets:
            copies = [(item, self._copy((name, i), tensor)) for i, (item, tensor) in enumerate(tensors)]
            staged.append((path, name, (objects, copies)))
        return staged

    def _copy(self, place: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor.cpu()
        buffer = self._buffers.get(place)
        if buffer is None or len(buffer) != tensor.nbytes:
            buffer = self._buffers[place] = mmap.mmap(-1, tensor.nbytes)
        return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def without_views(sharded_state: dict[str, Any]) -> None:
    """Give every CPU tensor of a sharded state dict a storage of its own over the same memory, in place.

    Weights and moments are views into megatron-core's buffers, and its writer clones views before they are copied here once more.
    """
    for entry in nested_values(sharded_state):
        data = getattr(entry, "data", None)
        if isinstance(data, torch.Tensor) and data.device.type == "cpu" and data.is_contiguous() and data.numel():
            flat = data.detach().view(-1).view(torch.uint8)
            entry.data = torch.from_numpy(flat.numpy()).view(data.dtype).view(data.shape)


@contextmanager
def left_at_home(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Processes that are forked inside do not get the memory of these CPU tensors, so writing to them afterwards costs nothing extra (Linux)."""
    spans = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors if t.device.type == "cpu"}
    pages = [(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE) for start, size in spans if size >= _LEAST]
    _advise(pages, getattr(mmap, "MADV_DONTFORK", None))
    try:
        yield
    finally:
        _advise(pages, getattr(mmap, "MADV_DOFORK", None))


def _advise(pages: list[tuple[int, int]], advice: int | None) -> None:
    if advice is not None:
        library = ctypes.CDLL(None)
        for start, stop in pages:
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
