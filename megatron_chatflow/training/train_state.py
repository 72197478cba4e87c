"""A run between two iterations, and how it is built: model, optimizer, schedule, checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.checkpoint.ema import WeightAverage
from megatron_chatflow.checkpoint.run_directory import read_state
from megatron_chatflow.config import ResolvedConfig, Schedule
from megatron_chatflow.curriculum import BlendPlan
from megatron_chatflow.data import BlendedDataset
from megatron_chatflow.distributed import process_groups
from megatron_chatflow.distributed.bf16_matmul import uses_float32
from megatron_chatflow.distributed.kernels import describe_cpu
from megatron_chatflow.distributed.launch import Launch
from megatron_chatflow.model.forward import ScheduleShape, make_forward_step, schedule_shape
from megatron_chatflow.model.gpt import build_model
from megatron_chatflow.model.spec import choose_transformer_impl
from megatron_chatflow.planner.parameters import count_parameters
from megatron_chatflow.training.batch_schedule import Batches
from megatron_chatflow.training.data_setup import Inputs
from megatron_chatflow.training.lr_check import late_stage_note
from megatron_chatflow.training.new_token_phase import NewRows
from megatron_chatflow.training.optimizer import build_optimizer, build_scheduler
from megatron_chatflow.training.resume_point import ResumePoint, RunForecast
from megatron_chatflow.training.resume_settings import check_optimizer_group, saved_settings

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What the loop advances and callbacks read. The same on every rank, but for the tensors."""

    config: ResolvedConfig
    schedule: Schedule
    launch: Launch
    inputs: Inputs
    blend: BlendedDataset
    forecast: RunForecast
    batches: tuple[Batches, ...]
    device: torch.device
    transformer_impl: str
    model: list[MegatronModule]
    """The model chunks of this rank."""
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    forward_step: Callable[..., Any]
    shape: ScheduleShape
    """Shape of the activations that the pipeline schedule sends."""
    iteration: int
    """Iterations done."""
    consumed: int
    """Samples read."""
    average: WeightAverage | None
    """The running mean of the weights (--ema-decay)."""
    new_rows: NewRows | None
    """The rows that are trained alone at first (--train-new-rows-samples)."""
    only_new_rows: bool
    """Whether the last iteration trained these alone."""
    validated: bool
    """Whether the validation due after the last iteration, or before the first, was made."""
    resumed_from: Path | None
    """The checkpoint that the run continues; None for a new run."""
    initial_weights: Path | None = None
    """The checkpoint whose weights a new run started with (--finetune)."""
    exit_reason: str | None = None
    """Why to end before the last iteration: a signal's name or a setting. A callback may set it,
    on every rank alike."""
    baseline_losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Held-out losses before the first iteration, by name."""
    held_out_losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Those of the last validation; empty if it was interrupted."""

    @property
    def plan(self) -> BlendPlan:
        """Which sample of which domain is read when."""
        return self.blend.plan

    @property
    def held_out_names(self) -> tuple[str, ...]:
        """What is validated on: the plan's domains, then the named validation sets."""
        return (*self.plan.domain_names, *self.inputs.curriculum.validation)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes and prints."""
        return self.launch.rank == 0


def build_train_state(
    launch: Launch, inputs: Inputs, start: ResumePoint, forecast: RunForecast
) -> TrainState:
    """Build model and optimizer over the process groups, and load the checkpoint if there is one.

    Called by every rank.
    """
    config = start.config
    impl, reason = choose_transformer_impl(config)
    if reason:
        logger.info(reason)
    device = process_groups.device(launch.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // max(1, launch.world_size)))
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    init_num_microbatches_calculator(
        launch.rank,
        config.training.rampup_batch_size,
        config.training.global_batch_size,
        config.training.micro_batch_size,
        process_groups.data_parallel()[1],
    )
    model = build_model(config, inputs.vocab_size, impl)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, start.schedule, optimizer)
    logger.info(_describe(config, launch, inputs.vocab_size, impl, device))
    if note := late_stage_note(config, start.blend.plan, forecast.total):
        logger.info(note)
    average = WeightAverage(model, config.training.ema_decay) if config.training.ema_decay else None
    if start.checkpoint is not None:
        average = _load_checkpoint(start, inputs, model, optimizer, scheduler, average)
    saved = start.state
    return TrainState(
        config=config,
        schedule=start.schedule,
        launch=launch,
        inputs=inputs,
        blend=start.blend,
        forecast=forecast,
        batches=start.batches,
        device=device,
        transformer_impl=impl,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        forward_step=make_forward_step(
            len(start.blend.plan.domain_names),
            inputs.token_bytes,
            impl == "transformer_engine",
            device,
        ),
        shape=schedule_shape(
            config.data.seq_length, config.training.micro_batch_size, impl == "transformer_engine"
        ),
        iteration=start.iteration,
        consumed=start.consumed,
        average=average,
        new_rows=NewRows(model, start.new_rows) if len(start.new_rows) else None,
        only_new_rows=bool(saved and saved.get("only_new_rows")),
        validated=bool(saved and saved.get("validated", True)),
        resumed_from=start.checkpoint if saved is not None else None,
        initial_weights=start.checkpoint if saved is None else None,
    )


def _describe(
    config: ResolvedConfig, launch: Launch, vocab_size: int, impl: str, device: torch.device
) -> str:
    """Return the line on the size of the model and where it runs."""
    processes = (
        f"{launch.world_size} process{'es' if launch.world_size > 1 else ''} ({launch.launcher})"
    )
    cpu_note = f" ({describe_cpu(uses_float32())})" if device.type == "cpu" else ""
    layout = (
        f"TP {config.parallel.tensor_model_parallel_size}, PP "
        f"{config.parallel.pipeline_model_parallel_size}, DP {process_groups.data_parallel()[1]}"
    )
    return (
        f"{count_parameters(config, vocab_size):,} parameters; {processes}, "
        f"{layout}; {impl} layers on {device.type}{cpu_note}"
    )


def _load_checkpoint(
    start: ResumePoint,
    inputs: Inputs,
    model: list[MegatronModule],
    optimizer: ChainedOptimizer,
    scheduler: OptimizerParamScheduler,
    average: WeightAverage | None,
) -> WeightAverage | None:
    """Load what the checkpoint has for this run, in place; returns the running mean to use.

    A run that is resumed takes everything, one that is finetuned the weights.
    """
    config, checkpoint, state = start.config, start.checkpoint, start.state
    assert checkpoint is not None
    with_optimizer = (
        state is not None and state["optimizer"] and not config.checkpoint.no_load_optim
    )
    with_average = average is not None and state is not None and state.get("ema_decay") is not None
    recorded = saved_settings(checkpoint, state or read_state(checkpoint))
    state_dict.check_unrecorded(
        checkpoint,
        None if "vocab_size" in recorded else inputs.vocab_size,
        config.optimizer.optimizer if with_optimizer and "optimizer" not in recorded else None,
    )
    group = state_dict.load(
        checkpoint,
        model,
        optimizer if with_optimizer else None,
        average if with_average else None,
        verified=True,
    )
    if (
        state is not None
        and with_optimizer
        and "settings" not in state
        and (note := check_optimizer_group(group or {}, config))
    ):
        logger.info(note)
    if average is not None and not with_average:
        assert config.training.ema_decay is not None
        average = WeightAverage(model, config.training.ema_decay)
        if state is not None:
            logger.info(
                f"{checkpoint} has no mean of the weights (--ema-decay); it begins at the "
                "checkpoint's weights"
            )
    if not with_optimizer:
        optimizer.reload_model_params()
    if state is not None:
        scheduler.step(state["opt_param_scheduler"]["num_steps"])
    logger.info(
        f"loaded {checkpoint}"
        + ("" if with_optimizer else ", weights only")
        + (f"; resuming after iteration {start.iteration}" if state is not None else "")
    )
    return average
