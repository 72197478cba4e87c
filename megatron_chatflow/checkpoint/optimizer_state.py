"""How megatron-core's optimizers lay out a checkpoint, and how one layout is read into another.

The moments have the same names in all three. What differs is where the float32 parameters are, and
where the groups and the step count are:

FP32Optimizer
    float32 parameters: the weights themselves
    groups and step: ``param_groups``, ``state.common_step``
Float16OptimizerWithFloat16Params
    float32 parameters: ``optimizer.state.fp32_param.*``
    groups and step: ``optimizer.param_groups``, ``optimizer.state.common_step``
DistributedOptimizer
    float32 parameters: ``optimizer.state.param.*``
    groups and step: ``optimizer.param_groups``, with the step in each group
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_chatflow.errors import CheckpointError

_MOMENTS = ("optimizer.state.exp_avg.", "optimizer.state.momentum_buffer.")
"""Before the name of a weight: the first moment of Adam, the momentum of SGD."""


class OptimizerLayout(Enum):
    """A form by the prefix that its float32 parameters have before the name of the weight."""

    FP32 = ""
    HALF = "optimizer.state.fp32_param."
    DISTRIBUTED = "optimizer.state.param."


def layout_of(optimizer: MegatronOptimizer) -> OptimizerLayout:
    """Return the layout that an optimizer reads and writes.

    `optimizer` is one part of a ChainedOptimizer.
    """
    if isinstance(optimizer, DistributedOptimizer):
        return OptimizerLayout.DISTRIBUTED
    return OptimizerLayout.FP32 if isinstance(optimizer, FP32Optimizer) else OptimizerLayout.HALF


def layout_in(saved: dict[str, Any]) -> OptimizerLayout:
    """The form of the ``optimizer`` part of a checkpoint's common state."""
    if "param_state_sharding_type" in saved:
        return OptimizerLayout.DISTRIBUTED
    return OptimizerLayout.HALF if "optimizer" in saved else OptimizerLayout.FP32


def ask_for(
    weights: dict[str, Any], state: dict[str, Any], have: OptimizerLayout, want: OptimizerLayout
) -> None:
    """Rename the float32 parameters that an optimizer is about to load.

    The optimizer has the layout `want`; the new names are those of a checkpoint of layout `have`.

    `weights` and `state` are the sharded state dicts of the model and the optimizer, changed in
    place. An FP32Optimizer's parameters are the model's.
    """
    if have == want:
        return
    if want != OptimizerLayout.FP32:
        apply_prefix_mapping(state, {want.value: have.value})
        return
    keys = [entry.key for entry in nested_values(state) if isinstance(entry, ShardedBase)]
    trained = {key.removeprefix(m) for key in keys for m in _MOMENTS if key.startswith(m)}
    for entry in nested_values(weights):
        if isinstance(entry, ShardedBase) and entry.key in trained:
            entry.key = have.value + entry.key


def initialize_state(optimizer: Any) -> None:
    """Give an optimizer that has made no step the state from which its first step starts.

    torch's optimizers make it in the first step. A run whose iterations were all skipped so far has
    none, and its checkpoint could not be loaded.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner.state:
            continue
        part.init_state_fn(inner, part.config)
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state["step"] = torch.tensor(0.0)


def hand_over(loaded: dict[str, Any], optimizer: MegatronOptimizer, have: OptimizerLayout) -> None:
    """Put the groups and the step of a checkpoint where `optimizer` looks for them.

    The checkpoint has the layout `have`; `loaded` is changed in place.
    """
    want = layout_of(optimizer)
    if have == want:
        inner = loaded if have == OptimizerLayout.FP32 else loaded["optimizer"]
        is_torch = isinstance(optimizer.optimizer, torch.optim.Adam)
        if is_torch and have != OptimizerLayout.DISTRIBUTED:
            # megatron-core does not write a step of 0.
            inner["state"].setdefault("common_step", torch.tensor(0.0))
        return
    source, target = (
        loaded if form == OptimizerLayout.FP32 else loaded.setdefault("optimizer", {})
        for form in (have, want)
    )
    # What an optimizer without distribution loads has the numbers of that optimizer's parameters,
    # in the order of its groups.
    numbers = [group.get("params") for group in target.get("param_groups", [])]
    groups, common = source.pop("param_groups"), source.get("state", {}).pop("common_step", None)
    steps = {int(group["step"]) for group in groups if "step" in group}
    if common is not None:
        steps.add(int(common))
    elif not steps and "betas" in groups[0]:
        steps.add(0)
    groups = [
        {key: value for key, value in group.items() if key not in ("step", "params")}
        for group in groups
    ]
    with_each_parameter = isinstance(
        optimizer.optimizer, torch.optim.Adam
    )  # Transformer Engine's and apex's have the step in the group
    if len(steps) > 1:
        raise CheckpointError(
            f"the optimizer's groups have made {sorted(steps)} steps, not one number"
        )
    if steps and (
        want == OptimizerLayout.DISTRIBUTED or not with_each_parameter
    ):  # SGD counts no steps
        groups = [group | {"step": max(steps)} for group in groups]
    if want != OptimizerLayout.DISTRIBUTED:
        groups = [group | {"params": own} for group, own in zip(groups, numbers, strict=True)]
        if with_each_parameter:
            target["state"]["common_step"] = torch.tensor(float(max(steps)))
    target["param_groups"] = groups
