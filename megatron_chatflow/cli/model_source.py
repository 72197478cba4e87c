"""What `--load` and `--reference` may name: a run directory, or a Hugging Face folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.cli.common import install_engine, run_values
from megatron_chatflow.config import (
    CommandParser,
    Config,
    load_values,
    make_parser,
    parse,
    resolve_model,
)
from megatron_chatflow.errors import ConfigError, ErrorCollector
from megatron_chatflow.utils.user_files import absolute_path

if TYPE_CHECKING:
    from megatron_chatflow.conversion.hf_model import Opened
    from megatron_chatflow.evaluation.eval_model import Subject


@dataclass(frozen=True)
class Source:
    """A folder with a model, found but not yet laid over processes."""

    folder: str
    values: dict[str, Any]
    """{setting: value} of the folder, as the base that flags win over."""
    opened: Opened | None
    """The Hugging Face model; None: it is a run directory."""

    def subject(
        self, config: Config, world_size: int, average: int = 1, use_ema: bool = False
    ) -> Subject:
        """Return the model under these settings.

        Raises:
            ConfigError: there are no such weights, or the settings do not fit.
        """
        from megatron_chatflow.evaluation.eval_model import Subject, find_subject

        if self.opened is None:
            return find_subject(config, world_size, average, use_ema)
        if config.checkpoint.ckpt_step is not None or average != 1:
            flag = "--average-checkpoints" if average != 1 else "--ckpt-step"
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no iterations; drop {flag}"
            )
        if use_ema:
            raise ConfigError(
                f"{self.folder} is a Hugging Face folder, which has no running mean of the "
                f"weights; drop --use-ema"
            )
        from megatron_chatflow.conversion.load_into_model import load_weights

        opened = self.opened
        return Subject(
            resolve_model(config, world_size),
            self.folder,
            0,
            False,
            lambda model: load_weights(opened, model),
        )


def find_source(folder: str) -> Source:
    """Return what a folder holds.

    Raises:
        ConfigError: it holds neither a run nor a Hugging Face model, or one that cannot be read.
    """
    is_hugging_face, is_run = (
        os.path.isfile(Path(folder) / name) for name in ("config.json", "config.yaml")
    )
    if is_run or not is_hugging_face:
        return Source(folder, run_values(folder, keep_layout=False), None)
    install_engine()
    from megatron_chatflow.conversion.hf_model import open_folder

    opened = open_folder(Path(folder))
    sections = [opened.config.model, opened.config.tokenizer]
    values = {f.name: getattr(section, f.name) for section in sections for f in fields(section)}
    # Rows beyond the vocabulary would take part in the softmax, where transformers has none.
    unpadded = {"make_vocab_size_divisible_by": 1}
    return Source(folder, values | unpadded | {"bf16": opened.config.training.bf16}, opened)


def add_use_ema(parser: argparse.ArgumentParser) -> None:
    """Add the flag of commands that read weights."""
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help=(
            "use the running mean of the weights of a run with --ema-decay instead of the weights"
        ),
    )


def parse_with_source(
    parser: CommandParser,
    argv: Sequence[str],
    world_size: int,
    adjust: Callable[[Config], Config] = lambda config: config,
) -> tuple[Source, Config, argparse.Namespace]:
    """Return the folder of --load, the settings and the command's own arguments.

    The settings are the folder's, with the flags over them, changed by `adjust` and checked for
    `world_size` processes.
    """

    def check(config: Config, _: argparse.Namespace) -> Config:
        if not config.checkpoint.load:
            raise ConfigError(
                "load is missing; give --load RUN, the folder that was --save of a run, or a "
                "Hugging Face folder"
            )
        config = adjust(config)
        resolve_model(config, world_size)
        return config

    folder = _folder(parser.parse_and_collect(argv))
    source = find_source(folder) if folder else Source("", {}, None)
    return source, *parse(parser, argv, source.values, resolve=check)


def _folder(args: argparse.Namespace) -> str | None:
    """Return what --load or the --config file names; None where that cannot be read."""
    if getattr(args, "load", None):
        return absolute_path(args.load)
    if getattr(args, "config", None):
        with ErrorCollector().collect():  # reported by `parse`
            return load_values(Path(args.config)).get("load")
    return None


def settings_alone(source: Source) -> Config:
    """Return the settings of a folder, without flags."""
    return parse(make_parser("", ""), [], source.values)[0]
