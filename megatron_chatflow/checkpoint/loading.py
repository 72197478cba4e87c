"""megatron-core's loading of a checkpoint, with a reader of ours in place of torch's.

While it runs, no unrestricted reader works in its thread: a way to one that was overlooked, or that
another version of torch or megatron-core has, ends in an error.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as mcore
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
from megatron_chatflow.errors import ChatflowError, CheckpointError


def load(reader: CheckpointReader, wanted: dict[str, Any]) -> dict[str, Any]:
    """`dist_checkpointing.load` of an opened checkpoint.

    Raises ConfigError, on every rank, where a rank finds what does not belong into a checkpoint.
    """
    try:
        with unrestricted_readers_refused():
            loaded = dist_checkpointing.load(
                wanted,
                str(reader.folder),
                sharded_strategy=_Shards(reader),
                common_strategy=_Common(reader),
            )
            assert isinstance(loaded, dict), "only the state was asked for"
            return loaded
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, ChatflowError):
                raise failure from None
        raise


class _Common(TorchCommonLoadStrategy):
    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return self._reader.common()


class _Shards(mcore.TorchDistLoadShardedStrategy):
    """The same as its base, which makes a reader of torch's, with `_Storage`."""

    def __init__(self, reader: CheckpointReader) -> None:
        super().__init__()
        self._reader = reader

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        if loaded_version != "torch_dist":
            raise CheckpointError(
                f"{self._reader.folder} is in the format {loaded_version!r:.50}; only torch_dist "
                "can be loaded"
            )

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Any) -> dict[str, Any]:
        tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
        wanted, flat, renamed = mcore._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        found: dict[str, Any] = mcore.mcore_to_pyt_state_dict(wanted, True)
        planner = _Planner(
            self._reader.folder,
            shapes_validation_sharded_tensors=[t for t in tensors if not t.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                t.key: t for t in tensors if t.allow_shape_mismatch
            },
        )
        _load_state_dict(found, _Storage(self._reader), planner=planner)
        found = {name: mcore._unwrap_pyt_sharded_tensor(value) for name, value in found.items()}
        loaded = mcore._replace_sharded_keys_with_state_dict_keys(found, flat, renamed)
        mcore._restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _Planner(mcore.MCoreLoadPlanner):
    """A load planner that takes objects and reports every tensor that differs.

    Its base takes bytes and unpickles them, and reports the first tensor alone.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def _validate_global_shapes(
        self, metadata: Metadata, sharded_tensors: list[ShardedTensor]
    ) -> None:
        found = metadata.state_dict_metadata
        differ: dict[str, str] = {}
        for tensor in sharded_tensors:
            here, saved = list(tensor.global_shape), getattr(found.get(tensor.key), "size", None)
            if saved is None:
                differ[tensor.key] = f"{tensor.key} is {here} here and not in the checkpoint"
            elif list(saved) != here:
                differ[tensor.key] = (
                    f"{tensor.key} is {here} here and {list(saved)} in the checkpoint"
                )
        if differ:
            raise CheckpointError(
                f"{self._folder} does not fit this model: {', '.join(differ.values())}; give the "
                "settings of the model that it was saved with"
            )

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], value)


class _Storage(StorageReader):
    """torch's interface to a `CheckpointReader`."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        requests: dict[Any, list[ReadItem]] = {}
        for item in plan.items:
            requests.setdefault(item.storage_index, []).append(item)
        for index, found in self._reader.pieces(list(requests)):
            for item in requests[index]:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, found)
                    continue
                target = planner.resolve_tensor(item).detach()
                ranges = zip(item.storage_offsets, item.lengths, strict=True)
                piece = found[tuple(slice(start, start + n) for start, n in ranges)]
                if piece.shape != target.shape:
                    shapes = f"{list(piece.shape)} in place of {list(target.shape)}"
                    raise CheckpointError(f"{self._reader.folder}: {index.fqn} gives {shapes}")
                target.copy_(piece)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_metadata(self) -> Metadata:
        return self._reader.metadata

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


_guard = threading.Lock()
_guarded = threading.local()
_users = 0
_replaced: list[tuple[Any, str, Any]] = []


@contextmanager
def unrestricted_readers_refused() -> Iterator[None]:
    """`torch.load` and pickle's readers raise an error in this thread; others are not affected."""
    global _users
    with _guard:
        if _users == 0:
            _replace()
        _users += 1
    _guarded.depth = getattr(_guarded, "depth", 0) + 1
    try:
        yield
    finally:
        _guarded.depth -= 1
        with _guard:
            _users -= 1
            if _users == 0:
                while _replaced:
                    setattr(*_replaced.pop())


def _replace() -> None:
    class Unpickler(pickle.Unpickler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            _refuse("pickle.Unpickler")
            super().__init__(*arguments, **options)

    places = [(pickle, "load"), (pickle, "loads"), (torch, "load"), (torch.serialization, "load")]
    for module, name in places:
        original = getattr(module, name)
        _replaced.append((module, name, original))
        setattr(module, name, _refusing(original, f"{module.__name__}.{name}"))
    _replaced.append((pickle, "Unpickler", pickle.Unpickler))
    pickle.Unpickler = Unpickler


def _refusing(original: Any, name: str) -> Any:
    def read(*arguments: Any, **options: Any) -> Any:
        _refuse(name)
        return original(*arguments, **options)

    return read


def _refuse(name: str) -> None:
    if getattr(_guarded, "depth", 0):
        raise pickle.UnpicklingError(f"{name} was called while a checkpoint was loaded")
