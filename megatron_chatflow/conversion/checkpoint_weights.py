"""The weights of a run as megatron-core's tensors, one by one.

Of one checkpoint, of the mean of several, or of the running mean.
"""

from __future__ import annotations

import torch

from megatron_chatflow.checkpoint import integrity
from megatron_chatflow.checkpoint.averaging import mean
from megatron_chatflow.checkpoint.ema import PREFIX
from megatron_chatflow.checkpoint.safe_unpickle import missing_shard
from megatron_chatflow.checkpoint.selection import ChosenWeights
from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
from megatron_chatflow.conversion.torch_dist import Contents, Piece
from megatron_chatflow.conversion.weight_mapping import WORD_TABLES
from megatron_chatflow.errors import ConfigError


def check_files(chosen: ChosenWeights) -> None:
    """Read every file of every checkpoint.

    Raises ConfigError for one that is damaged, or whose pickles hold what does not belong there.
    """
    for checkpoint in chosen.folders:
        wrong = integrity.damage(checkpoint, lambda name, size: True) or missing_shard(checkpoint)
        if wrong:
            raise ConfigError(
                f"{checkpoint} is damaged: {wrong}; convert another one with --ckpt-step"
            )
        CheckpointReader(checkpoint)


class SavedWeights:
    """Reads the weights one tensor at a time.

    The mean of several is that of `load_mean`, bit for bit; the running mean is rounded to the
    weights' type.
    """

    def __init__(self, chosen: ChosenWeights, contents: Contents, vocab_size: int) -> None:
        """Find all tensors of `contents` in every checkpoint, in the shapes of config.yaml.

        Needs a process group of one.

        Args:
            chosen: checkpoints that `check_files` has passed.
            contents: see `describe`.
            vocab_size: rows of the vocabulary without padding; the tables of words are cut to it.

        Raises:
            ConfigError: a tensor is missing or has another shape.
        """
        self._readers = [CheckpointReader(folder) for folder in chosen.folders]
        self._prefix = PREFIX if chosen.use_ema else ""
        self._vocab_size = vocab_size
        for folder, reader in zip(chosen.folders, self._readers, strict=True):
            for key, wanted in contents.shapes.items():
                for name in dict.fromkeys((key, self._prefix + key)):
                    if wrong := _misfit(
                        reader, name, wanted, vocab_size if key in WORD_TABLES else None
                    ):
                        raise ConfigError(f"{folder}{wrong}; it is of another model")
        stored = self._readers[-1].tensors
        self.dtypes = {key: stored[key].properties.dtype for key in contents.shapes}

    def read(self, piece: Piece) -> torch.Tensor:
        """A tensor without the padding of the vocabulary."""
        rows = self._vocab_size if piece.key in WORD_TABLES else None
        parts = (
            _piece(reader, self._prefix + piece.key, piece.layer)[:rows] for reader in self._readers
        )
        tensor = mean(parts) if len(self._readers) > 1 else next(parts)
        return tensor.to(self.dtypes[piece.key])


def _piece(reader: CheckpointReader, key: str, layer: int | None) -> torch.Tensor:
    return reader.tensor(key) if layer is None else reader.tensor(key, layer)[0]


def _misfit(
    reader: CheckpointReader, name: str, wanted: tuple[int, ...], vocab_size: int | None
) -> str | None:
    """Return what is wrong with a tensor of a checkpoint.

    `vocab_size` is the least number of rows of a word table.
    """
    if name not in reader.tensors:
        return f" has no {name}"
    found = tuple(reader.tensors[name].size)
    fits = (
        found == wanted
        if vocab_size is None
        else found[0] >= vocab_size and found[1:] == wanted[1:]
    )
    return (
        None if fits else f": {name} is {list(found)} and should be {list(wanted)} by config.yaml"
    )
