"""Run the runs of a sweep on this machine: which one is next, and what becomes of each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from megatron_chatflow.cli.sweep_processes import (
    RunProcesses,
    devices_of_slots,
    threads_of_run,
)
from megatron_chatflow.cli.sweep_state import (
    LOG,
    Table,
    command_words,
    is_finished,
    iterations_done,
)
from megatron_chatflow.errors import EXIT_PREEMPTED
from megatron_chatflow.planner.sweep_file import Sweep
from megatron_chatflow.planner.sweep_plan import PlannedRun

_POLL_SECONDS = 0.2
_LINE_SECONDS = 60.0
_DRAW_SECONDS = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Outcome:
    """How a sweep ended."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """{run: why}."""
    blocked: dict[str, str] = field(default_factory=dict)
    """{run: the failed run that it continues}."""
    stopped: bool = False
    """Whether a signal ended it."""


class SweepRunner:
    """Runs what has not finished, some at a time."""

    def __init__(
        self,
        sweep: Sweep,
        runs: Sequence[PlannedRun],
        jobs: int,
        cost: Callable[[PlannedRun], float],
        stream: TextIO,
    ) -> None:
        """Prepare to run.

        Args:
            sweep: of the runs.
            runs: in the order of the plan; each comes after its parent.
            jobs: runs at one time.
            cost: what a run costs, in any unit: for the order and the time that is left.
            stream: for progress.

        Raises:
            ConfigError: the GPUs of the machine do not suffice.
        """
        self._sweep, self._runs, self._stream = sweep, list(runs), stream
        self._cost = {run.name: cost(run) for run in runs}
        devices = devices_of_slots(jobs, sweep.processes, os.environ)
        threads = {"OMP_NUM_THREADS": str(threads_of_run(jobs, os.environ))}
        self._free = [threads | variables for variables in devices]
        self._active: dict[str, tuple[PlannedRun, RunProcesses, dict[str, str]]] = {}
        self._outcome = Outcome()
        self._table = Table(sweep, runs)
        self._signals = 0
        self._begin = self._last = time.monotonic()
        self._done_before = 0.0

    @property
    def table(self) -> Table:
        """The table of the finished runs."""
        return self._table

    def run(self) -> Outcome:
        """Run until nothing can be started; write the table after every run that finishes."""
        for run in self._runs:
            if is_finished(run, self._sweep.runs / run.name):
                self._outcome.finished.append(run.name)
                self._table.add(run)
        self._table.write()
        self._done_before = self._done()
        with self._handled_signals():
            try:
                while self._start_ready() or self._active:
                    self._forward_signals()
                    self._collect()
                    self._show()
                    time.sleep(_POLL_SECONDS)
            finally:
                for _, processes, _ in self._active.values():
                    processes.kill()
        self._outcome.stopped = self._signals > 0
        return self._outcome

    def _start_ready(self) -> bool:
        """Start what fits; returns whether something was started."""
        started = False
        while self._free and not self._signals and (ready := self._ready()):
            run = min(ready, key=lambda run: (not run.is_leg, -self._cost[run.name]))
            folder, variables = self._sweep.runs / run.name, self._free.pop(0)
            words = ["train", *command_words(run, folder)]
            processes = RunProcesses(words, folder / LOG, self._sweep.processes, variables)
            self._active[run.name] = run, processes, variables
            started = True
        return started

    def _ready(self) -> list[PlannedRun]:
        """Return the runs that can start; notes those whose parent has failed."""
        o, ready = self._outcome, []
        for run in self._runs:
            known = (*o.finished, *o.failed, *o.blocked, *self._active)
            if run.name in known:
                continue
            if run.parent in o.failed or run.parent in o.blocked:
                o.blocked[run.name] = o.blocked.get(run.parent, run.parent)
            elif run.parent is None or run.parent in o.finished:
                ready.append(run)
        return ready

    def _collect(self) -> None:
        """Take the results of the runs that have ended."""
        for name, (run, processes, variables) in list(self._active.items()):
            if (code := processes.poll()) is None:
                continue
            del self._active[name]
            self._free.append(variables)
            if is_finished(run, self._sweep.runs / name):
                self._outcome.finished.append(name)
                self._table.add(run)
                self._table.write()
                self._say(f"{name} finished in {processes.seconds:.0f} s")
            elif not (self._signals and (code in (0, EXIT_PREEMPTED) or code < 0)):
                self._outcome.failed[name] = f"code {code}: {processes.reason()}"
                self._say(f"{name} failed with code {code}: {processes.reason()}")

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        """Inside, a signal that asks this process to end is counted; one that is ignored stays."""

        def count(number: int, frame: FrameType | None) -> None:
            self._signals += 1

        before: dict[signal.Signals, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, count)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward_signals(self) -> None:
        """Have the runs save and exit after the first signal; end them at the second."""
        for _, processes, _ in self._active.values():
            if self._signals > 1:
                processes.kill()
            elif self._signals:
                processes.stop()

    def _done(self) -> float:
        """Return the cost of what has been trained."""
        done = sum(self._cost[name] for name in self._outcome.finished)
        for run in self._runs:
            if run.name not in self._outcome.finished:
                trained = iterations_done(self._sweep.runs / run.name) - run.first
                done += self._cost[run.name] * max(0, trained) / (run.iterations - run.first)
        return done

    def _say(self, text: str) -> None:
        """Print what happened, and how far the sweep is."""
        clear = "\r\x1b[K" if self._stream.isatty() else ""
        print(f"{clear}{text}", file=self._stream, flush=True)
        self._show(now=True)

    def _show(self, now: bool = False) -> None:
        """Print how far the sweep is: on a terminal every second on one line, else every minute."""
        moment, terminal = time.monotonic(), self._stream.isatty()
        if not now and moment - self._last < (_DRAW_SECONDS if terminal else _LINE_SECONDS):
            return
        self._last = moment
        done, total = self._done(), sum(self._cost.values())
        line = f"{len(self._outcome.finished)} of {len(self._runs)} runs finished, "
        line += f"{done / total:.0%} of the work"
        if self._outcome.failed:
            line += f", {len(self._outcome.failed)} failed"
        if self._signals:
            line += ", stopping: the runs save and exit"
        elif (new := done - self._done_before) > 0 and self._active:
            left = round((moment - self._begin) * (total - done) / new)
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        if self._active:
            line += f"; running {', '.join(self._active)}"
        print(
            f"\r{line[:150]}\x1b[K" if terminal else line,
            end="" if terminal else "\n",
            file=self._stream,
            flush=True,
        )
