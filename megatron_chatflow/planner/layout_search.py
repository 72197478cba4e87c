"""Rank the layouts of a cluster that fit memory by predicted step time.

A layout is a choice of the settings in `SEARCHED`. Context parallelism is not among them: this
trainer has none. Every other setting, the global batch among them, is that of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.config import Config, resolve
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.planner.accelerators import Accelerator
from megatron_chatflow.planner.memory import GIB, RESERVE, stage_memory
from megatron_chatflow.planner.parameters import layout_of
from megatron_chatflow.planner.step_settings import step_settings_of
from megatron_chatflow.planner.step_time import DEFAULT_FACTOR, StepTime, predict_step

SEARCHED = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "micro_batch_size",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)
"""Settings that make a layout. Sequence parallelism is on with tensor parallelism: it costs nothing
and saves memory."""

_CLEARED = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
)
"""Settings that place layers by hand, for one pipeline size."""

_NO_RECOMPUTATION: Mapping[str, Any] = {name: None for name in SEARCHED if "recompute" in name}
_RECOMPUTATIONS: tuple[Mapping[str, Any], ...] = (
    _NO_RECOMPUTATION,
    {
        **_NO_RECOMPUTATION,
        "recompute_granularity": "selective",
        "recompute_modules": ["mlp"],
    },
    {
        **_NO_RECOMPUTATION,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
)
_LARGEST_MICRO_BATCH = 16


@dataclass(frozen=True)
class RankedLayout:
    """A layout that fits."""

    settings: Mapping[str, Any]
    """{setting: value} of those in `SEARCHED`."""
    data_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    """Model chunks of a stage; 1 without the interleaved schedule."""
    memory_gib: float
    """Of the fullest stage, on one GPU."""
    time: StepTime


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    layouts: list[RankedLayout]
    """The fastest first."""
    examined: int
    """Layouts that could start."""
    smallest_gib: float | None
    """The least memory that any of them needs, on one GPU; None where none could start."""
    refusal: str | None
    """Why the last layout that could not start could not."""


def search_layouts(
    config: Config,
    vocab_size: int,
    world_size: int,
    accelerator: Accelerator,
    gpu_memory_gib: float,
    *,
    factor: float = DEFAULT_FACTOR,
) -> SearchResult:
    """Return the layouts that fit, ranked.

    Args:
        config: settings as written; `global_batch_size` must be given.
        vocab_size: size before padding.
        world_size: GPUs of the cluster.
        accelerator: each of them.
        gpu_memory_gib: memory of one GPU in GiB, of which `RESERVE` is left free.
        factor: of `calibration_factor`.

    Raises:
        ConfigError: there is no global batch, or the accelerator lacks the precision.
    """
    if not config.training.global_batch_size:
        raise ConfigError(
            "global_batch_size: layouts are compared at one global batch, and none is given; "
            "give --global-batch-size N"
        )
    found, examined, smallest, refusal = [], 0, None, None
    available = gpu_memory_gib * (1 - RESERVE)
    for settings in _candidates(config, world_size, accelerator):
        try:
            resolved = resolve(config.replace(**settings), world_size)
        except ConfigError as error:
            refusal = str(error)
            continue
        examined += 1
        layout = layout_of(resolved, world_size)
        stages = (stage_memory(resolved, vocab_size, layout, i) for i in range(layout.pp))
        memory = max(stage.total for stage in stages) / GIB
        smallest = memory if smallest is None else min(smallest, memory)
        if memory > available:
            continue
        step = step_settings_of(resolved, vocab_size, world_size)
        time = predict_step(step, accelerator, factor)
        chosen = {name: settings[name] for name in SEARCHED}
        found.append(RankedLayout(chosen, layout.dp, layout.vpp, memory, time))
    found.sort(key=lambda layout: layout.time.seconds)
    return SearchResult(found, examined, smallest, refusal)


def _candidates(
    config: Config, world_size: int, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """Yield the settings of layouts whose sizes divide each other."""
    batch, layers = config.training.global_batch_size or 0, config.model.num_layers
    for tp in _powers_of_two(min(world_size, accelerator.nvlink_gpus)):
        for pp in range(1, layers + 1):
            if world_size % (tp * pp):
                continue
            replicas = world_size // (tp * pp)
            for mbs in _powers_of_two(min(_LARGEST_MICRO_BATCH, batch // replicas)):
                if batch % (mbs * replicas):
                    continue
                micro_batches = batch // (mbs * replicas)
                for split in _splits(layers, pp, micro_batches):
                    for recomputation in _RECOMPUTATIONS:
                        yield {
                            **dict.fromkeys(_CLEARED),
                            "tensor_model_parallel_size": tp,
                            "sequence_parallel": tp > 1,
                            "pipeline_model_parallel_size": pp,
                            "micro_batch_size": mbs,
                            **split,
                            **recomputation,
                        }


def _splits(layers: int, pp: int, micro_batches: int) -> Iterator[dict[str, Any]]:
    """Yield the ways to split the layers into stages and chunks.

    Embedding and output layer count as layers, or do not.
    """
    for counted in (False, True) if pp > 1 else (False,):
        total = layers + 2 * counted
        if total % pp:
            continue
        part = total // pp
        sizes: list[int | None] = [None]
        if pp > 1 and micro_batches % pp == 0:
            sizes += [size for size in range(1, part) if part % size == 0]
        for size in sizes:
            yield {
                "num_layers_per_virtual_pipeline_stage": size,
                "account_for_embedding_in_pipeline_split": counted,
                "account_for_loss_in_pipeline_split": counted,
            }


def _powers_of_two(largest: int) -> Iterator[int]:
    """Yield 1, 2, 4 and so on up to `largest`."""
    for exponent in range(largest.bit_length()):
        yield 1 << exponent
