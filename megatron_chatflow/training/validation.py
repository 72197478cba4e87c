"""Held-out loss of each domain over megatron-core's forward-only schedule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.model.forward import SUMS, reduce_sums, run_schedule


@torch.no_grad()
def evaluate_domain(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    domain: Any,
    number: int,
    num_domains: int,
    windows: int,
    micro_batch_size: int,
    shape: Mapping[str, int],
    device: torch.device,
    progress: Callable[[int], None] = lambda windows: None,
) -> np.ndarray:
    """Sums (loss, tokens, bytes) over the first `windows` held-out windows of one domain, the same
    on every rank.

    The windows are read in file order and dealt out to the data-parallel ranks; what is missing in
    the last micro-batches is filled with windows that carry no loss. `progress` is told how many
    windows have been begun.
    """
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    count = -(-windows // (micro_batch_size * dp))
    if len(model) > 1:
        count = (
            -(-count // parallel_state.get_pipeline_model_parallel_world_size())
            * parallel_state.get_pipeline_model_parallel_world_size()
        )

    def micro_batches() -> Iterator[dict[str, np.ndarray]]:
        for m in range(count):
            progress(min(windows, m * dp * micro_batch_size))
            wanted = (m * dp + rank) * micro_batch_size + np.arange(micro_batch_size)
            batch = domain.read_window(np.minimum(wanted, windows - 1))
            batch["loss_mask"] = batch["loss_mask"] * (wanted < windows)[:, None].astype(np.float32)
            batch["domain"] = np.full(micro_batch_size, number, np.int64)
            yield batch

    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    store = run_schedule(
        forward_step, model, micro_batches(), count, shape, device, forward_only=True
    )
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    return reduce_sums(store, num_domains, device)[number]


def evaluate_domains(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    domains: Mapping[str, Any],
    names: tuple[str, ...],
    most: int | None,
    micro_batch_size: int,
    shape: Mapping[str, int],
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda name, done, windows: None,
) -> np.ndarray:
    """Float64 [len(names), SUMS] of held-out sums; a domain without held-out windows has zeros.
    `most`: windows of each domain at most.

    `progress` is told a name, how many of its windows have been begun, and how many there are.
    """
    sums = np.zeros((len(names), SUMS))
    for i, name in enumerate(names):
        if name in domains and domains[name].num_samples:
            windows = (
                domains[name].num_samples if most is None else min(most, domains[name].num_samples)
            )
            where = (i, len(names), windows, micro_batch_size, shape, device)
            sums[i] = evaluate_domain(
                forward_step,
                model,
                domains[name],
                *where,
                functools.partial(_tell, progress, name, windows),
            )
    return sums


def _tell(progress: Callable[[str, int, int], None], name: str, windows: int, done: int) -> None:
    progress(name, done, windows)
