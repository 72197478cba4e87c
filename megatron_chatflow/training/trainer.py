"""The loop: read, step, validate, save."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.checkpoint.saver import Saver
from megatron_chatflow.data import BlendDataLoader
from megatron_chatflow.distributed.process_groups import data_parallel
from megatron_chatflow.model.forward import SUMS, make_forward_step
from megatron_chatflow.training.batch_schedule import count_iterations
from megatron_chatflow.training.checkpoint_callback import Keeper
from megatron_chatflow.training.metrics_reporter import Reporter
from megatron_chatflow.training.new_token_phase import forget_moments
from megatron_chatflow.training.replica_check import check_replicas
from megatron_chatflow.training.setup import Run
from megatron_chatflow.training.signals import Stop
from megatron_chatflow.training.train_step import (
    NonFiniteError,
    StepResult,
    seed_iteration,
    train_step,
)
from megatron_chatflow.training.validation import evaluate_domains


def train(run: Run, stop: Stop, saver: Saver | None) -> bool:
    """Train to the end of the run, or until `stop` says so. Returns whether it is done, and not
    stopped before its end.

    Without `saver` nothing is saved.

    Raises:
        NonFiniteError: losses or gradients are not finite, or no token has loss, in more iterations
        in a row than are skipped; names the samples. ReplicaError: replicas of the weights differ,
        or are not finite. SaveError: the last checkpoint could not be written, or any with
        --exit-on-failed-save. LeaseLostError: the run directory is another run's by now.
        ConfigError, WriteError: the files that describe the run cannot be written.
    """
    config = run.config
    reporter = Reporter(run, count_iterations(run.batches, run.outlook.total), stop.lease)
    rank, size = data_parallel()
    loader = BlendDataLoader(
        run.blend,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )
    try:
        return _train(run, stop, reporter, loader, Keeper(run, reporter, saver))
    finally:
        loader.close()
        reporter.close()


def _train(
    run: Run, stop: Stop, reporter: Reporter, loader: BlendDataLoader, keeper: Keeper
) -> bool:
    config, total = run.config, run.outlook.total
    interval = config.validation.eval_interval
    update_num_microbatches(run.consumed)
    why = stop.agreed(run.device)
    baseline: dict[str, Any] = {}
    latest: dict[str, Any] = {}
    if interval and not why and not run.validated:
        latest, why = _validate(run, reporter, stop)
        baseline = latest if run.iteration == 0 else {}
    if not why and run.consumed + get_current_global_batch_size() > total:
        reporter.say(_nothing_to_do(run, get_current_global_batch_size()))
        return True
    failures = 0
    while not why and run.consumed + get_current_global_batch_size() <= total:
        failures = failures + 1 if _iterate(run, reporter, loader, keeper, failures) else 0
        why = stop.agreed(run.device)
        keeper.poll()
        every = config.training.check_weight_hash_across_dp_replicas_interval
        if every and run.iteration % every == 0:
            state_dict.gather_weights(run.model)
            check_replicas(run.model, run.iteration)
        run.validated = not (interval and run.iteration % interval == 0)
        if not why and not run.validated:
            latest, why = _validate(run, reporter, stop)
        leave = config.training.exit_interval and run.iteration % config.training.exit_interval == 0
        if not why and (
            leave
            or (
                config.checkpoint.save_interval
                and run.iteration % config.checkpoint.save_interval == 0
            )
        ):
            keeper.save()
        if leave and not why:
            keeper.finish()
            reporter.say(
                f"exiting at iteration {run.iteration} (exit_interval "
                f"{config.training.exit_interval}); resume with --load "
                f"{config.checkpoint.save}"
            )
            return True
        update_num_microbatches(run.consumed)
    if why and run.consumed + get_current_global_batch_size() <= total:
        keeper.finish()
        kept = (
            f"resume with --load {config.checkpoint.save}"
            if config.checkpoint.save
            else "nothing was saved (no --save)"
        )
        reporter.say(f"leaving at iteration {run.iteration} ({why}); {kept}")
        return False
    if interval and run.iteration % interval and not why:
        latest, why = _validate(run, reporter, stop)
    keeper.finish()
    _summary(run, reporter, baseline, latest)
    return True


def _nothing_to_do(run: Run, batch: int) -> str:
    where = (
        f"nothing to do: {run.consumed} of {run.outlook.total} samples are trained on, and an "
        f"iteration is {batch}"
    )
    if run.outlook.ending:
        return (
            f"{where}; {run.outlook.ending}: raise its max_epochs, or lower its weights from "
            f"here on and add --amend-curriculum"
        )
    return f"{where}; raise --train-samples or --train-iters to go on"


def _iterate(
    run: Run, reporter: Reporter, loader: BlendDataLoader, keeper: Keeper, failures: int
) -> bool:
    """One iteration; returns whether it could not be trained on. `failures`: how many before it, in
    a row, were so.
    """
    config, begin = run.config, time.perf_counter()
    batch = get_current_global_batch_size()
    start, stop = run.consumed, run.consumed + batch
    lr = get_canonical_lr_for_logging(run.optimizer.param_groups)
    if run.iteration + 1 in (config.training.iterations_to_skip or ()):
        result = StepResult(
            np.zeros((len(run.plan.domain_names), SUMS)), math.nan, "iterations_to_skip"
        )
    else:
        result = _step(run, reporter, loader, keeper, start, batch)
    run.scheduler.step(increment=batch)
    run.iteration, run.consumed = run.iteration + 1, stop
    reporter.step(start, stop, result, lr, time.perf_counter() - begin)
    if not result.skipped or result.skipped == "iterations_to_skip":
        return False
    where = f"{result.skipped} at iteration {run.iteration}, samples {start} to {stop - 1}"
    look = f"see what they hold with `chatflow locate --iteration {run.iteration}`"
    if failures + 1 > config.training.max_nonfinite_iterations:
        raise NonFiniteError(
            f"{where}; {look}"
            + (
                f"; the {failures} iterations before it were skipped for the same"
                if failures
                else ""
            )
        )
    reporter.say(f" {where}: skipped, the weights stay; {look}")
    return True


def _step(
    run: Run, reporter: Reporter, loader: BlendDataLoader, keeper: Keeper, start: int, batch: int
) -> StepResult:
    config = run.config
    micro_batches = loader.iteration(start, batch)
    assert len(micro_batches) == get_num_microbatches()
    seed_iteration(config.training.seed, run.iteration)
    alone = start < config.training.train_new_rows_samples
    if run.only_new_rows and not alone:
        keeper.settle()
        forget_moments(run.optimizer)
        reporter.say(f" from sample {start} on all weights are trained")
    run.only_new_rows = alone
    result = train_step(
        run.forward_step, run.model, run.optimizer, micro_batches, run.shape,
        len(run.plan.domain_names), run.device,
        check_finite=config.training.check_for_nan_in_loss_and_grad, settle=keeper.settle,
        only=run.new_rows if alone else None,
    )  # fmt: skip
    if run.average is not None and not result.skipped:
        state_dict.gather_weights(run.model)
        run.average.update()
    return result


def _validate(run: Run, reporter: Reporter, stop: Stop) -> tuple[dict[str, Any], str | None]:
    """The held-out losses by name, and why to leave if `stop` said so meanwhile: then they are not
    complete, and not told.
    """
    config, names = run.config, run.held_out_names
    most = config.validation.eval_iters * config.training.global_batch_size
    step = make_forward_step(
        len(names), run.inputs.token_bytes, run.transformer_impl == "transformer_engine", run.device
    )
    sums = np.zeros((len(names), SUMS))
    for name, domain in run.inputs.held_out.items():
        sums += evaluate_domains(
            step,
            run.model,
            {name: domain},
            names,
            most,
            config.training.micro_batch_size,
            run.shape,
            run.device,
        )
        if why := stop.agreed(run.device):
            return {}, why
    run.validated = True
    return reporter.validation(sums), None


def _summary(
    run: Run, reporter: Reporter, baseline: dict[str, Any], latest: dict[str, Any]
) -> None:
    if run.outlook.ending:
        reporter.say(
            f"the run ends {run.plan.num_samples - run.consumed} samples before its planned "
            f"{run.plan.num_samples}: {run.outlook.ending}"
        )
    for name, values in latest.items():
        if name in baseline:
            reporter.say(
                f" held-out loss of {name}: {baseline[name]['loss']:.3f} before, "
                f"{values['loss']:.3f} after {run.iteration} "
                f"iterations ({values['loss'] - baseline[name]['loss']:+.3f})"
            )
    if run.config.checkpoint.save:
        folder = Path(run.config.checkpoint.save)
        reporter.say(
            f"done: {run.iteration} iterations, {run.consumed} samples; checkpoint and "
            f"metrics in {folder}, TensorBoard log in "
            f"{run.config.logging.tensorboard_dir or folder / 'tensorboard'}"
        )
    else:
        reporter.say(
            f"done: {run.iteration} iterations, {run.consumed} samples; nothing was saved "
            f"(no --save)"
        )
