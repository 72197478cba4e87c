"""One optimizer step over one global batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.model.forward import reduce_sums, run_schedule
from megatron_chatflow.training.new_token_phase import NewRows
from megatron_chatflow.training.optimizer_step import update
from megatron_chatflow.utils.seeding import seed_from


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind, the same on every rank."""

    sums: np.ndarray
    """Float64 [domains, 3]: loss, tokens, bytes of each domain (`model.forward.SUMS`)."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    skipped: str | None = None
    """Why the weights were left as they were; None where the step was taken."""


class NonFiniteError(RuntimeError):
    """Losses or gradient norms are NaN or infinite, or no token has loss, in more iterations in a
    row than are skipped.
    """


def seed_iteration(seed: int, iteration: int) -> None:
    """Make dropout a function of (seed, iteration, place in the layout): nothing random outlives an
    iteration, so resuming restores it.
    """
    place = f"{seed}/{iteration}/{parallel_state.get_pipeline_model_parallel_rank()}/{parallel_state.get_data_parallel_rank()}"
    number = seed_from(place, num_bytes=4)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def train_step(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    optimizer: MegatronOptimizer,
    micro_batches: list[Mapping[str, np.ndarray]],
    shape: Mapping[str, int],
    num_domains: int,
    device: torch.device,
    *,
    check_finite: bool,
    settle: Callable[[], None],
    only: NewRows | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, step; of the `only` rows where these are given. With
    `check_finite` a loss or a gradient norm that is not finite leaves weights and optimizer as they
    were, and so does in any case a batch without a token with loss, whose gradient is zero.
    `settle` is called before they change."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    store = run_schedule(
        forward_step, model, micro_batches, len(micro_batches), shape, device, forward_only=False
    )
    sums = reduce_sums(store, num_domains, device)
    if check_finite and not np.isfinite(sums).all():
        return StepResult(sums, math.nan, "the loss is not finite")
    if not sums[:, 1].any():
        return StepResult(sums, math.nan, "no token has loss")
    settle()
    with only.alone(optimizer) if only else contextlib.nullcontext():
        grad_norm = update(optimizer, check_finite=check_finite)
    return StepResult(
        sums,
        grad_norm,
        "the gradient norm is not finite"
        if check_finite and not math.isfinite(grad_norm)
        else None,
    )
