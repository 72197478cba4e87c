"""A checkpoint's tensors and objects, read by name. Every byte is checked where it is read, once.

No other reader sees the files: what `CheckpointReader` gives is made of the bytes that it read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_chatflow.checkpoint.safe_unpickle import (
    read_metadata,
    read_range,
    read_small_file,
    refusing,
)
from megatron_chatflow.fp8 import extra_state
from megatron_chatflow.serialization.torch_file import read_torch_file
from megatron_chatflow.utils.user_files import open_inside


class CheckpointReader:
    """An opened checkpoint folder.

    Raises ConfigError here and in every method where the files hold what does not belong there.
    """

    def __init__(self, folder: Path) -> None:
        """Read the small files of a checkpoint folder."""
        self.folder = folder
        with refusing(folder):
            self.metadata: Metadata = read_metadata(folder)
            self._common = read_small_file(folder, "common.pt")
        self.common()
        self._sizes = {
            (name, chunk.offsets): chunk.sizes
            for name, entry in self.tensors.items()
            for chunk in entry.chunks
        }

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """{name: size, type and pieces} of weights, ``optimizer.state.*`` and ``ema.*``."""
        entries = self.metadata.state_dict_metadata
        return {name: e for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}

    def common(self) -> dict[str, Any]:
        """What all ranks share: the optimizer's settings and counts. A new dictionary each time."""
        with refusing(self.folder):
            # Tensors are views of the file's bytes, so a copy is read.
            return _plain(read_torch_file(self._common.clone()), 2 * len(self._common))

    def pieces(self, indices: list[MetadataIndex]) -> Iterator[tuple[MetadataIndex, Any]]:
        """(index, tensor or object) of the entries named, in the order of their places."""
        places = self.metadata.storage_data
        with refusing(self.folder):
            order = [(places[index], index) for index in indices]
            order.sort(key=lambda pair: (pair[0].relative_path, pair[0].offset))
            name, file = None, None
            try:
                for place, index in order:
                    if file is None or place.relative_path != name:
                        if file is not None:
                            file.close()
                        name, file = (
                            place.relative_path,
                            open_inside(self.folder, place.relative_path),
                        )
                    found = read_torch_file(read_range(file, place.offset, place.length))
                    yield index, self._checked(index, found)
            finally:
                if file is not None:
                    file.close()

    def _checked(self, index: MetadataIndex, found: Any) -> Any:
        entry = self.metadata.state_dict_metadata[index.fqn]
        if not isinstance(entry, TensorStorageMetadata):
            return _with_own_states(found) if "_extra_state" in index.fqn else found
        assert index.offset is not None, "the index of a tensor's piece has an offset"
        sizes = self._sizes[index.fqn, index.offset]
        dtype = entry.properties.dtype
        if type(found) is not torch.Tensor or found.shape != sizes or found.dtype != dtype:
            raise UnpicklingError(f"a piece of {index.fqn} is not {list(sizes)} of {dtype}")
        return found

    def tensor(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor in its stored type; with `row` that row of it, as [1, ...]."""
        entry = self.tensors[name]
        first, size = [0] * len(entry.size), list(entry.size)
        if row is not None:
            first[0], size[0] = row, 1
        result = torch.zeros(size, dtype=entry.properties.dtype)  # a piece may be missing: padding
        wanted: dict[MetadataIndex, tuple[tuple[slice, ...], tuple[slice, ...]]] = {}
        for chunk in entry.chunks:
            bounds = list(zip(chunk.offsets, chunk.sizes, first, size, strict=True))
            starts = [max(offset, f) for offset, _, f, _ in bounds]
            ends = [min(offset + n, f + s) for offset, n, f, s in bounds]
            if all(start < end for start, end in zip(starts, ends, strict=True)):
                there, here = (
                    tuple(slice(a - o, b - o) for a, b, o in zip(starts, ends, origin, strict=True))
                    for origin in (chunk.offsets, first)
                )
                wanted[MetadataIndex(name, chunk.offsets)] = there, here
        for index, piece in self.pieces(list(wanted)):
            there, here = wanted[index]
            result[here].copy_(piece[there])
        return result


def _with_own_states(found: Any) -> Any:
    """FP8 state, written again from what was read: Transformer Engine unpickles it once more."""
    parts = found if isinstance(found, list) else [found]
    parts = [extra_state.rewrite(part) for part in parts]
    return parts if isinstance(found, list) else parts[0]


def _plain(value: Any, room: int) -> Any:
    """Return `value` if it is a tree of at most `room` parts.

    A cycle, or one part in a thousand places, would take very long to walk through.
    """
    waiting, parts = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        parts += 1
        if parts > room or depth > 50:
            raise UnpicklingError("common.pt is nested too deeply, or repeats itself")
        if isinstance(part, dict):
            waiting.extend((inner, depth + 1) for inner in part.values())
        elif isinstance(part, list | tuple):
            waiting.extend((inner, depth + 1) for inner in part)
    if not isinstance(value, dict):
        raise UnpicklingError("common.pt is no dictionary")
    return value


def tensor_names(folder: Path) -> list[str]:
    """The names of a checkpoint's tensors, sorted; see `CheckpointReader.tensors`."""
    return sorted(CheckpointReader(folder).tensors)


def read_tensors(
    folder: Path, names: list[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a checkpoint, all or those named, one at a time, in their stored type."""
    reader = CheckpointReader(folder)
    for name in sorted(reader.tensors) if names is None else names:
        yield name, reader.tensor(name)


def read_common(folder: Path) -> dict[str, Any]:
    """What all ranks have in common: the optimizer's settings and counts."""
    return CheckpointReader(folder).common()
