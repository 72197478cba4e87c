"""The run directory as files: names, the pointer to the latest checkpoint, and what a checkpoint knows. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.config import UsageError
from megatron_chatflow.training import manifest
from megatron_chatflow.utils.user_files import load_json

POINTER = "latest_checkpointed_iteration.txt"
METRICS = "metrics.jsonl"


def iteration_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return run / f"iter_{iteration:07d}"


def latest_iteration(run: Path) -> int | None:
    """The iteration that the pointer names, or None where there is no checkpoint. Raises UsageError for a damaged pointer."""
    try:
        text = (run / POINTER).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not text.isdigit():
        raise UsageError(f"{run / POINTER} holds {text!r}, not an iteration; write the number of a complete iter_ folder into it")
    return int(text)


def complete_iterations(run: Path) -> list[int]:
    """The iterations of all checkpoints in a run directory, newest first."""
    names = (path.name for path in run.glob("iter_*") if (path / "state.json").is_file())
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,}", name)), reverse=True)


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
        there = ", ".join(map(str, sorted(complete_iterations(run))))
        raise UsageError(f"{folder} is not a complete checkpoint; give --ckpt-step one of {there or 'none: the directory has no checkpoint'}")
    return folder


def find_sound_checkpoint(run: str | Path, ckpt_step: int | None, damaged: Mapping[Path, str]) -> tuple[Path | None, list[str]]:
    """The checkpoint that training goes on from, and a sentence for each newer one that is passed over.

    Args:
        run: the run directory.
        ckpt_step: the iteration that the user asked for; None for the latest.
        damaged: checkpoints that were found damaged, with what is wrong; those found at first sight come on top.

    Raises:
        UsageError: the one asked for is missing or damaged, or there are checkpoints and none is sound.
    """
    run = Path(run)
    if ckpt_step is not None:
        folder = find_checkpoint(run, ckpt_step)
        wrong = damaged.get(folder) or manifest.damage_at_first_sight(folder)
        if wrong:
            raise UsageError(f"{folder} is damaged: {wrong}; give --ckpt-step another, or leave it out for the latest that is sound")
        return folder, []
    there, passed = complete_iterations(run), []
    try:
        latest = latest_iteration(run)
        if latest is None:
            return None, []
        if latest not in there:
            passed.append(f"{run / POINTER} names iteration {latest}, which is not there")
    except UsageError as error:
        latest = max(there, default=0)
        passed.append(str(error).split(";")[0])
    for iteration in there:
        if iteration > latest:
            continue
        folder = iteration_folder(run, iteration)
        wrong = damaged.get(folder) or manifest.damage_at_first_sight(folder)
        if not wrong:
            return folder, [f"{sentence}: going back to {folder}" for sentence in passed]
        passed.append(f"{folder} is damaged ({wrong})")
    raise UsageError(f"load {run} holds no sound checkpoint: {'; '.join(passed)}; restore one, or start afresh in another folder")


def outdated(iterations: Collection[int], most_recent_k: int | None, retain_interval: int | None) -> list[int]:
    """Which checkpoints to remove: all but the newest `most_recent_k` and the multiples of `retain_interval`.

    With neither none is removed. With `retain_interval` alone the two newest are kept: the latest, and one to go back to.
    """
    if most_recent_k is None and retain_interval is None:
        return []
    newest = sorted(iterations)[-(most_recent_k or 2) :]
    return sorted(i for i in iterations if i not in newest and not (retain_interval and i % retain_interval == 0))


def read_state(folder: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: iteration, consumed samples, plan, schedule, identity of the data."""
    try:
        return load_json((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'state.json'} cannot be read ({error}); load another checkpoint with --ckpt-step") from None


def trim_metrics(run: Path, iteration: int, *, validated: bool) -> None:
    """Cut lines of later iterations, and a half line, from the end of metrics.jsonl: a resumed run writes them again.

    Unless `validated`, the validation of `iteration` itself is among them.
    """
    path = run / METRICS
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _line_start(file, end)
            file.seek(start)
            line = file.read(end - start)
            if line.endswith(b"\n"):
                record = load_json(line)
                if record["iteration"] < iteration or (record["iteration"] == iteration and (validated or "validation" not in record)):
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
