"""The ranks of tests/chaos.py: four processes that run the real command and record samples."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORLD = 4


def rank_main(
    rank: int,
    port: int,
    folder: Path,
    notes: Path,
    log: Path,
    words: list[str],
    kill: tuple[Any, ...] | None,
) -> None:
    """Run the real command as one rank, with a loader that records what it hands out.

    Its output goes to `log`.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    from megatron_chatflow.__main__ import main
    from megatron_chatflow.training import train_loop
    from tests.audit import recording_loader
    from tests.kill_points import kill_at

    if kill:
        kill_at(*kill)
    try:
        train_loop.BlendDataLoader = recording_loader(notes)
        code = main(["train", "--config", str(folder / "run.yaml"), *words])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def preload() -> Any:
    """Return a context whose processes have imported the heavy libraries when they start.

    A launch takes one second instead of ten.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos_preload"])
    return context


class Launch:
    """Four ranks."""

    def __init__(
        self,
        context: Any,
        folder: Path,
        number: int,
        words: list[str],
        faults: Mapping[int, tuple[Any, ...]] | None = None,
    ) -> None:
        """`faults`: for ranks that are to be killed the arguments of `kill_points.kill_at`."""
        self.notes, self.logs = folder / f"launch{number}", folder / f"logs{number}"
        self.notes.mkdir()
        self.logs.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.ranks = [
            context.Process(
                target=rank_main,
                args=(
                    rank,
                    port,
                    folder,
                    self.notes,
                    self.logs / f"{rank}.log",
                    words,
                    (faults or {}).get(rank),
                ),
            )
            for rank in range(WORLD)
        ]
        for process in self.ranks:
            process.start()

    def samples(self) -> int:
        """Return the last sample that rank 0 has recorded, or -1."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return json.loads((self.notes / "rank0.jsonl").read_text().splitlines()[-1])[0]
        return -1

    def wait(self, seconds: float) -> list[int | None]:
        """Return the exit codes when all ranks have exited, or after this many seconds.

        Those that have not exited by then are None.
        """
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def text(self) -> str:
        """Return the output of the ranks."""
        return "".join(
            f"--- rank {rank}\n{(self.logs / f'{rank}.log').read_text()}"
            for rank in range(WORLD)
            if (self.logs / f"{rank}.log").exists()
        )

    def end(self) -> None:
        """Kill the ranks that are still running."""
        for process in self.ranks:
            process.kill()
            process.join()


def repair_notes(notes: Path) -> None:
    """Cut off partial lines: a rank may have been killed while it wrote."""
    for path in notes.glob("*.jsonl"):
        text = path.read_text()
        path.write_text(text[: text.rfind("\n") + 1])
