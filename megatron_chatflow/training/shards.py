"""megatron-core's torch_dist strategy, with the end of a save in our hands.

megatron-core's own ending writes files on rank 0 between two collectives, so a full disk there leaves the other ranks waiting for ever; and it does
not say what is durable. Here every rank's shards are made durable and hashed where they are written, and one function ends the save with one verdict.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_chatflow.training.durable import seal_file, write_atomically
from megatron_chatflow.training.manifest import Seals
from megatron_chatflow.training.processes import die_with_parent
from megatron_chatflow.training.staging import Staging


class SealedShards(TorchDistSaveShardedStrategy):
    """Writes this rank's shards in a process of its own and calls `end(writer, metadata)` on every rank when all of them are written."""

    def __init__(self, staging: Staging, end: Callable[[Any, Any], None]) -> None:
        super().__init__("torch_dist", 1)
        self._staging, self._end = staging, end
        if filesystem_async._results_queue is None:  # megatron-core would start the same process, but one that outlives a killed rank for ever
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(die_with_parent)
            filesystem_async._results_queue = manager.Queue()

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        write, _, arguments = writer.get_save_function_and_args()
        end = partial(self._end, writer, save_state_dict_ret[1])
        if write is None:  # nothing to write on this rank
            return AsyncRequest(None, (), [end])
        stage = partial(self._staging.copy, writer.write_buckets)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        return AsyncRequest(partial(_write, transforms, Path(writer.checkpoint_dir)), arguments, [end], preload_fn=stage)


def seals_of_rank(folder: Path, rank: int) -> Path:
    """Where the process that writes a rank's shards leaves their seals."""
    return folder / f"seals_{rank}.json"


def _write(transforms: list[Any], folder: Path, rank: int, buckets: list[Any], results: Any) -> None:
    """The writing process: shards, each in a thread, then their seals.

    megatron-core would fork one more process for each shard, and wait for ever if one of them is killed.
    """
    die_with_parent()
    os.nice(19)  # the training goes first
    with ThreadPoolExecutor(len(buckets)) as threads:
        written = dict(threads.map(partial(_write_shard, transforms), range(len(buckets)), buckets))
    failures = [outcome for outcome in written.values() if isinstance(outcome, Exception)]
    try:
        if not failures:
            with ThreadPoolExecutor(len(buckets)) as threads:
                seals = threads.map(seal_file, (Path(path) for path, _, _ in buckets))
                write_atomically(seals_of_rank(folder, rank), json.dumps({name: seal for (_, name, _), seal in zip(buckets, seals, strict=True)}))
    except OSError:  # told by the missing seals
        traceback.print_exc()
    results.put(failures[0] if failures else written)


def _write_shard(transforms: list[Any], number: int, bucket: Any) -> tuple[int, Any]:
    """megatron-core's writing of one file; returns (number, its results or the exception)."""
    answer, pending = SimpleQueue(), Queue()
    pending.put(number)
    FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answer, pending, use_fsync=True)
    return answer.get()


def results_of_rank(writer: Any, folder: Path) -> tuple[str | None, list[Any], Seals]:
    """(what went wrong here or None, megatron-core's write results, seals of this rank's shards)."""
    if writer.write_buckets and writer.results_queue.empty():
        return "the process that writes was killed (out of memory?)", [], {}
    outcome = writer.retrieve_write_results()
    if not isinstance(outcome, list):
        return f"{outcome[0]}", [], {}
    path = seals_of_rank(folder, torch.distributed.get_rank())
    try:
        seals = json.loads(path.read_text()) if writer.write_buckets else {}
    except OSError as error:
        return f"the shards were not made durable ({os.strerror(error.errno)}: {path.name})", [], {}
    return None, outcome, seals
