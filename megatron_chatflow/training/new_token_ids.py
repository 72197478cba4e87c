"""The ids of an extended tokenizer that are new, from the token map. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megatron_chatflow.config import Config
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.tokenizer.token_map import TOKEN_MAP, read_token_map


def new_row_ids(config: Config, vocab_size: int) -> np.ndarray:
    """Return the ids that --train-new-rows-samples trains, sorted, int64; empty without it.

    Args:
        config: resolved settings.
        vocab_size: tokens that the model knows, before padding.

    Raises:
        ConfigError: the tokenizer has no map, or the map is of another vocabulary.
    """
    if not config.training.train_new_rows_samples:
        return np.empty(0, np.int64)
    model = config.tokenizer.tokenizer_model
    if model is None:
        raise ConfigError(
            f"train_new_rows_samples needs the {TOKEN_MAP} of an extended tokenizer; give "
            f"--tokenizer-model the folder of one"
        )
    folder = Path(model) if os.path.isdir(model) else Path(model).parent
    path = folder / TOKEN_MAP
    if not os.path.exists(path):
        raise ConfigError(
            f"train_new_rows_samples needs {path}, which tools/extend_tokenizer.py writes; "
            f"give that tokenizer, or drop --train-new-rows-samples"
        )
    ids = np.array(sorted(token.id for token in read_token_map(folder).new), np.int64)
    if not len(ids):
        raise ConfigError(
            f"{path} names no new tokens, so there is nothing to train; drop "
            f"--train-new-rows-samples"
        )
    if ids[-1] >= vocab_size:
        raise ConfigError(
            f"{path} names token {ids[-1]} and the vocabulary has {vocab_size}; give the "
            f"tokenizer that the map was made with"
        )
    return ids
