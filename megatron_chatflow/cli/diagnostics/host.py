"""The machine as this process may use it: cores, memory, disk, limits, clock, locale."""

from __future__ import annotations

import contextlib
import ctypes
import locale
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

from megatron_chatflow.cli.diagnostics import Row

GIB = 2**30
_UNSYNCHRONIZED = 5
"""TIME_ERROR of adjtimex(2)."""


def machine(save: str | None, checkpoint_bytes: int | None, corpora: int) -> list[Row]:
    """Return the rows of the machine.

    Args:
        save: the run directory, where one is given.
        checkpoint_bytes: size of one checkpoint, where it is known.
        corpora: number of corpora that a process maps.
    """
    return [
        _cores(),
        _memory(),
        _shared_memory(),
        _disk(save, checkpoint_bytes),
        *_limits(corpora),
        _clock(),
        _locale(),
    ]


def _control_group(name: str) -> list[list[str]]:
    """Return the words of a cgroup v2 file of this process's group and of its parents."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next((line[3:] for line in lines if line.startswith("0::")), "/")
        top = Path("/sys/fs/cgroup")
        here = top / group.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(top) and (folder / name).is_file():
                found.append((folder / name).read_text().split())
    return found


def _cores() -> Row:
    count = len(os.sched_getaffinity(0))
    quotas = [
        int(quota) / int(period) for quota, period in _control_group("cpu.max") if quota != "max"
    ]
    kind = platform.processor() or platform.machine()
    quota = (
        f"; a control group allows {min(quotas):g} of them"
        if quotas and min(quotas) < count
        else ""
    )
    return Row("cores", str(count), kind + quota)


def _memory() -> Row:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(limit) for (limit,) in _control_group("memory.max") if limit != "max"]
    limit = (
        f"a control group allows {min(limits) / GIB:.1f} GiB"
        if limits and min(limits) < total
        else ""
    )
    return Row("memory", f"{total / GIB:.1f} GiB", limit)


def _shared_memory() -> Row:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return Row(
            "shared memory",
            "none",
            f"/dev/shm: {error.strerror}; NCCL needs it between GPUs of one node",
        )
    small = (
        "; NCCL between GPUs of one node wants 1 GiB: docker run --ipc=host" if size < GIB else ""
    )
    return Row("shared memory", f"{size / GIB:.1f} GiB", f"/dev/shm{small}")


def _disk(save: str | None, checkpoint_bytes: int | None) -> Row:
    wanted = Path(save or os.getcwd())
    folder = next(path for path in (wanted, *wanted.parents) if os.path.exists(path))
    free = shutil.disk_usage(folder).free
    value = f"{free / 1e9:,.1f} GB free"
    if save and not os.access(folder, os.W_OK):
        return Row(
            "disk", value, f"{folder} cannot be written to; give --save another folder", wrong=True
        )
    if checkpoint_bytes is None:
        return Row("disk", value, str(folder))
    where = f"{folder}; a checkpoint of this model takes {checkpoint_bytes / 1e9:,.1f} GB"
    # The next checkpoint is written before the previous one is removed.
    return Row(
        "disk",
        value,
        where + (", and two must fit" if free < 2 * checkpoint_bytes else ""),
        wrong=bool(save) and free < 2 * checkpoint_bytes,
    )


def _limits(corpora: int) -> list[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mapped = f"{corpora} corpora are mapped" if corpora else "corpora are mapped"
    advice = "; raise it: ulimit -n 65536" if soft < 1024 else ""
    rows = [
        Row(
            "open files",
            str(soft),
            f"hard limit {hard}; {mapped} and need none of them while they are read{advice}",
        )
    ]
    with contextlib.suppress(OSError):
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
        needed = 2 * corpora
        # Libraries take some hundreds of maps.
        tight = needed > allowed - 5000
        rows.append(
            Row(
                "memory maps",
                str(allowed),
                f"corpora take {needed}"
                + ("; raise it: sysctl vm.max_map_count=1048576" if tight else ""),
                wrong=tight,
            )
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    rows.append(
        Row(
            "locked memory",
            "unlimited" if unlimited else f"{locked / 2**20:.1f} MiB",
            "" if unlimited else "InfiniBand wants it unlimited: docker run --ulimit memlock=-1",
        )
    )
    return rows


def _clock() -> Row:
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    query = ctypes.create_string_buffer(512)  # struct timex with modes 0: nothing is set
    state = ctypes.CDLL(None, use_errno=True).adjtimex(query)
    if state < 0:
        return Row(
            "clock",
            now,
            f"whether it is synchronized is not known ({os.strerror(ctypes.get_errno())})",
        )
    if state == _UNSYNCHRONIZED:
        return Row(
            "clock",
            now,
            "not synchronized, according to the kernel; logs of several nodes may not line up",
        )
    return Row("clock", now, "synchronized, according to the kernel")


def _locale() -> Row:
    printed = getattr(sys.stdout, "encoding", None) or locale.getpreferredencoding(False)
    names = {"text": printed, "file names": sys.getfilesystemencoding()}
    foreign = [
        f"{what} {name}" for what, name in names.items() if name.lower().replace("-", "") != "utf8"
    ]
    if foreign:
        return Row(
            "locale",
            ", ".join(foreign),
            "text of other languages cannot be printed or named; export PYTHONUTF8=1",
            wrong=True,
        )
    return Row(
        "locale",
        "utf-8",
        os.environ.get("LC_ALL") or os.environ.get("LANG") or "no LANG is set; Python takes UTF-8",
    )
