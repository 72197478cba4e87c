"""Weights from Hugging Face to a run directory and back, as functions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_chatflow.errors import ConfigError
from megatron_chatflow.utils.files import disk_errors

Method = Literal["mean", "random", "mean_all"]
"""How the row of a new token is made: the mean of the rows of its pieces, random, or the mean of
all rows.
"""


def convert_from_hf(
    load: str | Path,
    save: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    new_rows: Method | None = None,
    new_input_rows: Method | None = None,
    new_output_rows: Method | None = None,
) -> Path:
    """Convert a Hugging Face folder of the LLaMA family into a run directory.

    The result is for any tensor and pipeline size. Tensors are converted one at a time, on the CPU,
    in the type that they have.

    Args:
        load: A folder with config.json, safetensors and a tokenizer.
        save: The run directory to make; must not exist, or be empty.
        tokenizer_folder: An extended tokenizer with its token_map.json, which defines the new rows;
            by default the model keeps its tokenizer.
        new_rows: How rows of new tokens are made in the embedding and in the output layer; "mean"
            by default.
        new_input_rows: The same for the embedding alone.
        new_output_rows: The same for the output layer alone.

    Returns:
        `save`.

    Raises:
        ChatflowError: What was given cannot be converted, or the disk cannot be written; there is
            no run directory then.
    """
    load, save = Path(load).expanduser(), Path(save).expanduser()
    methods = {"input": new_input_rows or new_rows, "output": new_output_rows or new_rows}
    with _exclusive(save):
        from megatron_chatflow.conversion import import_hf

        import_hf.convert(load, save, _folder(tokenizer_folder), methods)
    return save


def convert_to_hf(
    load: str | Path,
    save: str | Path,
    *,
    ckpt_step: int | None = None,
    average_checkpoints: int = 1,
    use_ema: bool = False,
    tokenizer_folder: str | Path | None = None,
) -> Path:
    """Convert weights of a run directory into a folder that transformers loads.

    Args:
        load: The run directory.
        save: The folder to make; must not exist, or be empty.
        ckpt_step: The iteration; the latest by default.
        average_checkpoints: Convert the mean of the weights of that many last checkpoints.
        use_ema: Convert the running mean of the weights (of a run with `ema_decay`).
        tokenizer_folder: Where the tokenizer's files come from; by default the run's tokenizer.

    Returns:
        `save`.

    Raises:
        ChatflowError: What was given cannot be converted, or the disk cannot be written; there is
            no folder then.
    """
    load, save = Path(load).expanduser(), Path(save).expanduser()
    with _exclusive(save):
        from megatron_chatflow.checkpoint.selection import choose_weights
        from megatron_chatflow.conversion import export_hf

        chosen = choose_weights(load, ckpt_step, average_checkpoints, use_ema)
        export_hf.convert(load, save, chosen, _folder(tokenizer_folder))
    return save


def _folder(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


@contextlib.contextmanager
def _exclusive(save: Path) -> Iterator[None]:
    """Inside, megatron-core is usable, and no other process writes `save`."""
    from megatron_chatflow.distributed.process_groups import install_engine

    install_engine()
    from megatron_chatflow.checkpoint.lease import Lease

    check_target(save)
    with disk_errors(save), Lease.next_to(save, "save-dir") as lease:
        lease.acquire()
        yield


def check_target(folder: Path) -> None:
    """Raise ConfigError where something exists that would be overwritten."""
    try:
        occupied = os.path.exists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise ConfigError(
            f"--save-dir {folder} cannot be read ({error.strerror}); give a new folder"
        ) from None
    if occupied:
        raise ConfigError(f"--save-dir {folder} is there already; give a new folder")
