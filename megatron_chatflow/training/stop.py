"""When a run leaves before its end: a signal, or its time is over. All ranks leave after the same iteration."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import torch

EXIT_PREEMPTED = 3
"""Exit code of a run that was told to leave before its end; started again, it goes on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME = 3.0
"""Seconds within which further signals are taken for the first one: SLURM sends it to every process and torchrun passes its own on."""


class Stop:
    """Hears SIGTERM and SIGUSR1 while it is open. The first asks the run to save and leave; another one, later, ends the process at once.

    A second signal must be heard in a collective too, where Python's own handlers wait. So a thread of its own reads them, from the socket into
    which the interpreter writes every signal as it comes.
    """

    def __init__(self, minutes: float | None) -> None:
        """`minutes`: how long the run may take, counted from here; None for ever."""
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._signal: signal.Signals | None = None
        self._first = 0.0

    def __enter__(self) -> Stop:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while number := self._reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            if self._signal is None:
                self._signal, self._first = signal.Signals(number[0]), time.monotonic()
            elif time.monotonic() - self._first > SAME:
                os._exit(EXIT_PREEMPTED)

    def agreed(self, device: torch.device) -> str | None:
        """Why to leave now, the same on every rank; None to go on. Called by every rank."""
        over = self._end is not None and time.monotonic() > self._end
        answer = torch.tensor([int(self._signal or 0), int(over)], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        number, over = answer.tolist()
        if number:
            return signal.Signals(number).name
        return "exit_duration_in_mins" if over else None
