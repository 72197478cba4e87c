"""The process that writes a rank's shards, at the lowest priority.

There is one for the complete run, started before there are weights.

megatron-core forks one for each save. Whatever the steps after that change, the kernel copies
first, page by page; and a fork takes along threads, sockets and a CUDA context. Its persistent one
is a new interpreter on every rank, which imports torch once more; and where that one is killed, the
ranks wait forever. This one shares with its rank what is imported, and the copy of what is to be
saved (`SharedTensorBuffer`).
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from queue import Queue, SimpleQueue
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_chatflow.checkpoint.integrity import FileRecords
from megatron_chatflow.checkpoint.shared_memory import SharedTensorBuffer
from megatron_chatflow.utils.files import record_file
from megatron_chatflow.utils.process import blocked_signals, die_with_parent

Answer = tuple[Any, FileRecords]
"""(megatron-core's write results by shard, or the first exception; the shards' records)."""


class WriterProcess(AsyncCaller):
    """This rank's process, as megatron-core's AsyncCallsQueue uses one."""

    def __init__(self) -> None:
        """Start the process."""
        self.answer: Answer | None = None
        """To the last request; None where the process was killed."""
        self._buffer = SharedTensorBuffer()
        self._thread = ThreadPoolExecutor(1, "checkpoint copy")
        self._request: Future[None] | None = None
        """The last one, done when it is with the process; None when it is answered, or will never
        be.
        """
        self._start("fork")

    def _start(self, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="checkpoint writer")
        with blocked_signals():
            self._process.start()
        theirs.close()
        self._mapped = 0
        """Bytes of the shared memory that the process knows of."""

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Have a save of `save_strategy.HashedSaveStrategy` written.

        What it holds may change when `settle` returns.
        """
        self.answer = None
        if async_req.async_fn is None:  # nothing to write on this rank
            return
        if (
            not self._process.is_alive()
        ):  # not a fork: that would share the weights, and the memory may be short already
            self._start("spawn")
        self._request = self._thread.submit(
            self._hand_over, async_req.async_fn, *async_req.async_fn_args
        )

    def _hand_over(self, write: Callable[[list[Any]], Answer], buckets: list[Any]) -> None:
        staged = self._buffer.copy(buckets)
        fresh = self._mapped != self._buffer.size
        try:
            self._connection.send((write, staged, self._buffer.size if fresh else 0))
            if fresh:
                assert self._buffer.file is not None, "`copy` made it"
                send_handle(self._connection, self._buffer.file, self._process.pid)
                self._mapped = self._buffer.size
        except OSError:  # killed just now: the missing answer shows it
            pass

    def settle(self) -> None:
        """Wait until the tensors of the last request are copied."""
        if self._request is not None:
            try:
                self._request.result()
            except OSError as error:  # no memory for the copy
                self.answer, self._request = (error, {}), None

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Return whether every rank's shards are written, or their processes killed.

        With `blocking` those of this rank are when it returns.
        """
        if blocking or (self._request is not None and self._request.done()):
            self.settle()
        busy = self._request is not None and not (self._request.done() and self._connection.poll())
        done = not busy if no_dist else self.sync_all_async_calls(int(busy))
        if (done or blocking) and self._request is not None:
            try:
                self.answer = self._connection.recv()
            except (EOFError, OSError):
                self._process.join()
            self._request = None
        return done or blocking

    def close(self, abort: bool = False) -> None:
        """End the process, whatever it is at; a second call does nothing."""
        self._process.kill()
        self._process.join()
        self._thread.shutdown()
        self._connection.close()
        self._buffer.close()

    def __del__(self) -> None:
        """Do nothing: `close` ends the process, where its base would end it here."""


def _serve(connection: Connection) -> None:
    """The process: a request, an answer, until it is killed."""
    die_with_parent()
    gc.freeze()  # what the rank had before is not for this process to collect
    os.nice(19)  # the training goes first
    memory = None
    while True:
        write, buckets, size = connection.recv()
        if size:
            file = recv_handle(connection)
            memory = mmap.mmap(file, size)
            os.close(file)
        buckets = [
            (path, name, (objects, [(item, slot.within(memory)) for item, slot in slots]))
            for path, name, (objects, slots) in buckets
        ]
        connection.send(write(buckets))


def write_shards(transforms: list[Any], buckets: list[Any]) -> Answer:
    """Write megatron-core's buckets, each a file and in a thread, and flush them to disk.

    megatron-core would fork one more process for each shard, and wait forever if one of them is
    killed.
    """
    with ThreadPoolExecutor(len(buckets)) as threads:
        written = dict(threads.map(partial(_write_shard, transforms), range(len(buckets)), buckets))
        if failures := [outcome for outcome in written.values() if isinstance(outcome, Exception)]:
            return failures[0], {}
        try:
            records = threads.map(record_file, (Path(path) for path, _, _ in buckets))
            return written, {
                name: record for (_, name, _), record in zip(buckets, records, strict=True)
            }
        except OSError as error:
            return error, {}


def _write_shard(transforms: list[Any], number: int, bucket: Any) -> tuple[int, Any]:
    """megatron-core's writing of one file; returns (number, its results or the exception)."""
    answer: Any = SimpleQueue()  # megatron-core annotates queues of processes
    pending: Any = Queue()
    pending.put(number)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, answer, pending, use_fsync=True
    )
    return answer.get()
