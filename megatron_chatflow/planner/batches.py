"""Micro-batches, the pipeline's idle time, and the micro-batches in flight."""

from __future__ import annotations

from megatron_chatflow.config import DataConfig
from megatron_chatflow.planner.parameters import Layout


def micro_batches(config: DataConfig, layout: Layout) -> int:
    """Return the micro-batches of one rank in an iteration at the full global batch size."""
    t = config.training
    return t.global_batch_size // (t.micro_batch_size * layout.dp)


def bubble(layout: Layout, count: int) -> float:
    """Return the idle time of a pipeline stage over its computing time, with `count` micro-batches.

    It is (pp - 1) / (vpp x count) for stages of equal speed: Narayanan et al. 2021 (arXiv
    2104.04473), sections 2.2.1 and 2.2.2.
    """
    return (layout.pp - 1) / (layout.vpp * count)


def chunks_in_flight(layout: Layout, stage: int, count: int) -> int:
    """Return how many forward passes of a chunk await their backward pass on a stage, at most.

    `count` is the number of micro-batches. 1F1B holds pp - stage of them. The interleaved schedule
    of megatron-core (`get_pp_rank_microbatches`) runs 2 (pp - stage - 1) + (vpp - 1) pp forward
    passes ahead, and one more before the first backward pass: on the first stage that is the L (1 +
    (pp - 1) / (pp vpp)) layers of Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.3.
    """
    if layout.vpp == 1:
        return min(count, layout.pp - stage)
    return min(count * layout.vpp, 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1)
