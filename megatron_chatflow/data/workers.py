"""Encoding on several processes, in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.data.encode import Encoded, Encoder, Task
from megatron_chatflow.data.formats import Chunk
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

_AHEAD = 3
"""Chunks handed to each of the other processes before this one encodes one itself."""
_MAX_PENDING = 8
"""Chunks in memory, for each process."""

Numbered = tuple[int, Chunk]
"""A chunk and the number of its source."""


@dataclass(frozen=True)
class Done:
    """The end of a chunk that is encoded: number of its source, and as in `Chunk`."""

    source: int
    next: int
    checksum: str
    position: int


EncodeChunks = Callable[[Iterable[Numbered], Callable[[], bool]], Iterator[tuple[Done, Encoded]]]
"""Encodes chunks; asks its second argument whether only to look for malformed records, from now on; yields what became of them, in order."""


class WorkerDied(RuntimeError):
    """A worker process was killed."""


@contextmanager
def encoders(workers: int, tokenizer: Tokenizer, tokenizer_arguments: Mapping[str, Any], task: Task) -> Iterator[EncodeChunks]:
    """Yields what encodes chunks, on `workers` processes of which this one is one; the others end with the `with` block.

    This process reads the chunks and hands them out; when the others have enough to do it encodes one itself, and always the first: no process is
    started for a small input.

    Args:
        workers: number of processes.
        tokenizer: what this process encodes with.
        tokenizer_arguments: of `load_tokenizer`, for the other processes.
        task: what documents are made of.

    Raises:
        WorkerDied: a worker was killed.
    """
    encoder = Encoder(tokenizer, task)
    others = workers - 1
    pool: ProcessPoolExecutor | None = None
    if others:
        # Spawned, not forked: tokenizer libraries have threads of their own, which do not survive a fork.
        with _interrupts_held_back():  # it starts a process that keeps track of semaphores
            pool = ProcessPoolExecutor(
                others,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (dict(tokenizer_arguments), task),
            )

    def encode(chunks: Iterable[Numbered], check_only: Callable[[], bool]) -> Iterator[tuple[Done, Encoded]]:
        pending: deque[tuple[Done, Future[Encoded]]] = deque()
        for number, (source, chunk) in enumerate(chunks):
            done = Done(source, chunk.next, chunk.checksum, chunk.position)
            work = (chunk, check_only())
            if number and sum(not future.done() for _, future in pending) < _AHEAD * others:
                with _interrupts_held_back():
                    pending.append((done, pool.submit(_work, *work)))
            else:
                pending.append((done, _done(encoder.encode(*work))))
            while pending and (pending[0][1].done() or len(pending) > _MAX_PENDING * workers):
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    try:
        yield encode
    except BrokenProcessPool as error:
        raise WorkerDied("a worker process was killed: look for a lack of memory, and try fewer --workers") from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _done(result: Encoded) -> "Future[Encoded]":
    future: Future[Encoded] = Future()
    future.set_result(result)
    return future


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """No signal breaks into the pool while it starts a worker, which would leave one that nobody ends.

    Workers that start in here never see Ctrl-C or SIGHUP: these reach the whole process group, and ending them is for this process to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: Encoder | None = None


def _start_worker(tokenizer_arguments: dict[str, Any], task: Task) -> None:
    global _encoder
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _encoder = Encoder(load_tokenizer(**tokenizer_arguments), task)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(chunk: Chunk, check_only: bool) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(chunk, check_only)
