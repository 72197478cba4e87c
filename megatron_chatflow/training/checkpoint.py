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

from megatron_chatflow.training.run_directory import POINTER, iteration_folder, write_atomically


def _metadata() -> dict[str, Any]:
    """Optimizer state that any tensor, pipeline and data-parallel size can load. A new dictionary each time: megatron-core puts groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _unwrap(chunk: MegatronModule) -> MegatronModule:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_state(model: list[MegatronModule], optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i, chunk in enumerate(model):
        state["model" if len(model) == 1 else f"model{i}"] = _unwrap(chunk).sharded_state_dict(metadata=_metadata())
    if optimizer is not None:
        # megatron-core finds a parameter's shard by walking the model part of the very same dictionary.
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_metadata())
    return state


def save(run: Path, iteration: int, model: list[MegatronModule], optimizer: MegatronOptimizer | None, state: dict[str, Any]) -> Path:
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
    dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False), str(partial), content_metadata=_metadata())
    torch.distributed.barrier()
    if first:
        write_atomically(partial / "state.json", json.dumps(state, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(partial, folder)
        write_atomically(run / POINTER, f"{iteration}\n")
    torch.distributed.barrier()
    return folder


def load(folder: Path, model: list[MegatronModule], optimizer: MegatronOptimizer | None) -> None:
    """Load weights, and the optimizer's state where an optimizer is given, from a checkpoint of any layout."""
    for part in getattr(optimizer, "chained_optimizers", []):
        # Without apex or Transformer Engine the distributed optimizer asserts that it has stepped; what the step leaves is overwritten below.
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
    wanted = _sharded_state(model, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(wanted, str(folder))
    for i, chunk in enumerate(model):
        _unwrap(chunk).load_state_dict(loaded["model" if len(model) == 1 else f"model{i}"])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])


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
