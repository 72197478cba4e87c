"""megatron-core's torch_dist strategy, with the end of a save in our hands.

megatron-core's own ending writes files on rank 0 between two collectives, so a full disk there
leaves the other ranks waiting forever; and it does not report what is on disk. Here every rank's
shards are flushed to disk and hashed where they are written, and one function ends the save with
one verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_chatflow.checkpoint.integrity import FileRecords
from megatron_chatflow.checkpoint.writer_process import Answer, write_shards

filesystem_async._results_queue = (
    SimpleQueue()
)  # megatron-core would start a process for it, which outlives a killed rank


class HashedSaveStrategy(TorchDistSaveShardedStrategy):
    """Has this rank's shards written and hashed by its `WriterProcess`.

    Calls `end(writer, metadata)` on every rank when all shards are written.
    """

    def __init__(self, end: Callable[[Any, Any], None]) -> None:
        """Call `end` on every rank when all shards are written."""
        super().__init__("torch_dist", 1)
        self._end = end

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any
    ) -> AsyncRequest:
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        write = partial(write_shards, transforms) if writer.write_buckets else None
        return AsyncRequest(
            write, (writer.write_buckets,), [partial(self._end, writer, save_state_dict_ret[1])]
        )


def results_of_rank(
    writer: Any, answer: Answer | None
) -> tuple[str | None, list[Any], FileRecords]:
    """Return (error here or None, megatron-core's write results, records of this rank's shards)."""
    if not writer.write_buckets:
        return None, [], {}
    if answer is None:
        return "the process that writes was killed (out of memory?)", [], {}
    results, records = answer
    writer.results_queue.put(results)
    outcome = writer.retrieve_write_results()
    return (None, outcome, records) if isinstance(outcome, list) else (f"{outcome[0]}", [], {})
