"""Read what `torch.save` wrote, from bytes that may have been written by an attacker.

torch's own reader unpacks compressed members, allocates what the file announces, and knows many
more objects. This one knows tensors and plain data. A tensor is a view of the bytes of the file.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import OrderedDict
from pickle import UnpicklingError
from typing import Any

import torch

from megatron_chatflow.serialization.strict_pickle import Known, Maker, StrictUnpickler

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_MEMBER = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_MEMBERS = 65_535
_MAX_DIMENSIONS = 64
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class Storage:
    """Bytes of a file that tensors are views of."""

    def __init__(self, raw: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Hold the bytes `raw` of elements of `dtype`."""
        self.raw, self.dtype = raw, dtype


def read_torch_file(raw: torch.Tensor, known: Known | None = None) -> Any:
    """The object in the bytes of a file of `torch.save`, in either of its two formats.

    Args:
        raw: uint8 [bytes]. The tensors of the result are views of it.
        known: names that may occur, besides those of tensors and plain data.

    Raises:
        pickle.UnpicklingError: the file is damaged, or holds anything but tensors and plain data.
    """
    names = {**TENSORS, **(known or {})}
    is_zip = _bytes(raw[:4]) == b"PK\x03\x04"
    return _read_zip(raw, names) if is_zip else _read_legacy(raw, names)


def _read_zip(raw: torch.Tensor, known: Known) -> Any:
    data = memoryview(raw.numpy().data)
    members = _members(data)
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        raise UnpicklingError("its members are not in one folder")
    (root,) = roots

    def content(name: str) -> torch.Tensor:
        start, size = _place(data, members[f"{root}/{name}"])
        return raw[start : start + size]

    if f"{root}/data.pkl" not in members:
        raise UnpicklingError("it has no data.pkl")
    if f"{root}/byteorder" in members:
        order = _bytes(content("byteorder")).decode()
        if order != sys.byteorder:
            raise UnpicklingError(f"its byte order is {order!r:.20}, and this machine's is another")

    def storage(identity: Any) -> Storage:
        kind, key, _ = _storage_identity(identity, 5)
        return Storage(content(f"data/{key}"), kind.dtype)

    return StrictUnpickler(_bytes(content("data.pkl")), known, persistent=storage).load()


def _bytes(raw: torch.Tensor) -> bytes:
    return raw.numpy().tobytes()


def _members(data: memoryview) -> dict[str, tuple[int, int]]:
    """{name: (place of its local header, bytes)} of a zip file without compression."""
    end = _END.unpack(data[-_END.size :])
    if end[0] != b"PK\x05\x06":
        raise UnpicklingError("it is no intact file of torch.save: the end is missing")
    count, size, start = end[4:7]
    limit = len(data) - _END.size
    locator = limit - _LOCATOR_64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, _, place, _ = _LOCATOR_64.unpack(data[locator : locator + _LOCATOR_64.size])
        if place > locator - _END_64.size:
            raise UnpicklingError("it is no intact file of torch.save: the end is damaged")
        large = _END_64.unpack(data[place : place + _END_64.size])
        if large[0] != b"PK\x06\x06":
            raise UnpicklingError("it is no intact file of torch.save: the end is damaged")
        count, size, start = large[7:10]
        limit = place
    if count > _MAX_MEMBERS or start + size > limit:
        raise UnpicklingError("it is no intact file of torch.save: the table of members is damaged")
    table, position = data[start : start + size], 0
    members: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        signature, _, _, flags, method, _, _, _, packed, unpacked, *lengths, _, _, _, header = (
            _MEMBER.unpack(table[position : position + _MEMBER.size])
        )
        if signature != b"PK\x01\x02" or flags & 1 or method != 0:
            raise UnpicklingError("a member of it is compressed, encrypted or damaged")
        name_length, extra_length, comment_length = lengths
        position += _MEMBER.size
        name = str(table[position : position + name_length], "utf-8")
        position += name_length
        extra = table[position : position + extra_length]
        position += extra_length + comment_length
        unpacked, packed, header = _large_fields(extra, [unpacked, packed, header])
        if packed != unpacked or name in members:
            raise UnpicklingError(f"member {name!r:.100} of it is damaged")
        members[name] = (header, unpacked)
    return members


def _large_fields(extra: memoryview, fields: list[int]) -> list[int]:
    """Sizes and places of 4 GiB and more are in an extra field, in the order of `fields`."""
    position, large = 0, b""
    while position + 4 <= len(extra):
        tag, size = struct.unpack("<2H", extra[position : position + 4])
        if tag == 1:
            large = bytes(extra[position + 4 : position + 4 + size])
        position += 4 + size
    found = []
    for field in fields:
        if field == 0xFFFFFFFF:
            if len(large) < 8:
                raise UnpicklingError("a member of it is damaged: its size is missing")
            (field,), large = struct.unpack("<Q", large[:8]), large[8:]
        found.append(field)
    return found


def _place(data: memoryview, member: tuple[int, int]) -> tuple[int, int]:
    """(first byte, bytes) of a member's content."""
    header, size = member
    if header > len(data) - _LOCAL.size:
        raise UnpicklingError("a member of it is outside of the file")
    local = _LOCAL.unpack(data[header : header + _LOCAL.size])
    start = header + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\x03\x04" or start + size > len(data):
        raise UnpicklingError("a member of it is outside of the file")
    return start, size


def _read_legacy(raw: torch.Tensor, known: Known) -> Any:
    """The format before torch 1.6, in which storages are pickled to this day."""
    wanted: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        kind, key, _ = _storage_identity(identity[:5] if type(identity) is tuple else identity, 5)
        if type(identity) is tuple and len(identity) > 5 and identity[5] is not None:
            raise UnpicklingError("a storage of it is a view of another")
        return wanted.setdefault(key, Storage(torch.empty(0, dtype=torch.uint8), kind.dtype))

    unseen = Maker(lambda *_: None)
    without_tensors = {name: unseen if name[0] == "torch._utils" else known[name] for name in known}
    reader = StrictUnpickler(_bytes(raw), without_tensors, persistent=storage)
    if (reader.load(), reader.load()) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise UnpicklingError("it is no file of torch.save")
    about = reader.load()
    if type(about) is not dict or about.get("little_endian") is not (sys.byteorder == "little"):
        raise UnpicklingError("its byte order is not this machine's")
    start = reader.position
    reader.load()
    keys = reader.load()
    if type(keys) is not list or len(keys) != len(wanted):
        raise UnpicklingError("its storages are not those that it refers to")
    position = reader.position
    for key in keys:
        place = wanted[key]
        itemsize = 1 if place.dtype is None else place.dtype.itemsize
        (count,) = struct.unpack("<q", _bytes(raw[position : position + 8]))
        position += 8
        if not 0 <= count * itemsize <= len(raw) - position:
            raise UnpicklingError("a storage of it is outside of the file")
        place.raw = raw[position : position + count * itemsize]
        position += count * itemsize
    reader = StrictUnpickler(_bytes(raw), known, persistent=storage)
    reader.position = start  # once more, now that the storages are there
    return reader.load()


def _storage_identity(identity: Any, length: int) -> tuple[Any, str, int]:
    """(kind, key, elements) of a persistent id."""
    if type(identity) is not tuple or len(identity) != length or identity[0] != "storage":
        raise UnpicklingError("it refers to data outside of it")
    _, kind, key, _, count = identity
    if not isinstance(kind, _StorageKind) or type(key) is not str or type(count) is not int:
        raise UnpicklingError("it refers to data outside of it")
    return kind, key, count


class _StorageKind:
    """The type of a storage; None means untyped bytes."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


def _make_size(dimensions: Any = ()) -> torch.Size:
    return torch.Size(_whole_numbers(dimensions))


def _whole_numbers(numbers: Any) -> tuple[int, ...]:
    fits = isinstance(numbers, tuple) and len(numbers) <= _MAX_DIMENSIONS
    if not fits or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise UnpicklingError("a size is not a few whole numbers")
    return numbers


def _make_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *more: Any
) -> torch.Tensor:
    """A view of a storage, as torch's `_rebuild_tensor_v2` and `_rebuild_tensor_v3` make it."""
    if not isinstance(storage, Storage) or len(more) > 2:
        raise UnpicklingError("a tensor has no storage")
    dtype = storage.dtype if not more or more[0] is None else more[0]
    if not isinstance(dtype, torch.dtype):
        raise UnpicklingError("a tensor has no type")
    size, stride, (offset,) = (
        _whole_numbers(size),
        _whole_numbers(stride),
        _whole_numbers((offset,)),
    )
    stored, elements = len(storage.raw) // dtype.itemsize, math.prod(size)
    if len(size) != len(stride) or elements > stored:
        raise UnpicklingError("a tensor is larger than its storage")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + offset
    if elements and last >= stored:
        raise UnpicklingError("a tensor is outside of its storage")
    raw = storage.raw[: stored * dtype.itemsize]
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).as_strided(size, stride, raw.storage_offset() // dtype.itemsize + offset)


def _make_ordered(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments:
        raise UnpicklingError("an ordered dictionary is made of something")
    return OrderedDict()


DTYPES: Known = {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
TENSORS: dict[tuple[str, str], Any] = {
    **DTYPES,
    **{
        ("torch", f"{name}Storage"): _StorageKind(dtype)
        for name, dtype in {
            "Float": torch.float32,
            "Double": torch.float64,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
        }.items()
    },
    ("torch.storage", "UntypedStorage"): _StorageKind(None),
    ("torch", "Size"): Maker(_make_size),
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_make_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_make_tensor),
    ("collections", "OrderedDict"): Maker(_make_ordered),
}
"""Names that pickled tensors and plain data refer to."""


def storage_from_bytes(data: Any) -> Storage:
    """What torch's `_load_from_bytes` means in the pickle of a tensor."""
    if type(data) is not bytes:
        raise UnpicklingError("a storage is no bytes")
    found = read_torch_file(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if not isinstance(found, Storage):
        raise UnpicklingError("a storage is something else")
    return found


PICKLED_TENSORS: dict[tuple[str, str], Any] = TENSORS | {
    ("torch.storage", "_load_from_bytes"): Maker(storage_from_bytes)
}
"""The same where a tensor was pickled without `torch.save`, its storage inside of the pickle."""
