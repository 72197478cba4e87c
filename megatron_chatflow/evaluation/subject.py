"""What is evaluated: the settings, the weights and the tokenizer of a run. Imports no torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config, UsageError, resolve_reading
from megatron_chatflow.training.run_directory import complete_iterations, find_checkpoint, iteration_folder, read_state


@dataclass(frozen=True)
class Subject:
    """A model that can be opened (`session.open_model`)."""

    config: Config
    """Resolved."""
    name: str
    """What reports call it."""
    iteration: int
    """Of the weights."""
    trained: bool
    """Whether it was trained here at all, and not only converted."""
    load: Callable[[list[Any]], None]
    """Fills the model chunks of this rank."""


def find_subject(config: Config, world_size: int, average: int = 1) -> Subject:
    """The model that `config.checkpoint` names.

    Args:
        config: as written, over the settings of the run.
        world_size: processes of this job.
        average: how many of the last checkpoints to take the mean of.

    Raises:
        UsageError: there is no such checkpoint, or the settings do not fit.
    """
    where = config.checkpoint
    folders = last_checkpoints(where.load, where.ckpt_step, average)
    state = read_state(folders[-1])
    name = str(folders[-1]) if average == 1 else f"mean of {', '.join(folder.name for folder in folders[:-1])} and {folders[-1]}"
    load = functools.partial(_load, folders)
    return Subject(resolve_reading(config, world_size), name, state["iteration"], state["consumed_train_samples"] > 0, load)


def _load(folders: list[Path], model: list[Any]) -> None:
    from megatron_chatflow.training.checkpoint_mean import load_mean

    load_mean(folders, model)


def last_checkpoints(run: str | Path, ckpt_step: int | None, count: int) -> list[Path]:
    """The folders of the last `count` complete checkpoints of a run up to `ckpt_step` (or the latest), oldest first.

    Raises:
        UsageError: there is no checkpoint, or fewer than `count`.
    """
    run, newest = Path(run), find_checkpoint(run, ckpt_step)
    if newest is None:
        raise UsageError(f"load {run} holds no checkpoint; give a run directory that has one")
    there = [iteration for iteration in sorted(complete_iterations(run)) if iteration <= int(newest.name[5:])]
    if count < 1 or count > len(there):
        raise UsageError(
            f"average_checkpoints is {count}, and the complete checkpoints of {run} up to {newest.name} are {len(there)} (iteration "
            f"{', '.join(map(str, there))}); give --average-checkpoints a number from 1 to {len(there)}"
        )
    return [iteration_folder(run, iteration) for iteration in there[-count:]]


def split_reference(path: str) -> tuple[Path, int | None]:
    """(run directory, iteration or None) of ``RUN`` or ``RUN/iter_0000100``."""
    folder = Path(path).expanduser().resolve()
    if folder.name.startswith("iter_") and folder.name[5:].isdigit():
        return folder.parent, int(folder.name[5:])
    return folder, None


def laid_out_as(reference: Config, config: Config) -> Config:
    """The reference's settings, read and laid over the processes as `config` says: same windows, same layout."""
    result = copy.deepcopy(reference)
    result.parallel, result.data, result.validation = (copy.deepcopy(getattr(config, name)) for name in ("parallel", "data", "validation"))
    result.training.micro_batch_size = config.training.micro_batch_size
    result.training.global_batch_size = config.training.global_batch_size
    return result
