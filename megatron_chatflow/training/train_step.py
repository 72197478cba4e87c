"""One optimizer step over one global batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.model.forward import ScheduleShape, reduce_sums, run_schedule
from megatron_chatflow.training.new_token_phase import NewRows
from megatron_chatflow.utils.seeding import seed_from


@dataclass(frozen=True)
class StepResult:
    """What one step gives, the same on every rank."""

    sums: np.ndarray
    """Float64 [domains, 3]: loss, tokens, bytes of each domain (`model.forward.SUMS`)."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    skipped: str | None = None
    """Why the weights are unchanged; None where the step was taken."""


def seed_iteration(seed: int, iteration: int) -> None:
    """Make dropout a function of (seed, iteration, position in the layout).

    Nothing random outlives an iteration, so a run that is resumed has the same dropout.
    """
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank()
    place = f"{seed}/{iteration}/{pipeline_rank}/{data_rank}"
    number = seed_from(place, num_bytes=4)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


def train_step(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    optimizer: ChainedOptimizer,
    micro_batches: Sequence[Mapping[str, np.ndarray]],
    shape: ScheduleShape,
    num_domains: int,
    device: torch.device,
    *,
    check_finite: bool,
    settle: Callable[[], None],
    only: NewRows | None = None,
) -> StepResult:
    """Forward, backward, reduce, clip, and take a step.

    Weights and optimizer are unchanged where no token of the batch has loss, whose gradient is
    zero, and with `check_finite` where a loss or the gradient norm is not finite.

    Args:
        forward_step: of `model.forward.make_forward_step`.
        model: this rank's model chunks.
        optimizer: over their parameters.
        micro_batches: this rank's part of the global batch.
        shape: as `model.forward.schedule_shape` gives it.
        num_domains: rows of the sums.
        device: of this rank.
        check_finite: whether a value that is not finite skips the step.
        settle: called before weights or optimizer change.
        only: the rows to train; None for all weights.
    """
    chunk: Any
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


@torch.no_grad()
def update(optimizer: ChainedOptimizer, *, check_finite: bool) -> float:
    """Clip the gradients and step, as `optimizer.step()` does.

    With `check_finite` nothing is changed where the norm is not finite.

    Returns:
        The global norm of the gradients before clipping, the same on every rank.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if check_finite and not math.isfinite(norm):
        return norm
    part: Any
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
    return norm
