"""What `--load` and `--reference` may name: a run directory, or a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_chatflow.cli.common import install_engine, run_values
from megatron_chatflow.config import Config, make_parser, parse
from megatron_chatflow.errors import ConfigError

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
        """The model under these settings. Raises ConfigError where there are no such weights, or
        the settings do not fit.
        """
        from megatron_chatflow.config import resolve_model
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
    """What a folder holds. Raises ConfigError where it holds neither a run nor a Hugging Face
    model, or one that cannot be read.
    """
    if not (Path(folder) / "config.json").is_file() or (Path(folder) / "config.yaml").is_file():
        return Source(folder, run_values(folder, keep_layout=False), None)
    install_engine()
    from megatron_chatflow.conversion.hf_model import open_folder

    opened = open_folder(Path(folder))
    sections = [opened.config.model, opened.config.tokenizer]
    values = {f.name: getattr(section, f.name) for section in sections for f in fields(section)}
    unpadded = {
        "make_vocab_size_divisible_by": 1
    }  # rows beyond the vocabulary would take part in the softmax, where transformers has none
    return Source(folder, values | unpadded | {"bf16": opened.config.training.bf16}, opened)


def add_use_ema(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that read weights."""
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help=(
            "take the running mean of the weights (of a run with --ema-decay) in place of the "
            "weights"
        ),
    )


def parse_with_source(parser: Any, argv: Sequence[str]) -> tuple[Source, Config, Any]:
    """The folder of --load, and the settings: the folder's, with the flags over them."""
    config, _ = parse(parser, argv)
    if not config.checkpoint.load:
        raise ConfigError(
            "load is missing; give --load RUN, the folder that was --save of a run, or a "
            "Hugging Face folder"
        )
    source = find_source(config.checkpoint.load)
    return source, *parse(parser, argv, source.values)


def settings_alone(source: Source) -> Config:
    """The settings of a folder, without flags."""
    return parse(make_parser("", ""), [], source.values)[0]
