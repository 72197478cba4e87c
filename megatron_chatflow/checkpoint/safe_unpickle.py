"""No code from disk: the table of contents of a checkpoint (``.metadata``), read and checked.

torch and megatron-core unpickle ``.metadata`` and the objects among the shards without restriction,
unpack what is compressed, and follow any path. Here nothing is handed to them but what was read
by `strict_pickle` and `torch_file`; `reading.py` has the files, `loading.py` megatron-core's part.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_chatflow.checkpoint.integrity import NAME as MANIFEST
from megatron_chatflow.checkpoint.integrity import read_manifest
from megatron_chatflow.errors import CheckpointError
from megatron_chatflow.serialization.strict_pickle import Known, Maker, StrictUnpickler
from megatron_chatflow.serialization.torch_file import DTYPES, TENSORS
from megatron_chatflow.utils.user_files import open_inside

LARGEST_SMALL_FILE = 1 << 30
"""Bytes of ``.metadata`` and ``common.pt``; those of a run on thousands of GPUs have 100 MB."""


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Raise CheckpointError for whatever a damaged or malicious checkpoint makes readers raise."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        name = Path(error.filename).name if error.filename else "a file"
        missing = isinstance(error, FileNotFoundError)
        what = "is missing" if missing else f"cannot be read ({error.strerror})"
        raise CheckpointError(
            f"{folder} is damaged: {name} {what}; load another checkpoint with --ckpt-step"
        ) from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{folder} is not read: something pickled in it is not what a checkpoint holds "
            f"({reason}); load a checkpoint from a source that you trust"
        ) from None


def read_range(file: Any, offset: int, length: int) -> torch.Tensor:
    """uint8 [length] of an open file."""
    size = os.fstat(file.fileno()).st_size
    if offset + length > size:
        raise UnpicklingError(f"it refers to byte {offset + length} of a file of {size}")
    raw = torch.empty(length, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    while done < length:
        count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise UnpicklingError("a file of it becomes shorter while it is read")
        done += count
    return raw


def read_small_file(folder: Path, name: str) -> torch.Tensor:
    """uint8 [bytes] of a file that is read at once."""
    with open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_SMALL_FILE:
            raise UnpicklingError(f"{name} has {size} bytes, more than any that a training writes")
        return read_range(file, 0, size)


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint says that it holds, and where; every place is inside of its files."""
    metadata = _unpickle(folder)
    _check_places(folder, metadata.storage_data)
    stored = Counter(index.fqn for index in metadata.storage_data)
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str:
            raise UnpicklingError(f"an entry of it has the name {name!r:.100}")
        if type(entry) is TensorStorageMetadata:
            _check_tensor(name, entry, stored[name], metadata.storage_data)
        elif type(entry) is not BytesStorageMetadata:
            raise UnpicklingError(f"{name} is a {type(entry).__name__}")
    return metadata


def _unpickle(folder: Path) -> Metadata:
    data = read_small_file(folder, ".metadata").numpy().tobytes()
    metadata = StrictUnpickler(data, _KNOWN, _BUILDERS, keys=(MetadataIndex,)).load()
    if type(metadata) is not Metadata:
        raise UnpicklingError(".metadata is something else")
    return metadata


def missing_shard(folder: Path) -> str | None:
    """Return what is wrong with the files that ``.metadata`` refers to, or None.

    A file is missing, or `manifest.json` does not list it. A `.metadata` that cannot be read gives
    None; opening the checkpoint reports it.
    """
    try:
        with refusing(folder):
            places = _unpickle(folder).storage_data.values()
            names = sorted({str(place.relative_path) for place in places})
            records = read_manifest(folder)
    except CheckpointError:
        return None
    for name in names:
        if not (folder / name).is_file():
            return f"{name}, which .metadata refers to, is missing"
        if records is not None and name not in records:
            return f"{name}, which .metadata refers to, is not in {MANIFEST}"
    return None


def _check_places(folder: Path, places: dict[MetadataIndex, _StorageInfo]) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {}
    for index, place in places.items():
        if type(index) is not MetadataIndex or type(place) is not _StorageInfo:
            raise UnpicklingError("a place of it is something else")
        if place.transform_descriptors:
            raise UnpicklingError(
                f"{index.fqn} is stored through {place.transform_descriptors!r:.100}; only what is "
                "stored as it is can be read"
            )
        if place.offset < 0 or place.length < 0:
            raise UnpicklingError(f"{index.fqn} has a negative place")
        ranges.setdefault(place.relative_path, []).append((place.offset, place.length))
    for name, pieces in ranges.items():
        with open_inside(folder, name) as file:
            size, end = os.fstat(file.fileno()).st_size, 0
        for offset, length in sorted(pieces):
            if offset < end:
                raise UnpicklingError(f"two entries of it share bytes of {name}")
            end = offset + length
        if end > size:
            raise UnpicklingError(f"it refers to byte {end} of {name}, which has {size}")


def _check_tensor(
    name: str,
    entry: TensorStorageMetadata,
    count: int,
    places: dict[MetadataIndex, _StorageInfo],
) -> None:
    """The tensor's size is that of its pieces, and a piece's that of its bytes."""
    itemsize, elements = entry.properties.dtype.itemsize, 0
    if len(entry.chunks) != count:
        raise UnpicklingError(f"{name} has {len(entry.chunks)} pieces, of which {count} are stored")
    for chunk in entry.chunks:
        if len(chunk.offsets) != len(entry.size) or len(chunk.sizes) != len(entry.size):
            raise UnpicklingError(f"a piece of {name} has other dimensions")
        ends = (start + n for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
        if any(end > n for end, n in zip(ends, entry.size, strict=True)):
            raise UnpicklingError(f"a piece of {name} is outside of it")
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or math.prod(chunk.sizes) * itemsize > place.length:
            raise UnpicklingError(f"a piece of {name} has more elements than bytes")
        elements += math.prod(chunk.sizes)
    if elements < math.prod(entry.size):
        raise UnpicklingError(f"{name} is not complete")


class _Skipped:
    """Replaces what loading does not need: plans and names of the save."""

    def __init__(self, *arguments: Any) -> None: ...


_FIELDS: dict[type, dict[str, tuple[type, ...]]] = {
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    TensorStorageMetadata: {
        "properties": (TensorProperties,),
        "size": (torch.Size,),
        "chunks": (list,),
    },
    BytesStorageMetadata: {},
    MetadataIndex: {
        "fqn": (str,),
        "offset": (torch.Size, type(None)),
        "index": (int, type(None)),
    },
    _StorageInfo: {
        "relative_path": (str,),
        "offset": (int,),
        "length": (int,),
        "transform_descriptors": (list, tuple, type(None)),
    },
}


def _fill(target: Any, state: Any) -> None:
    fields = _FIELDS[type(target)]
    for name, value in state.items():
        if name not in fields or type(value) not in fields[name]:
            kind = type(target).__name__
            raise UnpicklingError(f"{name!s:.50} of a {kind} is a {type(value).__name__}")
    if type(target) is TensorStorageMetadata and not all(
        type(chunk) is ChunkStorageMetadata for chunk in state.get("chunks", ())
    ):
        raise UnpicklingError("a piece of a tensor is something else")
    target.__dict__.update(state)


def _fill_metadata(target: Metadata, state: Any) -> None:
    """megatron-core adds the plans of all ranks, which nothing here reads."""
    entries, places = state["state_dict_metadata"], state["storage_data"]
    if type(entries) is not dict or type(places) is not dict:
        raise UnpicklingError("its entries are something else")
    target.__init__(entries, storage_data=places, storage_meta=StorageMeta())


def _fill_properties(target: TensorProperties, state: Any) -> None:
    dtype, layout, requires_grad, memory_format, pinned = state
    fits = isinstance(dtype, torch.dtype) and layout is torch.strided
    if not fits or type(requires_grad) is not bool or type(pinned) is not bool:
        raise UnpicklingError("a tensor is not of a type that can be read")
    if memory_format is not _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT:
        raise UnpicklingError("a tensor is not contiguous")
    target.__init__(dtype, requires_grad=requires_grad)


def _make_layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise UnpicklingError(f"a tensor has the layout {name!r:.50}")
    return torch.strided


def _empty(kind: type) -> Maker:
    return Maker(lambda: object.__new__(kind))


_PLANS = "torch.distributed.checkpoint.planner"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"
_KNOWN: Known = {
    **DTYPES,
    ("collections", "OrderedDict"): TENSORS["collections", "OrderedDict"],
    ("torch", "Size"): TENSORS["torch", "Size"],
    ("torch", "strided"): torch.strided,
    ("torch.serialization", "_get_layout"): Maker(_make_layout),
    (_METADATA, "_MEM_FORMAT_ENCODING"): Maker(_MEM_FORMAT_ENCODING),
    **{
        (kind.__module__, kind.__name__): _empty(kind)
        for kind in (Metadata, TensorProperties, *_FIELDS)
    },
    (_METADATA, "StorageMeta"): Maker(_Skipped),
    (_FILES, "_StoragePrefix"): Maker(_Skipped),
    **{
        (_PLANS, name): Maker(_Skipped)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
}
"""Names that the ``.metadata`` of torch and of megatron-core refer to."""
_BUILDERS = {
    **dict.fromkeys(_FIELDS, _fill),
    Metadata: _fill_metadata,
    TensorProperties: _fill_properties,
    _Skipped: lambda target, state: None,
}
