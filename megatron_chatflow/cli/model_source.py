"""The settings of commands that read a model: those of ``--load``, with the flags over them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_chatflow.config import CommandParser, Config, load_values, parse, resolve_model
from megatron_chatflow.errors import ConfigError, ErrorCollector
from megatron_chatflow.evaluation.eval_model import ModelSource, find_source
from megatron_chatflow.utils.user_files import absolute_path


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
) -> tuple[ModelSource, Config, argparse.Namespace]:
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
    source = find_source(folder) if folder else ModelSource("", {}, None)
    return source, *parse(parser, argv, source.settings, resolve=check)


def _folder(args: argparse.Namespace) -> str | None:
    """Return what --load or the --config file names; None where that cannot be read."""
    if getattr(args, "load", None):
        return absolute_path(args.load)
    if getattr(args, "config", None):
        with ErrorCollector().collect():  # reported by `parse`
            return load_values(Path(args.config)).get("load")
    return None
