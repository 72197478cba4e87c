"""When a run exits before its end: a signal, or its time is over.

All ranks exit after the same iteration.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import torch

from megatron_chatflow.checkpoint.lease import Lease, LeaseLostError
from megatron_chatflow.errors import EXIT_PREEMPTED
from megatron_chatflow.training.callbacks import Callback, IterationResult
from megatron_chatflow.training.train_state import TrainState

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
KEPT_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored where the process was started so: in the background, or by nohup."""
SAME_SIGNAL = 3.0
"""Seconds within which further signals count as the first one: SLURM sends it to every process and
torchrun passes its own on."""
SAME_INTERRUPT = 0.5
"""The same for SIGINT, which a person at a terminal sends twice on purpose."""


class StopRequest:
    """Handles SIGTERM, SIGUSR1, SIGINT and SIGHUP while it is open.

    The first asks the run to save and exit; another one, later, ends the process at once. It must
    do so in a collective too, where Python's own handlers wait. So a separate thread reads the
    signals, from the socket into which the interpreter writes every signal when it arrives.
    """

    def __init__(self, minutes: float | None, lease: Lease | None = None) -> None:
        """Set the run's end.

        Args:
            minutes: how long the run may take, counted from here; None for no limit.
            lease: that of the run directory, on rank 0: losing it ends the run.
        """
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._lease = lease
        self._signal: signal.Signals | None = None
        self._first = 0.0

    def __enter__(self) -> StopRequest:
        """Install the handlers, and start the thread that reads the signals."""
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        ignored = {s for s in KEPT_IGNORED if signal.getsignal(s) == signal.SIG_IGN}
        self._before = {s: signal.signal(s, lambda *_: None) for s in SIGNALS if s not in ignored}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Restore the handlers, and end the thread."""
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
            now, same = (
                time.monotonic(),
                SAME_INTERRUPT if number[0] == signal.SIGINT else SAME_SIGNAL,
            )
            if self._signal is None:
                self._signal, self._first = signal.Signals(number[0]), now
            elif now - self._first > same:
                os._exit(EXIT_PREEMPTED)

    def _lease_lost(self) -> bool:
        return self._lease is not None and self._lease.lost

    def agreed(self, device: torch.device) -> str | None:
        """Return why to exit now, the same on every rank; None to continue. Called by every rank.

        Raises:
            LeaseLostError: the run directory is another run's by now; on every rank alike.
        """
        over = self._end is not None and time.monotonic() > self._end
        mine = [int(self._signal or 0), int(over), int(self._lease_lost())]
        answer = torch.tensor(mine, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
        number, over, lost = answer.tolist()
        if lost:
            if self._lease is not None and self._lease_lost():
                self._lease.check()  # raises, with the reason
            raise LeaseLostError("rank 0 has lost the lease of the run directory")
        if number:
            return signal.Signals(number).name
        return "exit_duration_in_mins" if over else None


class StopCallback(Callback):
    """Ends the run after the iteration in which its stop request was made."""

    def __init__(self, stop: StopRequest) -> None:
        """End the run when `stop` asks for it."""
        self._stop = stop

    def on_fit_start(self, state: TrainState) -> None:
        """Agree on whether to begin."""
        self._agree(state)

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Agree on whether to continue."""
        self._agree(state)

    def _agree(self, state: TrainState) -> None:
        reason = self._stop.agreed(state.device)
        state.exit_reason = reason or state.exit_reason
