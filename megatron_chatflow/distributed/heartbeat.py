"""Report why a job of several processes ends: which rank and host, and the reason, once.

The report comes within a minute.

Every rank writes a heartbeat into the job's store each second. A rank that fails writes why. What
the other ranks then get is only a broken or a late collective; before they report it they look in
the store for who failed first, whose heartbeat has stopped, and who did not come. Rank 0 watches
the heartbeats of all, the others that of rank 0, which holds the store: where it does not answer,
a thread that asks nothing of it ends the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_chatflow.errors import SampleError

BEAT = 1.0
"""Seconds between heartbeats."""
SILENT = 30
"""Beats without a change after which a rank counts as gone though no collective has failed (it may
be stopped, or its host cut off). Beats of the rank that watches: a job that is suspended and
continued has not been silent."""
PATIENCE = 5.0
"""Seconds in which the others' reasons are awaited after a collective has failed."""
_LEFT = b"left"
_STORE_ERRORS = (RuntimeError, OSError)
"""What a client of a store that is gone raises; `dist.DistError` is a RuntimeError."""
_BROKEN = re.compile(
    r"connection (closed|reset|refused)|timed out|timeout|gloo|nccl|broken pipe|socket|recvbytes"
    r"|sendbytes",
    re.IGNORECASE,
)


class HeartbeatMonitor:
    """This rank's connection to the job's store; two daemon threads serve it.

    Until `joined` the process groups are being made, for `init_timeout` seconds at most.
    """

    def __init__(self, store: Store, rank: int, names: Sequence[str], init_timeout: float) -> None:
        """Start the two threads.

        Args:
            store: A client of the job's store that nothing else uses: a call that waits for the
                store blocks all others of the same client.
            rank: This rank.
            names: What messages call each rank (`rendezvous.Rendezvous`).
            init_timeout: Seconds in which the process groups must be made.
        """
        self._store, self._rank, self._size = prefixed(store), rank, len(names)
        self._names, self._init_timeout = names, init_timeout
        self._watched = [r for r in range(self._size) if r != rank] if rank == 0 else [0]
        self._joined, self._rounds = False, 0
        self._seen: dict[int, tuple[bytes, int]] = {}
        self._stop, self._closed = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name="heartbeat", daemon=True)
            for target in (self._live, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def joined(self) -> None:
        """Report that this rank has its process groups."""
        self._store.set(f"joined/{self._rank}", "")
        self._joined = True

    def close(self) -> None:
        """End without a reason: this rank is no longer watched.

        Rank 0 holds the store, so it waits for the others. A second call does nothing.
        """
        if self._stop.is_set():
            return
        with contextlib.suppress(*_STORE_ERRORS):  # rank 0 is gone, and had no reason to report
            self._leave()
        self._closed.set()

    def explain(self, error: BaseException) -> str | None:
        """Return who is behind an error of a failed collective; None for other errors."""
        reason = f"{type(error).__name__}: {error}".strip()
        if not isinstance(error, dist.DistError | RuntimeError | OSError):
            return None
        if not _BROKEN.search(reason):
            return None
        try:
            return self._look_around(reason.split("\n")[0])
        except _STORE_ERRORS:  # the store is gone with rank 0
            return f"{self._names[0]}, which holds the job's store, is gone"

    def fail(self, error: BaseException) -> None:
        """Report why the job ends, if no rank has yet, and end this process with exit code 1.

        Does not return.
        """
        message = self.explain(error)
        if message is None:
            message = f"{self._names[self._rank]}, failed: {type(error).__name__}: {error}".strip()
            if not isinstance(error, SampleError):
                message += "\n" + "".join(traceback.format_exception(error))
        self._end(message)

    def _end(self, message: str) -> None:
        try:
            if self._claim(message):
                _say(message)
            self._leave()
        except _STORE_ERRORS:
            _say(message)
        os._exit(1)

    def _leave(self) -> None:
        """Stop the heartbeats and write that this rank leaves; rank 0 leaves last.

        Rank 0 holds the store, where the others still look for the reason. It waits, for
        2 * `PATIENCE` seconds at most, for those whose heartbeat has not stopped.
        """
        self._stop.set()
        if threading.current_thread() is not self._threads[0]:
            self._threads[0].join(2 * PATIENCE)
        value: Any = _LEFT  # torch's annotations leave bytes out
        self._store.set(f"beat/{self._rank}", value)
        begin = time.monotonic()
        while self._rank == 0 and (passed := time.monotonic() - begin) < 2 * PATIENCE:
            beats = self._store.multi_get([f"beat/{rank}" for rank in self._watched])
            if all(
                beat == _LEFT or self._silent(rank, beat) + passed >= PATIENCE
                for rank, beat in zip(self._watched, beats, strict=True)
            ):
                break
            time.sleep(0.1)

    def _silent(self, rank: int, beat: bytes) -> float:
        """Seconds for which `beat` of a watched rank had not changed at the last own heartbeat."""
        before, times = self._seen.get(rank, (b"", 0))
        return times * BEAT if beat == before else -2 * PATIENCE

    def _limit(self) -> float:
        return SILENT if self._joined else min(SILENT, self._init_timeout)

    def _live(self) -> None:
        """The first thread: write heartbeats and read those that are watched."""
        count, ending = 0, 0
        while not self._stop.wait(BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                ending += self._store.check(["reason"])
                if ending > PATIENCE:  # the main thread has not met a failed collective
                    self._end("")
                gone = [r for r, n in self._unchanged().items() if n > self._limit()]
                if gone and not self._stop.is_set():
                    self._end(self._each(gone, f"has given no heartbeat for {self._limit():.0f} s"))
                if not self._joined and count > self._init_timeout and not self._stop.is_set():
                    self._end(self._who_has_not_joined())
                self._rounds += 1
            except _STORE_ERRORS:
                continue  # the store does not answer; the other thread counts for how long

    def _guard(self) -> None:
        """The second thread: end the process where the first one gets no answers."""
        rounds, quiet = -1, 0
        while not self._closed.wait(BEAT):
            quiet = 0 if self._rounds != rounds else quiet + 1
            rounds = self._rounds
            if quiet > self._limit():
                holder = f"{self._names[0]}, which holds the job's store,"
                _say(f"{holder} has not answered {self._names[self._rank]}, for {quiet} s")
                os._exit(1)

    def _unchanged(self) -> dict[int, int]:
        """{watched rank: for how many beats of this one its own has not changed}."""
        beats = self._store.multi_get([f"beat/{rank}" for rank in self._watched])
        for rank, beat in zip(self._watched, beats, strict=True):
            before, times = self._seen.get(rank, (beat, 0))
            self._seen[rank] = (beat, 0 if beat in (_LEFT, b"") or beat != before else times + 1)
        return {rank: times for rank, (_, times) in self._seen.items()}

    def _look_around(self, reason: str) -> str:
        """Return who is behind a collective that failed here.

        Who reported an error, else whose heartbeat has stopped, else who is alive and did not come.
        """
        self._store.set(f"waits/{self._rank}", reason)
        others = [rank for rank in range(self._size) if rank != self._rank]
        keys = [f"beat/{rank}" for rank in others]
        before, end = self._store.multi_get(keys), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self._store.check(["reason"]):
                return self._store.get("reason").decode()
            time.sleep(0.2)
        now = self._store.multi_get(keys)
        gone = [r for r, a, b in zip(others, before, now, strict=True) if a == b]
        if gone:
            return self._each(gone, f"is gone: no heartbeat for {PATIENCE:.0f} s")
        absent = [rank for rank in others if not self._store.check([f"waits/{rank}"])]
        if absent:
            return self._each(absent, "is alive and did not come to a collective") + f" ({reason})"
        return f"{self._names[self._rank]}, a collective failed: {reason}"

    def _who_has_not_joined(self) -> str:
        absent = [r for r in range(self._size) if not self._store.check([f"joined/{r}"])]
        return (
            self._each(absent, f"has not joined the process groups within {self._init_timeout} s")
            + "; the nodes must reach each other at every port: see GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, or raise --init-timeout"
        )

    def _each(self, ranks: Iterable[int], what: str, most: int = 8) -> str:
        ranks = list(ranks)
        more = f"; and {len(ranks) - most} more" if len(ranks) > most else ""
        return "; ".join(f"{self._names[rank]}, {what}" for rank in ranks[:most]) + more

    def _claim(self, message: str) -> bool:
        """Whether this rank is the first to say why; the message is kept for the others."""
        if self._store.add("claims", 1) != 1:
            return False
        self._store.set("reason", message)
        return True


def prefixed(store: Store) -> Store:
    """The part of the job's store that heartbeats are in."""
    return PrefixStore("heartbeat", store)


def prepare(store: Store, size: int) -> None:
    """Write the first beats, on rank 0 before any monitor: a read of a missing key would wait."""
    keys = [f"beat/{rank}" for rank in range(size)]
    beats: Any = prefixed(store)  # torch's annotations leave multi_set out
    beats.multi_set(keys, [b"0"] * size)


def _say(text: str) -> None:
    """Write straight to standard error.

    The process is about to end without its usual clean-up, in which other threads and collectives
    may hang.
    """
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stdout.flush()
        os.write(2, f"chatflow: the job ends: {text}\n".encode())
