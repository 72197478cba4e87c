"""What tests/chaos.py does to a run: full disks, killed writers, damaged checkpoints."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[tuple[Path, bool]]:
    """Yield a folder, and whether it is a separate disk that can be filled."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
            capture_output=True,
        ).returncode
        == 0
    )
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def fill(disk: Path, seconds: float) -> None:
    """Leave no byte free on a disk for this many seconds."""
    path = disk / "filler"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    time.sleep(seconds)
    path.unlink()


def kill_writer(rank: int) -> bool:
    """Kill the process that writes a rank's shards; returns whether it exists.

    It is the child of the rank with the lowest priority.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(rank).children():
            if child.nice() == 19 and child.status() != psutil.STATUS_ZOMBIE:
                child.kill()
                return True
    return False


def damage_newest(run: Path, source: random.Random) -> None:
    """Flip a bit of one file of the newest checkpoint, truncate the file, or remove it."""
    from megatron_chatflow.checkpoint.run_directory import complete_iterations, iteration_folder

    folder = iteration_folder(run, complete_iterations(run)[0])
    path = source.choice(
        sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and path.stat().st_size and path.name != "state.json"
        )
    )
    how = source.choice(["flip", "cut", "remove"])
    if how == "remove":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[source.randrange(len(data)) :]
    else:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(bytes(data))
