"""Weights of a run directory to a folder that transformers loads."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import torch

from megatron_chatflow.checkpoint.selection import ChosenWeights
from megatron_chatflow.config import Config, load_values
from megatron_chatflow.config.schema import ParallelSettings
from megatron_chatflow.conversion.checkpoint_weights import SavedWeights, check_files
from megatron_chatflow.conversion.hf_config import config_json
from megatron_chatflow.conversion.hf_model import groups_of
from megatron_chatflow.conversion.safetensors_io import (
    MODEL_FILES,
    TOKENIZER_FILES,
    WeightsWriter,
    copy_files,
    read_json,
)
from megatron_chatflow.conversion.torch_dist import Piece, describe
from megatron_chatflow.conversion.weight_mapping import (
    WORD_TABLES,
    huggingface_names,
    split,
    split_shapes,
)
from megatron_chatflow.distributed import process_groups
from megatron_chatflow.distributed.launch import Launch
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


def convert(
    load: Path,
    save: Path,
    chosen: ChosenWeights,
    tokenizer_folder: Path | None,
) -> None:
    """Convert weights of the run directory `load` into the folder `save`.

    `save` must not exist or be empty.

    Args:
        load: A run directory.
        save: Complete when this returns; a killed conversion leaves ``SAVE.partial``.
        chosen: Which weights.
        tokenizer_folder: Where tokenizer files, and config.json as the pattern, come from; None is
            the folder of the run's tokenizer.

    Raises:
        ConfigError: The weights cannot be converted; nothing has been written.
    """
    config = _read_config(load)
    check_files(chosen)
    vocab_size, files = _vocabulary(config, tokenizer_folder)
    template = (
        read_json(files / "config.json") if files and (files / "config.json").is_file() else None
    )
    config_json(
        config.model, vocab_size, "float32", template
    )  # refuses another architecture before the model is built
    contents = describe(config, vocab_size)
    process_groups.initialize(
        Launch("single", 0, 1, 0, None, None), ParallelSettings(), config.model.num_layers
    )
    try:
        weights = SavedWeights(chosen, contents, vocab_size)
        partial = save.with_name(save.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if files:
            copy_files(files, partial, (*MODEL_FILES, *TOKENIZER_FILES))
        count = _write_weights(config, contents.pieces(), weights, vocab_size, partial)
    finally:
        process_groups.shut_down()
    dtype = str(weights.dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")
    written = json.dumps(config_json(config.model, vocab_size, dtype, template), indent=2)
    (partial / "config.json").write_text(written + "\n", encoding="utf-8")
    os.rename(partial, save)
    logger.info(f" {count} file{'s' if count > 1 else ''} of weights, {dtype}, from {chosen.name}")


def _read_config(load: Path) -> Config:
    return Config().replace(**load_values(load / "config.yaml"))


def _vocabulary(config: Config, tokenizer_folder: Path | None) -> tuple[int, Path | None]:
    """(rows of the vocabulary without padding, folder with the tokenizer's files or None)."""
    t = config.tokenizer
    file = Path(t.tokenizer_model) if t.tokenizer_model else None
    folder = tokenizer_folder or (file and (file if file.is_dir() else file.parent))
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"{folder}, the folder of the run's tokenizer, is not there; give its new place "
            f"as --tokenizer-folder"
        )
    if t.vocab_size:
        return t.vocab_size, folder
    if t.tokenizer_type is None:
        raise ConfigError(
            "the run's config.yaml has neither vocab_size nor a tokenizer, so the rows are "
            "not known; write vocab_size there"
        )
    found = load_tokenizer(
        t.tokenizer_type, tokenizer_model=file, vocab_file=t.vocab_file, merge_file=t.merge_file
    )
    return found.vocab_size, folder


def _write_weights(
    config: Config,
    pieces: list[Piece],
    weights: SavedWeights,
    vocab_size: int,
    folder: Path,
) -> int:
    """Returns the number of files."""
    layers, last_logged = config.model.num_layers, -1
    groups = groups_of(config.model)
    sizes: dict[str, int] = {}
    for piece in pieces:
        shape = (vocab_size, *piece.shape[1:]) if piece.key in WORD_TABLES else piece.shape
        shapes = split_shapes(piece.key, shape, *groups)
        names = huggingface_names(piece.key, piece.layer)
        sizes |= {
            name: torch.Size(s).numel() * weights.dtypes[piece.key].itemsize
            for name, s in zip(names, shapes, strict=True)
        }
    writer = WeightsWriter(folder, sizes)
    for piece in pieces:
        if piece.layer is not None and piece.layer >= last_logged + max(1, layers // 10):
            last_logged = piece.layer
            logger.info(f" layer {piece.layer + 1} of {layers}")
        for name, part in zip(
            huggingface_names(piece.key, piece.layer),
            split(piece.key, weights.read(piece), *groups),
            strict=True,
        ):
            writer.add(name, part)
    return writer.finish()
