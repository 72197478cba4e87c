"""Whether a checkpoint's tensors are those of a model, by the names and shapes in `.metadata`.

That is all that is known of a checkpoint that does not record its settings.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_chatflow.checkpoint.ema import PREFIX
from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
from megatron_chatflow.errors import CheckpointError
from megatron_chatflow.model.init import iterate_shards

EMBEDDING = "embedding.word_embeddings.weight"
WHAT_TO_DO = "give the settings of the model that it was saved with"


def check_weights(reader: CheckpointReader, wanted: dict[str, Any]) -> None:
    """Compare the weights that the ranks ask for with those that the checkpoint has.

    Called by every rank, before anything is read.

    Raises ConfigError, on every rank, with all names that differ.
    """
    here: dict[str, list[int] | None] = {}
    for tensor in iterate_shards(wanted):
        free = tensor.allow_shape_mismatch
        here[tensor.key] = None if free else list(tensor.global_shape)
    everywhere = [here] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    shapes = {name: shape for one in everywhere for name, shape in one.items()}
    saved = {name: list(entry.size) for name, entry in reader.tensors.items()}
    differ = []
    for name, shape in shapes.items():
        size = "" if shape is None else f"{shape} "
        if name not in saved:
            differ.append(f"{name} is {size}here and not in the checkpoint")
        elif shape is not None and saved[name] != shape:
            differ.append(f"{name} is {size}here and {saved[name]} in the checkpoint")
    differ += [
        f"{name} is {saved[name]} in the checkpoint and not here"
        for name in sorted(saved.keys() - shapes.keys())
        if not name.startswith(PREFIX) and "optimizer." not in name
    ]
    if differ:
        message = f"{reader.folder} does not fit this model: {', '.join(differ)}; {WHAT_TO_DO}"
        raise CheckpointError(message)


def check_vocabulary(reader: CheckpointReader, vocab_size: int) -> None:
    """Compare a vocabulary with the rows of the checkpoint's embedding.

    The embedding may have more rows, as padding. Raises ConfigError.
    """
    entry = reader.tensors.get(EMBEDDING)
    if entry is not None and entry.size[0] < vocab_size:
        raise CheckpointError(
            f"vocab_size is {vocab_size} here, and {reader.folder} has rows for {entry.size[0]} "
            "tokens; give the checkpoint's tokenizer or --vocab-size, or convert its weights for "
            "the new one"
        )


def check_optimizer_kind(reader: CheckpointReader, optimizer: str) -> None:
    """Compare an optimizer with the state in the checkpoint. Raises ConfigError."""
    states = {name.split(".")[2] for name in reader.tensors if name.startswith("optimizer.state.")}
    saved = "adam" if "exp_avg" in states else "sgd"
    if saved != optimizer:
        raise CheckpointError(
            f"optimizer is {optimizer} here and {saved} in the checkpoint {reader.folder}; "
            f"give the "
            "checkpoint's, or --no-load-optim to start without its optimizer state"
        )
