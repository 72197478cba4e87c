"""The optimizer's step, taken only when it can be."""

from __future__ import annotations

import math

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


@torch.no_grad()
def update(optimizer: ChainedOptimizer, *, check_finite: bool) -> float:
    """Clip the gradients and step, as `optimizer.step()` does; nothing is changed where
    `check_finite` is set and the norm is not finite.

    Returns the global norm of the gradients before clipping, the same on every rank.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if check_finite and not math.isfinite(norm):
        return norm
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    optimizer.step_with_ready_grads()
    return norm
