"""The training loop: read, step, notify the callbacks; and the lines that end a run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.data import BlendDataLoader
from megatron_chatflow.distributed.process_groups import data_parallel
from megatron_chatflow.model.forward import SUMS
from megatron_chatflow.training.callbacks import CallbackList, IterationResult
from megatron_chatflow.training.new_token_phase import forget_moments
from megatron_chatflow.training.nonfinite_check import SKIPPED_BY_SETTING
from megatron_chatflow.training.train_state import TrainState
from megatron_chatflow.training.train_step import StepResult, seed_iteration, train_step

EXIT_INTERVAL = "exit_interval"
"""`exit_reason` of a run that ends as planned, by --exit-interval."""

logger = logging.getLogger(__name__)


def fit(state: TrainState, callbacks: CallbackList) -> bool:
    """Train until the run is complete or has a reason to exit; called by every rank.

    Returns:
        Whether the run is done, and did not exit before its end.
    """
    rank, size = data_parallel()
    micro_batch_size = state.config.training.micro_batch_size
    loader = BlendDataLoader(
        state.blend,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )
    first = state.iteration
    try:
        update_num_microbatches(state.consumed)
        callbacks.on_fit_start(state)
        callbacks.before_first_iteration(state)
        while state.exit_reason is None and _next_batch_fits(state):
            result = _run_iteration(state, loader, callbacks)
            callbacks.on_step_end(state, result)
            callbacks.on_iteration_end(state)
            if state.exit_reason is None and _exit_is_due(state):
                state.exit_reason = EXIT_INTERVAL
            update_num_microbatches(state.consumed)
        callbacks.on_fit_end(state)
        for line in _closing_lines(state, trained=state.iteration > first):
            logger.info(line)
        return state.exit_reason in (None, EXIT_INTERVAL) or not _next_batch_fits(state)
    finally:
        loader.close()
        callbacks.close()


def _next_batch_fits(state: TrainState) -> bool:
    return state.consumed + get_current_global_batch_size() <= state.forecast.total


def _exit_is_due(state: TrainState) -> bool:
    interval = state.config.training.exit_interval
    return bool(interval) and state.iteration % interval == 0


def _run_iteration(
    state: TrainState, loader: BlendDataLoader, callbacks: CallbackList
) -> IterationResult:
    """Train on the next global batch, or skip it under --iterations-to-skip."""
    begin = time.perf_counter()
    start, batch = state.consumed, get_current_global_batch_size()
    learning_rate = get_canonical_lr_for_logging(state.optimizer.param_groups)
    if state.iteration + 1 in (state.config.training.iterations_to_skip or ()):
        nothing = np.zeros((len(state.plan.domain_names), SUMS))
        step = StepResult(nothing, math.nan, SKIPPED_BY_SETTING)
    else:
        step = _step(state, loader, callbacks, batch)
    state.scheduler.step(increment=batch)
    state.iteration, state.consumed = state.iteration + 1, start + batch
    seconds = time.perf_counter() - begin
    return IterationResult(start, start + batch, step, learning_rate, seconds)


def _step(
    state: TrainState, loader: BlendDataLoader, callbacks: CallbackList, batch: int
) -> StepResult:
    training = state.config.training
    micro_batches = loader.iteration(state.consumed, batch)
    assert len(micro_batches) == get_num_microbatches()
    seed_iteration(training.seed, state.iteration)
    only_new_rows = state.consumed < training.train_new_rows_samples
    if state.only_new_rows and not only_new_rows:
        callbacks.before_update(state)
        forget_moments(state.optimizer)
        logger.info(f" from sample {state.consumed} on all weights are trained")
    state.only_new_rows = only_new_rows
    result = train_step(
        state.forward_step,
        state.model,
        state.optimizer,
        micro_batches,
        state.shape,
        len(state.plan.domain_names),
        state.device,
        check_finite=training.check_for_nan_in_loss_and_grad,
        settle=lambda: callbacks.before_update(state),
        only=state.new_rows if only_new_rows else None,
    )
    if state.average is not None and not result.skipped:
        state_dict.gather_weights(state.model)
        state.average.update()
    return result


def _closing_lines(state: TrainState, *, trained: bool) -> Iterator[str]:
    """Yield what a run reports at its end. `trained`: whether it made any iteration."""
    save = state.config.checkpoint.save
    if state.exit_reason == EXIT_INTERVAL:
        yield (
            f"exiting at iteration {state.iteration} (exit_interval "
            f"{state.config.training.exit_interval}); resume with --load {save}"
        )
    elif state.exit_reason is not None and _next_batch_fits(state):
        kept = f"resume with --load {save}" if save else "nothing was saved (no --save)"
        yield f"exiting at iteration {state.iteration} ({state.exit_reason}); {kept}"
    elif state.exit_reason is None and not trained:
        yield _nothing_to_do(state)
    else:
        yield from _summary(state)


def _nothing_to_do(state: TrainState) -> str:
    where = (
        f"nothing to do: {state.consumed} of {state.forecast.total} samples are trained on, and "
        f"an iteration is {get_current_global_batch_size()}"
    )
    if state.forecast.ending:
        return (
            f"{where}; {state.forecast.ending}: raise its max_epochs, or lower its weights from "
            f"here on and add --amend-curriculum"
        )
    return f"{where}; raise --train-samples or --train-iters to continue"


def _summary(state: TrainState) -> Iterator[str]:
    if state.forecast.ending:
        yield (
            f"the run ends {state.plan.num_samples - state.consumed} samples before its planned "
            f"{state.plan.num_samples}: {state.forecast.ending}"
        )
    for name, values in state.held_out_losses.items():
        if name in state.baseline_losses:
            before, after = state.baseline_losses[name]["loss"], values["loss"]
            yield (
                f" held-out loss of {name}: {before:.3f} before, {after:.3f} after "
                f"{state.iteration} iterations ({after - before:+.3f})"
            )
    done = f"done: {state.iteration} iterations, {state.consumed} samples"
    if save := state.config.checkpoint.save:
        board = state.config.logging.tensorboard_dir or Path(save) / "tensorboard"
        yield f"{done}; checkpoint and metrics in {Path(save)}, TensorBoard log in {board}"
    else:
        yield f"{done}; nothing was saved (no --save)"
