"""Encode on several processes, in the order of the input."""

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.data.preprocess.encoder import EncodedChunk, Encoder, EncodeTask
from megatron_chatflow.data.preprocess.input_files import Chunk
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.utils.process import is_stopped

_AHEAD = 3
"""Chunks given to each of the other processes before this one encodes one itself."""
_MAX_PENDING = 8
"""Chunks in memory, for each process."""
_MAX_PENDING_BYTES = 1 << 25
"""Bytes of chunks that the others have, for each process; only a single chunk may be larger."""
STOPPED_SECONDS = 30
"""How long a worker may be stopped (SIGSTOP), in seconds in which this process is not."""
_EXIT_SECONDS = 5

SourceChunk = tuple[int, Chunk]
"""A chunk and the number of its source."""


@dataclass(frozen=True)
class ChunkEnd:
    """The end of an encoded chunk: number of its source, and as in `Chunk`."""

    source: int
    next: int
    checksum: str
    position: int


EncodeChunks = Callable[
    [Iterable[SourceChunk], Callable[[], bool]], Iterator[tuple[ChunkEnd, EncodedChunk]]
]
"""Encodes chunks and yields the results in order.

It calls its second argument to ask whether, from now on, only to check for malformed records.
"""


class WorkerDied(RuntimeError):
    """A worker process was killed, or is stopped."""


@contextmanager
def encoder_pool(
    workers: int, tokenizer: Tokenizer, tokenizer_arguments: Mapping[str, Any], task: EncodeTask
) -> Iterator[EncodeChunks]:
    """Yield a function that encodes chunks on `workers` processes, including this one.

    The other processes end with the `with` block. This process reads the chunks and distributes
    them; when the others have enough to do it encodes one itself, and always the first: no process
    is started for a small input.

    Args:
        workers: number of processes.
        tokenizer: what this process encodes with.
        tokenizer_arguments: of `load_tokenizer`, for the other processes.
        task: what documents are made of.

    Raises:
        WorkerDied: a worker was killed, or is stopped for `STOPPED_SECONDS`. A slow one is waited
            for.
    """
    encoder = Encoder(tokenizer, task)
    others = workers - 1
    pool: ProcessPoolExecutor | None = None
    if others:
        # Spawned, not forked: tokenizer libraries have threads of their own, which do not survive a
        # fork.
        with _interrupts_held_back():  # it starts a process that keeps track of semaphores
            pool = ProcessPoolExecutor(
                others,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (dict(tokenizer_arguments), task),
            )

    def encode(
        chunks: Iterable[SourceChunk], check_only: Callable[[], bool]
    ) -> Iterator[tuple[ChunkEnd, EncodedChunk]]:
        pending: deque[tuple[ChunkEnd, int, Future[EncodedChunk]]] = deque()

        def finished() -> tuple[ChunkEnd, EncodedChunk]:
            done, _, future = pending.popleft()
            return done, future.result() if pool is None else _result(future, pool)

        for number, (source, chunk) in enumerate(chunks):
            done = ChunkEnd(source, chunk.next, chunk.checksum, chunk.position)
            work = (chunk, check_only())
            size = len(chunk.data)
            sizes = [given for _, given, future in pending if not future.done()]
            room = not sizes or sum(sizes) + size <= _MAX_PENDING_BYTES * others
            if pool and number and len(sizes) < _AHEAD * others and room:
                with _interrupts_held_back():
                    pending.append((done, size, pool.submit(_work, *work)))
            else:
                pending.append((done, size, _done(encoder.encode(*work))))
            del chunk, work
            while pending and (
                pending[0][2].done()
                or len(pending) > _MAX_PENDING * workers
                or sum(given for _, given, _ in pending) > 2 * _MAX_PENDING_BYTES * workers
            ):
                yield finished()
        while pending:
            yield finished()

    try:
        yield encode
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a worker process was killed: look for a lack of memory, and try fewer --workers"
        ) from error
    finally:
        if pool is not None:
            _end(pool)


def _result(future: "Future[EncodedChunk]", pool: ProcessPoolExecutor) -> EncodedChunk:
    """Wait for a result, and check about every second whether a worker is stopped."""
    seconds: Counter[int] = Counter()
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():
                return future.result()
        pids = [process.pid for process in pool._processes.values()]
        stopped = [pid for pid in pids if pid is not None and is_stopped(pid)]
        # Counted, not measured: this process may have been stopped with its workers.
        seconds = Counter({pid: seconds[pid] + 1 for pid in stopped})
        for pid, count in seconds.items():
            if count >= STOPPED_SECONDS:
                raise WorkerDied(
                    f"worker process {pid} is stopped (SIGSTOP) for {count} s: find out "
                    f"what stopped it, or continue it (kill -CONT)"
                )


def _end(pool: ProcessPoolExecutor) -> None:
    """End the workers; one that is stopped would never exit otherwise."""
    processes = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    end = time.monotonic() + _EXIT_SECONDS
    for process in processes:
        stopped = process.pid is not None and is_stopped(process.pid)
        process.join(0 if stopped else max(0, end - time.monotonic()))
        process.kill()
        process.join()


def _done(result: EncodedChunk) -> "Future[EncodedChunk]":
    future: Future[EncodedChunk] = Future()
    future.set_result(result)
    return future


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block signals while the pool starts a worker, so that none is left running.

    Workers that start in here never receive Ctrl-C or SIGHUP: these reach the entire process group,
    and this process ends its workers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder | None = None


def _start_worker(tokenizer_arguments: dict[str, Any], task: EncodeTask) -> None:
    global _encoder
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _encoder = Encoder(load_tokenizer(**tokenizer_arguments), task)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(chunk: Chunk, check_only: bool) -> EncodedChunk:
    assert _encoder is not None
    return _encoder.encode(chunk, check_only)
