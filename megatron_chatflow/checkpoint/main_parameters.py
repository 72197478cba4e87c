"""The float32 main parameters in a checkpoint: saved at the right offsets, equal to the weights.

In bfloat16, or with --use-distributed-optimizer, the optimizer has float32 copies of the weights.
A step changes them and rounds them to the weights. A checkpoint holds both, so one verifies the
other.

Checkpoints use megatron-core's `fully_reshardable` format: the only one that any tensor, pipeline
and data-parallel size can load and that is not deprecated (`dp_reshardable` depends on the buckets,
`fully_sharded_model_space` is deprecated). Its writer in megatron-core 0.16.1 is wrong for a buffer
of several buckets: it gathers them without the padding at their ends, then slices the parameters by
offsets that include it. Main parameters and moments after the first padded bucket are shifted.
The reader is right, so `packed_offsets` changes the writer alone, and valid older checkpoints
still load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    is_main_replica,
)
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_chatflow.checkpoint.optimizer_state import OptimizerLayout
from megatron_chatflow.checkpoint.tensor_reader import CheckpointReader
from megatron_chatflow.errors import CheckpointError
from megatron_chatflow.model.init import iterate_shards

FP8_WEIGHTS = "fp8_weights"
"""Key in a checkpoint's content metadata: whether weights were kept in FP8 (--fp8-param-gather)."""

_PREFIXES = tuple(form.value for form in OptimizerLayout if form != OptimizerLayout.FP32)


@contextmanager
def packed_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, megatron-core sees each parameter's offset in the gathered buffer, without padding.

    This is the private hook into `sharded_param_state_fully_reshardable`, which reads the offsets
    from `param_index_map` and nothing else from there. To be removed with an engine that needs it
    no longer (tests/checkpoint/test_main_parameters.py fails then).
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [b for part in parts if isinstance(part, DistributedOptimizer) for b in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        shifts, unpadded = [], 0
        for bucket in buffer.buckets:
            shifts.append(bucket.offset - unpadded)
            unpadded += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, padded, strict=True):
            buffer.param_index_map = offsets


def has_fp8_weights(model: list[torch.nn.Module]) -> bool:
    """Whether weights of `model` are kept in FP8."""
    return any(is_float8tensor(parameter) for chunk in model for parameter in chunk.parameters())


@torch.no_grad()
def find_differences(weights: dict[str, Any], optimizer: dict[str, Any]) -> list[str]:
    """Return the names of all weights that are not their main parameters, rounded.

    Called by every rank. Each compares what it is about to write, and all get the same answer.

    Args:
        weights: sharded state dicts of the model's chunks.
        optimizer: sharded state dict of the optimizer.
    """
    chunks = {(chunk.key, chunk.global_offset): chunk for chunk in iterate_shards(weights)}
    different = set()
    for main in iterate_shards(optimizer):
        name = next((main.key.removeprefix(p) for p in _PREFIXES if main.key.startswith(p)), None)
        if name is None or not is_main_replica(main.replica_id):
            continue
        weight, value = chunks[name, main.global_offset].data, main.data
        assert weight is not None and value is not None, "a state in memory has data"
        in_fp8 = is_float8tensor(weight)
        weight = dequantize_fp8_tensor(weight) if in_fp8 else weight
        if not _agree(value, weight.to(value.device), in_fp8=in_fp8):
            different.add(name)
    return _of_all_ranks(different)


@torch.no_grad()
def check_saved(reader: CheckpointReader) -> None:
    """Compare all main parameters of a checkpoint with its weights.

    Called by every rank; the ranks share the work, a layer's tensor at a time. What is compared is
    what the files hold, in the types that they hold, whatever this run's optimizer reads of it.

    Raises:
        ConfigError: they differ, so the optimizer's state does not belong to the weights.
    """
    saved = reader.tensors
    work = []
    for name in sorted(saved):
        main = next((prefix + name for prefix in _PREFIXES if prefix + name in saved), None)
        if main is not None:
            size = saved[name].size  # three dimensions: those of all layers, in one tensor
            rows = range(size[0]) if len(size) > 2 else [None]
            work += [(name, main, row) for row in rows]
    # Without --fp8-param-gather weights are exact; older checkpoints do not say whether it was on.
    may_be_fp8 = (reader.common().get("content_metadata") or {}).get(FP8_WEIGHTS, True)
    names = reader.metadata.state_dict_metadata
    different = set()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, main, row in work[rank::size]:
        weight, copy = reader.tensor(name, row), reader.tensor(main, row)
        in_fp8 = may_be_fp8 and _belongs_to_fp8_layer(name, names)
        if weight.shape != copy.shape or not _agree(copy, weight, in_fp8=in_fp8):
            different.add(name)
    if everywhere := _of_all_ranks(different):
        raise CheckpointError(
            f"{reader.folder}: the optimizer's float32 parameters are not the weights in "
            f"{describe(everywhere)}, so its state belongs to other weights (earlier versions and "
            "megatron-core shifted it under --use-distributed-optimizer); add --no-load-optim to "
            "resume with these weights and new optimizer state, or give --ckpt-step another"
        )


def describe(names: list[str]) -> str:
    """Name three of the tensors, and count the others."""
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _belongs_to_fp8_layer(name: str, saved: dict[str, Any]) -> bool:
    state = name.removesuffix("weight") + "_extra_state"
    return name.endswith("weight") and any(key.startswith(state) for key in saved)


def _agree(main: torch.Tensor, weight: torch.Tensor, *, in_fp8: bool) -> bool:
    """Whether `weight` is `main` rounded. NaN agrees with NaN."""
    rounded = main.to(weight.dtype)
    if torch.equal(rounded, weight):
        return True
    same = (rounded == weight) | (rounded.isnan() & weight.isnan())
    if weight.dtype == torch.bfloat16:
        # Transformer Engine's 16-bit remainders round ties away from zero, torch rounds to even.
        away = ((main.float().view(torch.int32) + 0x8000) >> 16).to(torch.int16)
        same |= away == weight.contiguous().view(torch.int16)
    if same.all():
        return True
    # E4M3 has three bits of mantissa: an element is off by at most 1/16 of itself.
    return in_fp8 and bool((weight.float() - main).norm() <= main.norm() / 8)


def _of_all_ranks(names: set[str]) -> list[str]:
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, names)
    return sorted(set().union(*everyone))
