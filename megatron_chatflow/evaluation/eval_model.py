"""What is evaluated: the settings, the weights and the tokenizer of a run. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.run_directory import iteration_of, read_state
from megatron_chatflow.checkpoint.selection import ChosenWeights, choose_weights
from megatron_chatflow.config import Config, resolve_model
from megatron_chatflow.utils.user_files import absolute_path


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


def find_subject(
    config: Config, world_size: int, average: int = 1, use_ema: bool = False
) -> Subject:
    """The model that `config.checkpoint` names.

    Args:
        config: as written, over the settings of the run.
        world_size: processes of this job.
        average: how many of the last checkpoints to take the mean of.
        use_ema: take the running mean of the weights in place of the weights.

    Raises:
        ConfigError: there are no such weights, or the settings do not fit.
    """
    chosen = choose_weights(config.checkpoint.load, config.checkpoint.ckpt_step, average, use_ema)
    state = read_state(chosen.newest)
    load = functools.partial(_load, chosen)
    return Subject(
        resolve_model(config, world_size),
        chosen.name,
        state["iteration"],
        state["consumed_train_samples"] > 0,
        load,
    )


def _load(chosen: ChosenWeights, model: list[Any]) -> None:
    from megatron_chatflow.checkpoint.averaging import load_mean
    from megatron_chatflow.checkpoint.state_dict import load_average

    if chosen.use_ema:
        load_average(chosen.newest, model)
    else:
        load_mean(chosen.folders, model)


def split_reference(path: str) -> tuple[Path, int | None]:
    """(run directory, iteration or None) of ``RUN`` or ``RUN/iter_0000100``."""
    folder = Path(absolute_path(path))
    if (iteration := iteration_of(folder.name)) is not None:
        return folder.parent, iteration
    return folder, None


def laid_out_as(reference: Config, config: Config) -> Config:
    """The reference's settings, read and laid over the processes as `config` says: same windows,
    same layout.
    """
    training = dataclasses.replace(
        reference.training,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
    )
    return dataclasses.replace(
        reference,
        parallel=config.parallel,
        data=config.data,
        validation=config.validation,
        training=training,
    )
