"""No code from disk: what is pickled in a checkpoint is checked before megatron-core and torch unpickle it.

``.metadata`` is a pickle, which torch reads without restriction, and so are sharded objects among the shards: the FP8 state of Transformer Engine's
layers, which is a tensor of bytes that those layers unpickle once more. All of them, and ``common.pt``, are read here first, with readers that know
what belongs there and refuse everything else. Tensors torch reads with `weights_only` itself.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_chatflow.config import UsageError
from megatron_chatflow.precision import state

ALLOWED = {
    "collections": {"OrderedDict"},
    "torch": {"Size", "strided", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip
"""{module: names} that megatron-core's and torch's own ``.metadata`` refer to; none of them runs code of the file."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def check_pickles(folder: Path) -> None:
    """Raises UsageError where a checkpoint's pickles hold anything but the data of a checkpoint."""
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise UsageError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, with which torch would run code out of a checkpoint; unset it")
    try:
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
        metadata = _Reader(io.BytesIO((folder / ".metadata").read_bytes())).load()
        for index, where in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with open(folder / where.relative_path, "rb") as file:
                    file.seek(where.offset)
                    content = torch.load(io.BytesIO(file.read(where.length)), map_location="cpu", weights_only=True)
                if "_extra_state" in index.fqn:
                    for part in content if isinstance(content, list) else [content]:
                        state.read(part)
    except Exception as error:  # whatever a strange file makes these readers raise
        sentence = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{folder} is not read: something pickled in it is not what a checkpoint holds ({sentence})") from None
