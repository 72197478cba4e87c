"""A Hugging Face folder to a run directory with one checkpoint, of iteration 0, without optimizer.

SAVE/iter_0000000/      the weights in torch_dist, for any layout, state.json and manifest.json
SAVE/huggingface/       the tokenizer's files, config.json, generation_config.json, for export
SAVE/config.yaml        the model's settings and its tokenizer
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_chatflow.checkpoint.integrity import record_files, write_manifest
from megatron_chatflow.checkpoint.run_directory import POINTER, iteration_folder
from megatron_chatflow.config import to_yaml
from megatron_chatflow.conversion.hf_config import config_json
from megatron_chatflow.conversion.hf_model import Opened, open_folder
from megatron_chatflow.conversion.safetensors_io import (
    MODEL_FILES,
    TOKENIZER_FILES,
    copy_files,
)
from megatron_chatflow.conversion.torch_dist import Piece, write
from megatron_chatflow.utils.files import sync_folder, write_atomically
from megatron_chatflow.utils.logging import log_notes
from megatron_chatflow.utils.user_files import dump_yaml, load_yaml

logger = logging.getLogger(__name__)

FILES = "huggingface"
"""Folder of a run directory with the files that are carried along."""


def convert(
    load: Path,
    save: Path,
    tokenizer_folder: Path | None,
    methods: dict[str, str | None],
) -> None:
    """Convert the folder `load` into the run directory `save`, which must not exist or be empty.

    Args:
        load: See `open_folder`.
        save: Complete when this returns; a killed conversion leaves ``SAVE.partial``.
        tokenizer_folder: An extended tokenizer, or None; see `open_folder`.
        methods: How new rows are made; see `open_folder`.

    Raises:
        ConfigError: The folder cannot be converted; nothing has been written.
    """
    model = open_folder(load, tokenizer_folder, methods)
    log_notes(logger, model.notes)
    partial = save.with_name(save.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder = iteration_folder(partial, 0)
    folder.mkdir(parents=True)
    write(folder, model.contents, model.dtypes, _with_progress(model))
    source = {"type": "huggingface", "name": load.name}
    state = {
        "iteration": 0,
        "consumed_train_samples": 0,
        "sealed": True,
        "optimizer": False,
        "converted_from": source,
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=1))
    write_manifest(folder, record_files(folder))
    _carry_files(model, partial / FILES)
    write_atomically(partial / "config.yaml", _yaml(model))
    write_atomically(partial / POINTER, "0\n")
    os.rename(partial, save)
    sync_folder(save.parent)


def _with_progress(model: Opened) -> Callable[[Piece], torch.Tensor]:
    layers, last_logged = model.config.model.num_layers, -1

    def make(piece: Piece) -> torch.Tensor:
        nonlocal last_logged
        if piece.layer is not None and piece.layer >= last_logged + max(1, layers // 10):
            last_logged = piece.layer
            logger.info(f" layer {piece.layer + 1} of {layers}")
        return model.tensor(piece)

    return make


def _carry_files(model: Opened, target: Path) -> None:
    target.mkdir()
    copy_files(model.folder, target, MODEL_FILES)
    copy_files(model.vocabulary.tokenizer_file.parent, target, TOKENIZER_FILES)
    dtype = str(model.dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")
    content = config_json(model.config.model, model.vocabulary.rows, dtype, model.hf)
    (target / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _yaml(model: Opened) -> str:
    """Return the sections that a conversion knows; the tokenizer's path is relative to the file.

    All other settings belong to the command that reads it.
    """
    sections = load_yaml(to_yaml(model.config))
    sections["tokenizer"]["tokenizer_model"] = f"{FILES}/{model.vocabulary.tokenizer_file.name}"
    kept = {
        "model": sections["model"],
        "training": {"bf16": model.config.training.bf16},
        "tokenizer": sections["tokenizer"],
    }
    return dump_yaml(kept)
