"""Whether the data-parallel replicas of the weights are equal and finite.

Nothing else compares them. With the distributed optimizer a step gathers every weight from the rank
that owns it, so what changed elsewhere is overwritten, and what changed at its owner becomes that
of all; without it the replicas make the same steps from different weights and stay different.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.distributed.launch import node_name
from megatron_chatflow.errors import RunError
from megatron_chatflow.training.callbacks import Callback, IterationResult
from megatron_chatflow.training.train_state import TrainState

_MOST = 4
"""Weights, and differences, that a message names."""


class ReplicaError(RunError):
    """Weights that must be the same on several ranks are not, or are not finite."""


class ReplicaCheckCallback(Callback):
    """Compares the replicas every --check-weight-hash-across-dp-replicas-interval iterations."""

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Compare if it is due.

        Raises:
            ReplicaError: on every rank.
        """
        interval = state.config.training.check_weight_hash_across_dp_replicas_interval
        if interval and state.iteration % interval == 0:
            state_dict.gather_weights(state.model)
            check_replicas(state.model, state.iteration)


def check_replicas(model: list[MegatronModule], iteration: int) -> None:
    """Check that this rank's weights are finite and equal to those of its data-parallel group.

    Compares hashes, as megatron-core's `check_param_hashes_across_dp_replicas` does. Called by
    every rank, with complete weights (`state_dict.gather_weights`).

    Raises:
        ReplicaError: on every rank; names the ranks and the weights.
    """
    group: Any = parallel_state.get_data_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    weights = {
        name if len(model) == 1 else f"{name} of model chunk {i}": parameter.data
        for i, chunk in enumerate(model)
        for name, parameter in chunk.named_parameters()
    }
    bad = [name for name, weight in weights.items() if not torch.isfinite(weight.float()).all()]
    here = f"rank {dist.get_rank()} on {node_name()}"
    found = [f"{here} has weights that are not finite: {_named(bad)}"] if bad else []
    own = {name: _digest(weight) for name, weight in weights.items()}
    first = [own]
    dist.broadcast_object_list(first, src=ranks[0], group=group)
    if other := [name for name in own if own[name] != first[0][name]]:
        found.append(f"{here} has other weights than rank {ranks[0]}: {_named(other)}")
    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    messages = [message for messages in everywhere for message in messages]
    if messages:
        more = len(messages) - _MOST
        raise ReplicaError(
            f"after iteration {iteration} the data-parallel replicas differ or are not finite: "
            + "; ".join(messages[:_MOST])
            + (f"; and {more} more" if more > 0 else "")
            + "; a device or its memory may be broken: check that node, and resume from the "
            "last checkpoint"
        )


def _digest(weight: torch.Tensor) -> bytes:
    values = weight.detach().to("cpu").float().contiguous()
    return hashlib.sha1(values.numpy().data).digest()


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
