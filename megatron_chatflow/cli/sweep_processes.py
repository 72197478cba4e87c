"""The processes of one run of a sweep on this machine, which end with the sweep."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.process import die_with_parent

_LONGEST_REASON = 300
_TAIL = 1 << 14


class RunProcesses:
    """One training: a process per rank, started together, with one log."""

    def __init__(
        self, words: Sequence[str], log: Path, count: int, environment: Mapping[str, str]
    ) -> None:
        """Start `chatflow WORDS` in `count` processes.

        Args:
            words: the command and its flags.
            log: the output of all processes is appended to it.
            count: processes, joined as torchrun joins them.
            environment: variables that differ from this process's.
        """
        self._begin = time.monotonic()
        self._log = log
        self._asked = False
        command = [sys.executable, "-m", "megatron_chatflow", *words]
        job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        job["MASTER_PORT"] = str(_free_port()) if count > 1 else ""
        parent = os.getpid()

        def begin() -> None:
            """Run in the new process: end when the sweep is gone, also if it is gone already."""
            die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        self._ranks: list[subprocess.Popen[bytes]] = []
        with open(log, "ab") as file:
            self._start = file.tell()
            for rank in range(count):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                variables = {**os.environ, **environment, **((job | place) if count > 1 else {})}
                self._ranks.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=variables,
                        start_new_session=True,  # Ctrl-C is for the sweep, which forwards it
                        preexec_fn=begin,
                    )
                )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def poll(self) -> int | None:
        """Return the exit code when all processes have ended: the first that is not 0."""
        codes = [rank.poll() for rank in self._ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    def stop(self) -> None:
        """Ask the run, once, to save and exit."""
        if not self._asked:
            self._asked = True
            for rank in self._ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all processes at once, and wait for them."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()

    def reason(self) -> str:
        """Return the last line of what this start has written to the log."""
        with open(self._log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(self._start, file.tell() - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line for line in lines if "error: " in line or "stopped: " in line]
        return (errors or lines or ["it wrote nothing"])[-1][:_LONGEST_REASON]


def devices_of_slots(jobs: int, processes: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the variables that divide the GPUs of this machine among runs at one time.

    Without GPUs they are empty.

    Raises:
        ConfigError: there are fewer GPUs than processes at one time.
    """
    if "CUDA_VISIBLE_DEVICES" in environ:
        devices = [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    else:
        found = Path("/dev").glob("nvidia[0-9]*")
        devices = [str(number) for number in range(len(list(found)))]
    if not devices:
        return [{} for _ in range(jobs)]
    if len(devices) < jobs * processes:
        raise ConfigError(
            f"--jobs {jobs}: {jobs} runs of {processes} processes need {jobs * processes} GPUs, "
            f"and {len(devices)} are visible; lower --jobs"
        )
    parts = [devices[i * processes : (i + 1) * processes] for i in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def threads_of_run(jobs: int, environ: Mapping[str, str]) -> int:
    """Return OMP_NUM_THREADS of a run, whose processes divide it: the cores divided by the runs.

    A smaller OMP_NUM_THREADS of the sweep stays.
    """
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    limit = environ.get("OMP_NUM_THREADS", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) else share


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
