"""Checkpoints: megatron-core's torch_dist shards and, beside them, what the run knows in plain JSON.

RUN/latest_checkpointed_iteration.txt   written last, atomically: what it names is complete
RUN/iter_0000100/                       shards of weights and optimizer, for any layout, and state.json
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.config import UsageError
from megatron_chatflow.training.average import WeightAverage, mean_instead
from megatron_chatflow.training.run_directory import POINTER, iteration_folder, read_state, write_atomically


def _metadata() -> dict[str, Any]:
    """Optimizer state that any tensor, pipeline and data-parallel size can load. A new dictionary each time: megatron-core puts groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _unwrap(chunk: MegatronModule) -> MegatronModule:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _weights(model: list[MegatronModule]) -> dict[str, Any]:
    """The sharded state dict of each chunk under the name that megatron-core looks for."""
    return {name: _unwrap(chunk).sharded_state_dict(metadata=_metadata()) for name, chunk in zip(_names(model), model, strict=True)}


def _names(model: list[MegatronModule]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def _sharded_state(
    model: list[MegatronModule], optimizer: MegatronOptimizer | None, average: WeightAverage | None, *, is_loading: bool
) -> dict[str, Any]:
    weights = _weights(model)
    state = dict(weights)
    if optimizer is not None:
        # megatron-core finds a parameter's shard by walking the model part of the very same dictionary.
        state["optimizer"] = optimizer.sharded_state_dict(dict(weights), is_loading=is_loading, metadata=_metadata())
    if average is not None:
        state |= {f"ema/{name}": average.sharded_state(entries) for name, entries in weights.items()}
    return state


def gather_weights(model: list[MegatronModule]) -> None:
    """Complete the weights of every rank. Under --overlap-param-gather what the optimizer changed is otherwise gathered in the next forward pass."""
    for chunk in model:
        if getattr(chunk, "ddp_config", None) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def save(
    run: Path,
    iteration: int,
    model: list[MegatronModule],
    optimizer: MegatronOptimizer | None,
    state: dict[str, Any],
    average: WeightAverage | None = None,
) -> Path:
    """Write ``RUN/iter_<iteration>`` and then point to it; called by every rank. `state` is plain data for state.json.

    A folder under another name is filled first and renamed when it is complete on every rank, so a killed save leaves the
    previous checkpoint the latest. Returns the folder.
    """
    folder = iteration_folder(run, iteration)
    partial = folder.with_name(folder.name + ".partial")
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    gather_weights(model)
    dist_checkpointing.save(_sharded_state(model, optimizer, average, is_loading=False), str(partial), content_metadata=_metadata())
    torch.distributed.barrier()
    if first:
        write_atomically(partial / "state.json", json.dumps(state, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
        write_atomically(run / POINTER, f"{iteration}\n")
    torch.distributed.barrier()
    return folder


def load(folder: Path, model: list[MegatronModule], optimizer: MegatronOptimizer | None, average: WeightAverage | None = None) -> None:
    """Load weights, and where they are given the state of the optimizer and the weights' running mean, from a checkpoint of any layout."""
    for part in getattr(optimizer, "chained_optimizers", []):
        # Without apex or Transformer Engine the distributed optimizer asserts that it has stepped; what the step leaves is overwritten below.
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
    loaded = dist_checkpointing.load(_sharded_state(model, optimizer, average, is_loading=True), str(folder))
    _load_weights(model, loaded)
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])
    if average is not None:
        for name, entries in _weights(model).items():
            average.restore(entries, loaded[f"ema/{name}"])


def load_average(folder: Path, model: list[MegatronModule]) -> None:
    """Load the running mean of the weights (--ema-decay) of a checkpoint in place of its weights.

    Raises UsageError where the checkpoint has none.
    """
    if read_state(folder).get("ema_decay") is None:
        raise UsageError(f"{folder} holds no running mean of the weights; it was trained without --ema-decay, so load its weights")
    _load_weights(model, dist_checkpointing.load({name: mean_instead(entries) for name, entries in _weights(model).items()}, str(folder)))


def _load_weights(model: list[MegatronModule], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_names(model), model, strict=True):
        _unwrap(chunk).load_state_dict(loaded[name])


def _load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not any(isinstance(part, DistributedOptimizer) for part in parts):
        optimizer.load_state_dict(saved)
        return
    # torch's AdamW keeps a `step` beside the moments. megatron-core's reader of this form looks for it among the saved tensors, where it is not,
    # and gives every parameter the same tensor, which each of them then counts up; so it is set aside and handed out as copies.
    (part,) = parts
    parameters = saved.pop("param_state")
    part.load_state_dict(saved)
    steps = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items() if "step" in state}
    part.load_parameter_state_from_fully_reshardable(parameters)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()
