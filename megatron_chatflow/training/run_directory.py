"""The run directory as files: names, the pointer to the latest checkpoint, and what a checkpoint knows. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_chatflow.config import UsageError

POINTER = "latest_checkpointed_iteration.txt"
METRICS = "metrics.jsonl"


def iteration_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return run / f"iter_{iteration:07d}"


def write_atomically(path: Path, text: str) -> None:
    """Write under another name, make it durable, then rename: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def latest_iteration(run: Path) -> int | None:
    """The iteration that the pointer names, or None where there is no checkpoint. Raises UsageError for a damaged pointer."""
    try:
        text = (run / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not text.isdigit():
        raise UsageError(f"{run / POINTER} holds {text!r}, not an iteration; write the number of a complete iter_ folder into it")
    return int(text)


def find_checkpoint(run: str | Path, ckpt_step: int | None) -> Path | None:
    """The checkpoint folder to load: of `ckpt_step`, else the latest; None where the directory has none.

    Raises UsageError where the wanted one is missing, naming those that are there.
    """
    run = Path(run)
    iteration = ckpt_step if ckpt_step is not None else latest_iteration(run)
    if iteration is None:
        return None
    folder = iteration_folder(run, iteration)
    if not (folder / "state.json").is_file():
        there = complete_iterations(run)
        raise UsageError(
            f"{folder} is not a complete checkpoint; give --ckpt-step one of {', '.join(map(str, there)) or 'none: the directory has no checkpoint'}"
        )
    return folder


def complete_iterations(run: Path) -> list[int]:
    """The iterations of which there is a complete checkpoint, rising."""
    return sorted(int(p.name[5:]) for p in run.glob("iter_*") if p.name[5:].isdigit() and (p / "state.json").is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: iteration, consumed samples, plan, schedule, identity of the data."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'state.json'} cannot be read ({error}); load another checkpoint with --ckpt-step") from None


def trim_metrics(run: Path, iteration: int) -> None:
    """Cut lines of later iterations, and a half line, from the end of metrics.jsonl: a resumed run writes them again."""
    path = run / METRICS
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _line_start(file, end)
            file.seek(start)
            line = file.read(end - start)
            if line.endswith(b"\n") and json.loads(line)["iteration"] <= iteration:
                break
            end = start
        file.truncate(end)


def _line_start(file: Any, end: int) -> int:
    """Where the line that ends before byte `end` starts."""
    position, block = end - 1, 4096
    while position > 0:
        low = max(0, position - block)
        file.seek(low)
        cut = file.read(position - low).rfind(b"\n")
        if cut >= 0:
            return low + cut + 1
        position = low
    return 0
