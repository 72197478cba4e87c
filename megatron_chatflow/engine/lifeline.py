"""Why a job of several processes came down: which rank, on which host, for what reason, said once and within a minute.

Every rank writes a sign of life into the job's store each second. A rank that fails says so there. What the other ranks then get is only a broken or
a late collective; before they speak they look into the store for who failed first, who has gone silent, and who did not come.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback

import torch.distributed as dist

from megatron_chatflow.utils.errors import DataError

BEAT = 1.0
"""Seconds between signs of life."""
SILENT = 30.0
"""Seconds without one after which a rank counts as gone though no collective has failed (it may be stopped, or its host cut off)."""
PATIENCE = 5.0
"""Seconds in which the others' reasons are awaited after a collective has failed."""
_BROKEN = re.compile(r"connection (closed|reset|refused)|timed out|timeout|gloo|nccl|broken pipe|socket|recvbytes|sendbytes", re.IGNORECASE)


class Lifeline:
    """This rank's line into the job's store; a daemon thread keeps it alive."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = dist.PrefixStore("lifeline", store), rank, size
        self._stop = threading.Event()
        self._store.set(f"host/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._store.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._live, name="lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave in peace: this rank is no longer watched."""
        self._stop.set()
        self._thread.join()

    def fail(self, error: BaseException) -> None:
        """Say why the job ends, if nobody has said so yet, and end this process with exit code 1. Does not return."""
        reason = f"{type(error).__name__}: {error}".strip()
        detail = "" if isinstance(error, DataError) else "\n" + "".join(traceback.format_exception(error))
        try:
            if isinstance(error, dist.DistError | RuntimeError | OSError) and _BROKEN.search(reason):
                sentence = self._look_around(reason)
            else:
                sentence = f"rank {self._rank} on {self._host(self._rank)} failed: {reason}"
            if self._claim(sentence):
                _say(f"{sentence}{detail}")
            self._linger()
        except Exception:  # the store is gone with the rank that held it
            _say(f"rank {self._rank} on {socket.gethostname()} lost the rank that holds the job's store, and failed: {reason}")
        os._exit(1)

    def _linger(self) -> None:
        """Rank 0 holds the store, where the others still look for the reason: it leaves last."""
        self._store.add("left", 1)
        end = time.monotonic() + 2 * PATIENCE
        while self._rank == 0 and time.monotonic() < end and self._store.add("left", 0) < self._size:
            time.sleep(0.1)

    def _live(self) -> None:
        """The thread: give signs of life; on rank 0 watch for those of the others."""
        seen: dict[int, tuple[bytes, float]] = {}
        lost_since: float | None = None
        count = 0
        while not self._stop.wait(BEAT):
            count, now = count + 1, time.monotonic()
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                if self._rank == 0:
                    silent = [rank for rank, beat in self._beats().items() if self._unchanged(seen, rank, beat, now) > SILENT]
                    if silent and not self._stop.is_set():
                        sentence = "; ".join(f"rank {rank} on {self._host(rank)} has given no sign of life for {SILENT:.0f} s" for rank in silent)
                        if self._claim(sentence):
                            _say(sentence)
                        os._exit(1)
                lost_since = None
            except Exception:
                lost_since = lost_since or now
                if now - lost_since > SILENT and not self._stop.is_set():
                    _say(f"rank {self._rank} on {socket.gethostname()} has had no answer from the rank that holds the job's store for {SILENT:.0f} s")
                    os._exit(1)

    @staticmethod
    def _unchanged(seen: dict[int, tuple[bytes, float]], rank: int, beat: bytes, now: float) -> float:
        """Seconds since this rank's sign of life last changed."""
        if rank not in seen or seen[rank][0] != beat:
            seen[rank] = (beat, now)
        return now - seen[rank][1]

    def _look_around(self, reason: str) -> str:
        """Who is behind a collective that failed here: who said so, else who is silent, else who is alive and did not come."""
        self._store.set(f"waits/{self._rank}", reason)
        others = [rank for rank in range(self._size) if rank != self._rank]
        before, end = self._beats(), time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self._store.check(["reason"]):
                return self._store.get("reason").decode()
            time.sleep(0.2)
        now = self._beats()
        silent = [rank for rank in others if now[rank] == before[rank]]
        if silent:
            return "; ".join(f"rank {rank} on {self._host(rank)} is gone: no sign of life for {PATIENCE:.0f} s" for rank in silent)
        absent = [rank for rank in others if not self._store.check([f"waits/{rank}"])]
        if absent:
            return "; ".join(f"rank {rank} on {self._host(rank)} is alive and did not come to a collective" for rank in absent) + f" ({reason})"
        return f"rank {self._rank} on {self._host(self._rank)}: a collective failed: {reason}"

    def _beats(self) -> dict[int, bytes]:
        return dict(enumerate(self._store.multi_get([f"beat/{rank}" for rank in range(self._size)])))

    def _host(self, rank: int) -> str:
        return self._store.get(f"host/{rank}").decode()

    def _claim(self, sentence: str) -> bool:
        """Whether this rank is the first to say why; the sentence is kept for the others."""
        if self._store.add("claims", 1) != 1:
            return False
        self._store.set("reason", sentence)
        return True


def _say(text: str) -> None:
    """Straight to standard error: the process is about to end without its usual clean-up, in which other threads and collectives may hang."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stdout.flush()
        os.write(2, f"chatflow: the job ends: {text}\n".encode())
