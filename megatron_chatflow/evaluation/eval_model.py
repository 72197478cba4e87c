"""Which model is evaluated: a run directory or a Hugging Face folder, settings and weights.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.checkpoint.run_directory import iteration_of, read_settings, read_state
from megatron_chatflow.checkpoint.selection import ChosenWeights, choose_weights
from megatron_chatflow.config import Config, ModelConfig, make_config, resolve_model
from megatron_chatflow.config.schema import PrecisionSettings
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.user_files import absolute_path

if TYPE_CHECKING:
    from megatron_chatflow.conversion.hf_model import Opened


@dataclass(frozen=True)
class EvalModel:
    """A model that can be opened (`model_session.open_model`)."""

    config: ModelConfig
    name: str
    """What reports call it."""
    iteration: int
    """Of the weights."""
    trained: bool
    """Whether it was trained here, and not only converted."""
    load: Callable[[list[Any]], None]
    """Fills the model chunks of this rank."""


@dataclass(frozen=True)
class ModelSource:
    """A folder that holds a model; `find_source` makes it."""

    folder: str
    settings: Mapping[str, Any]
    """{setting: value} of the folder."""
    hf_model: Opened | None
    """The Hugging Face model; None for a run directory."""

    def config(self, settings: Mapping[str, Any]) -> Config:
        """Return the configuration of `settings` over those of the folder.

        Raises:
            ConfigError: a setting is unknown or of the wrong kind.
        """
        return make_config({**settings, "load": self.folder}, self.settings)

    def resolve(
        self,
        config: Config,
        world_size: int,
        average_checkpoints: int = 1,
        use_ema: bool = False,
    ) -> EvalModel:
        """Return the model under these settings.

        Args:
            config: Not yet resolved.
            world_size: Processes of this job.
            average_checkpoints: How many of the last checkpoints to take the mean of.
            use_ema: Take the running mean of the weights in place of the weights.

        Raises:
            ChatflowError: There are no such weights, or the settings do not fit.
        """
        if self.hf_model is None:
            return resolve_run_model(config, world_size, average_checkpoints, use_ema)
        if config.checkpoint.ckpt_step is not None or average_checkpoints != 1:
            flag = "--average-checkpoints" if average_checkpoints != 1 else "--ckpt-step"
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no iterations; drop {flag}"
            )
        if use_ema:
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no running mean of the "
                f"weights; drop --use-ema"
            )
        from megatron_chatflow.conversion.load_into_model import load_weights

        load = functools.partial(load_weights, self.hf_model)
        return EvalModel(resolve_model(config, world_size), self.folder, 0, False, load)


def find_source(folder: str | Path) -> ModelSource:
    """Return the model that a folder holds.

    Raises:
        ConfigError: The folder is neither a run directory nor a Hugging Face model, or it cannot
            be read.
    """
    folder = str(absolute_path(folder))
    # os.path.isfile is False, too, for a path that is too long.
    is_hugging_face, is_run = (
        os.path.isfile(Path(folder) / name) for name in ("config.json", "config.yaml")
    )
    if is_run or not is_hugging_face:
        return ModelSource(folder, read_settings(folder, keep_layout=False), None)
    from megatron_chatflow.distributed.process_groups import install_engine

    install_engine()
    from megatron_chatflow.conversion.hf_model import open_folder

    hf_model = open_folder(Path(folder))
    sections = [hf_model.config.model, hf_model.config.tokenizer]
    settings = {
        f.name: getattr(section, f.name)
        for section in sections
        for f in dataclasses.fields(section)
    }
    settings["bf16"] = hf_model.config.training.bf16
    # Padding rows would take part in the softmax, where transformers has none.
    settings["make_vocab_size_divisible_by"] = 1
    return ModelSource(folder, settings, hf_model)


def resolve_run_model(
    config: Config, world_size: int, average_checkpoints: int = 1, use_ema: bool = False
) -> EvalModel:
    """Return the model of the run directory `config.checkpoint.load`; see `ModelSource.resolve`."""
    load = config.checkpoint.load
    assert load is not None, "the settings name the run directory"
    chosen = choose_weights(load, config.checkpoint.ckpt_step, average_checkpoints, use_ema)
    state = read_state(chosen.newest)
    return EvalModel(
        resolve_model(config, world_size),
        chosen.name,
        state["iteration"],
        state["consumed_train_samples"] > 0,
        functools.partial(_load, chosen),
    )


def _load(chosen: ChosenWeights, model: list[Any]) -> None:
    from megatron_chatflow.checkpoint.averaging import load_mean
    from megatron_chatflow.checkpoint.state_dict import load_average

    if chosen.use_ema:
        load_average(chosen.newest, model)
    else:
        load_mean(chosen.folders, model)


def split_reference(path: str | Path) -> tuple[Path, int | None]:
    """Return (folder, iteration or None) of ``RUN`` or ``RUN/iter_0000100``."""
    folder = Path(absolute_path(path))
    if (iteration := iteration_of(folder.name)) is not None:
        return folder.parent, iteration
    return folder, None


def laid_out_as(reference: Config, config: Config) -> Config:
    """Return the reference's settings with the windows and the process layout of `config`."""
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


def with_any_length(config: Config) -> Config:
    """Return the settings without those that need rows of certain lengths.

    Prompts have any length; FP8 layers need multiples of 8 tokens, and sequence parallelism those
    of the tensor-parallel size.
    """
    parallel = dataclasses.replace(config.parallel, sequence_parallel=False)
    return dataclasses.replace(config, parallel=parallel, precision=PrecisionSettings())
