"""Checkpoints that an attacker wrote, and small valid ones to make them of."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EVIL = "evil.distcp"


class Evil:
    """Touches a file where somebody unpickles it without restriction."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def write_small(folder: Path) -> Path:
    """A checkpoint of a few tensors, an object and FP8 state; no process group is needed."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import StorageMeta

    from megatron_chatflow.fp8 import extra_state

    class Writer(dcp.FileSystemWriter):
        def storage_meta(self) -> StorageMeta:
            return StorageMeta()

    folder.mkdir(parents=True)
    scales = {name: torch.rand(3) for name in ("scale_fwd", "scale_bwd")}
    histories = {name: torch.rand(2, 3) for name in ("amax_history_fwd", "amax_history_bwd")}
    content = {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.tensor(3),
        "linear._extra_state/shard_0_1": [extra_state.pack(scales | histories, hybrid=True)],
        "object": [{"x": [1, 2.5, None, ("y", True)]}],
    }
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(content, storage_writer=Writer(folder), planner=planner, no_dist=True)
    common = {"param_groups": [{"lr": 0.1}], "step": torch.tensor(2.0)}
    torch.save({"optimizer": common}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def harmless_when_packed(marker: Path) -> bytes:
    """A legacy file of torch that is plain data as it is, and runs code when unpacked by zstd.

    The first bytes are a frame that zstd skips and, for pickle, a string of 42 bytes.
    """
    import torch
    import zstandard

    legacy = io.BytesIO()
    torch.save([None], legacy, _use_new_zipfile_serialization=False)
    evil = io.BytesIO()
    torch.save(Evil(marker), evil)
    skipped = b"-" * 36 + legacy.getvalue()[2:]
    skipped += b"\0" * (-len(skipped) % 256)  # the size is a part of that string, which is UTF-8
    frame = struct.pack("<II", 0x184D2A55, len(skipped)) + skipped
    return frame + zstandard.compress(evil.getvalue())


def edit_metadata(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the unpickled ``.metadata`` of a checkpoint of our own."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def exploit(folder: Path, marker: Path) -> None:
    """Make an object of a checkpoint one that is checked packed and read unpacked."""
    content = harmless_when_packed(marker)
    (folder / EVIL).write_bytes(content)

    def change(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if "_extra_state" in index.fqn:
                place.relative_path, place.offset, place.length = EVIL, 0, len(content)
                place.transform_descriptors = ["stream.zstd/1"]

    edit_metadata(folder, change)


def rewrite_manifest(folder: Path) -> None:
    """Write the checksums again, as an attacker does."""
    from megatron_chatflow.checkpoint import integrity

    (folder / integrity.NAME).unlink(missing_ok=True)
    known = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps({k: v for k, v in known.items() if k != "sealed"})
    )
    integrity.write_manifest(folder, integrity.record_files(folder))


def read_all(folder: Path) -> dict[str, Any]:
    """{name: value} of everything in a checkpoint."""
    from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader

    reader = CheckpointReader(folder)
    found: dict[str, Any] = {name: reader.tensor(name) for name in reader.tensors}
    others = [i for i in reader.metadata.storage_data if i.fqn not in found]
    return found | {i.fqn: value for i, value in reader.pieces(others)} | reader.common()


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles that Python's own reader answers with memory, recursion or time."""
    yield "bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    yield "text", b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"."
    yield "bytearray", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
    yield "memo", b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b"."
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"."
    yield "integer", b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"."
    yield "tuples", b"\x80\x02)" + b"\x85" * 20_000 + b"."
    yield "key", b"\x80\x02})" + b"\x85" * 3_000 + b"Ns."
    yield "lists", b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    yield "marks", b"\x80\x02" + b"(" * 20_000 + b"t" * 19_999 + b"."
    yield "sizes", b"\x80\x02(" + b"K\x01" * 9_000 + b"tq\x000ctorch\nSize\nh\x00\x85R."
    yield (
        "laughs",
        b"\x80\x02]q\x00" + b"".join(b"]h%ch%caq%c" % (i, i, i + 1) for i in range(90)) + b".",
    )
