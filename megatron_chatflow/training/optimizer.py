"""megatron-core's optimizer and its learning-rate schedule from settings."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config

from megatron_chatflow.config import ResolvedConfig, Schedule
from megatron_chatflow.distributed import cuda_shim


def build_optimizer(config: ResolvedConfig, model: list[MegatronModule]) -> ChainedOptimizer:
    """Build the optimizer over the model chunks of this rank.

    Also sets how megatron-core's schedules scale, reduce and overlap gradients.
    """
    o, training = config.optimizer, config.training
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=o.optimizer,
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.adam_beta1,
            adam_beta2=o.adam_beta2,
            adam_eps=o.adam_eps,
            sgd_momentum=o.sgd_momentum,
            clip_grad=o.clip_grad,
            bf16=training.bf16,
            params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
            fp8_recipe=config.precision.fp8_recipe if config.precision.fp8_param_gather else None,
        ),
        model,
    )
    # on CUDA megatron-core takes Transformer Engine's fused AdamW; on a CPU it takes torch's, whose
    # fused form must be asked for
    if cuda_shim.is_needed():
        for group in optimizer.param_groups:
            group["fused"] = True
    if o.optimizer == "sgd":
        for part in optimizer.chained_optimizers:
            part.init_state_fn = _start_momentum
    core = get_model_config(model[0])
    core.grad_scale_func = optimizer.scale_loss
    core.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        core.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
        core.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in model])
    if config.parallel.overlap_param_gather:
        core.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])
    return optimizer


def _start_momentum(optimizer: torch.optim.SGD, config: OptimizerConfig | None = None) -> None:
    """Give every parameter the state that a checkpoint is read into.

    megatron-core does so for Adam only.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.data)


def _one_or_all(functions: list[Any]) -> Any:
    """Return one function, or the list that megatron-core's interleaved schedule takes."""
    return functions[0] if len(functions) == 1 else functions


def build_scheduler(
    config: ResolvedConfig, schedule: Schedule, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Build the schedule of learning rate and weight decay over the samples trained on.

    Checkpoint and command were compared before (`resume_settings`), so `config` and `schedule` are
    in effect, and megatron-core's own comparison, which leaves out some of them, is not used.
    """
    o = config.optimizer
    start_decay = end_decay = o.weight_decay
    if o.weight_decay_incr_style != "constant":
        assert o.start_weight_decay is not None and o.end_weight_decay is not None
        start_decay, end_decay = o.start_weight_decay, o.end_weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=o.lr_warmup_init,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=o.lr_decay_style,
        start_wd=start_decay,
        end_wd=end_decay,
        wd_incr_steps=schedule.total,
        wd_incr_style=o.weight_decay_incr_style,
        wsd_decay_steps=schedule.wsd,
        lr_wsd_decay_style=o.lr_wsd_decay_style,
    )
