"""Many damaged and crafted checkpoints: rejected or read, never executed, in bounded memory."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.crafted import Evil, bombs, read_all, write_small

VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice([-1, 0, 1, 1 << 31, 1 << 62, 1 << 2000, 1.5, None, True, "", b"", ()]),
    lambda r: r.choice(["../a", "/etc/passwd", "/dev/zero", ".", "__0_0.distcp", "\0", "x" * 9999]),
    lambda r: tuple([r.choice([0, 1, 1 << 40])] * r.choice([1, 2, 70, 20_000])),
    lambda r: ["stream.zstd/1"],
    lambda r: nested(r.choice([10, 400])),
    lambda r: Evil(Path("executed")),
]


def nested(depth: int) -> Any:
    value: Any = ()
    for i in range(depth):
        value = (value,) if i % 2 else [value]
    return value


def change_objects(content: bytes, r: random.Random) -> bytes:
    """Put strange values into the unpickled ``.metadata``."""
    import torch

    metadata = pickle.loads(content)
    for _ in range(r.randint(1, 3)):
        targets = [metadata, *metadata.storage_data.values()]
        for entry in metadata.state_dict_metadata.values():
            chunks = getattr(entry, "chunks", None)
            targets += [entry, *chunks] if isinstance(chunks, list) else [entry]
        target, value = r.choice(targets), r.choice(VALUES)(r)
        if isinstance(value, tuple) and all(type(n) is int and n < 1 << 60 for n in value):
            value = torch.Size(value) if r.random() < 0.7 else value
        if fields := list(getattr(target, "__dict__", ())):
            target.__dict__[r.choice(fields)] = value
        if r.random() < 0.2 and isinstance(metadata.storage_data, dict):
            metadata.storage_data[r.choice(["x", 1, None, *metadata.storage_data])] = value
        if not isinstance(metadata.state_dict_metadata, dict):
            break
        if not isinstance(metadata.storage_data, dict):
            break
    return pickle.dumps(metadata, r.randint(2, 5))


def change_bytes(content: bytes, r: random.Random) -> bytes:
    """Replace, remove, repeat and insert bytes; instructions that announce a lot are among them."""
    changed = bytearray(content)
    pieces = [piece for _, piece in bombs()]
    for _ in range(r.choice([1, 1, 2, 5, 30])):
        place, count = r.randrange(len(changed) + 1), r.choice([1, 1, 2, 8, 100])
        match r.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([r.randrange(256)])
            case 1:
                del changed[place : place + count]
            case 2:
                changed[place:place] = changed[place : place + count]
            case 3:
                changed[place:place] = r.choice(pieces)[2:-1]
            case 4:
                changed[place:place] = bytes([r.choice(b"(])}tlaesuR\x85\x86\x81b0.Nh")]) * count
            case 5:
                changed[place:place] = pickle.dumps(Evil(Path("executed")), r.randint(2, 5))[2:-1]
    return bytes(changed)


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read checkpoints with damaged files; runs in a separate process, see below."""
    import resource
    import tracemalloc

    import torch

    from megatron_chatflow.errors import ChatflowError

    torch.set_num_threads(1)
    names = [".metadata", "__0_0.distcp", "common.pt"]
    intact = {name: (folder / name).read_bytes() for name in names}
    read_all(folder)
    seen: list[str] = []
    watched = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")
    sys.addaudithook(lambda event, _: seen.append(event) if event in watched else None)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (64 << 20), -1))
    tracemalloc.start()
    outcomes = {"loaded": 0, "refused": 0}
    for number in range(count):
        r = random.Random(seed + number)
        name = r.choice([".metadata", ".metadata", ".metadata", *names])
        change = change_objects if name == ".metadata" and r.random() < 0.5 else change_bytes
        content = change(intact[name], r)
        (folder / name).write_bytes(content)
        seen.clear()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            read_all(folder)
            outcomes["loaded"] += 1
        except ChatflowError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and "memory" not in str(error), (number, str(error))
        most = tracemalloc.get_traced_memory()[1] - before
        assert most < 2 * len(content) + (4 << 20), (number, name, len(content), most)
        assert not seen and not Path("executed").exists(), (number, name, seen)
        (folder / name).write_bytes(intact[name])
    return outcomes


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_read_and_never_run(tmp_path: Path, count: int) -> None:
    """Reading takes at most twice the file's size plus 4 MiB, with 64 MiB of address space left."""
    folder = write_small(tmp_path / "small")
    call = (
        f"from tests.checkpoint.test_fuzzed_checkpoints import *; "
        f"print(fuzz(Path({str(folder)!r}), {count}, 0))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = eval(done.stdout)
    assert outcomes["refused"] > count / 2 and outcomes["loaded"] > count / 50, outcomes
