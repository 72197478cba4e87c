"""The loop: read, step, validate, save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches, update_num_microbatches
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_chatflow.data import Loader
from megatron_chatflow.engine.distributed import data_parallel
from megatron_chatflow.evaluation.loss import evaluate_domains
from megatron_chatflow.model.forward import make_forward_step
from megatron_chatflow.training import checkpoint
from megatron_chatflow.training.ledger import data_identity
from megatron_chatflow.training.length import batches_state, count_iterations
from megatron_chatflow.training.new_rows import forget_moments
from megatron_chatflow.training.reporter import Reporter
from megatron_chatflow.training.setup import Run
from megatron_chatflow.training.step import NonFiniteError, seed_iteration, train_step


def train(run: Run) -> None:
    """Train to the end of the run. Raises NonFiniteError, with the iteration and its samples, when the loss or the gradients are not finite."""
    config = run.config
    total = run.outlook.total
    interval = config.validation.eval_interval
    reporter = Reporter(run, count_iterations(run.batches, total))
    rank, size = data_parallel()
    loader = Loader(
        run.blend,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )
    saved = run.iteration if run.iteration else None
    baseline = _validate(run, reporter) if interval and run.iteration == 0 else {}
    latest = baseline
    try:
        update_num_microbatches(run.consumed)
        if run.consumed + get_current_global_batch_size() > total:
            reporter.say(_nothing_to_do(run, get_current_global_batch_size()))
            return
        while run.consumed + get_current_global_batch_size() <= total:
            _iterate(run, reporter, loader)
            if interval and run.iteration % interval == 0:
                latest = _validate(run, reporter)
            due = config.checkpoint.save_interval and run.iteration % config.checkpoint.save_interval == 0
            leave = config.training.exit_interval and run.iteration % config.training.exit_interval == 0
            if config.checkpoint.save and (due or leave):
                _save(run, reporter)
                saved = run.iteration
            if leave:
                reporter.say(
                    f"exiting at iteration {run.iteration} (exit_interval {config.training.exit_interval}); "
                    f"resume with --load {config.checkpoint.save}"
                )
                return
            update_num_microbatches(run.consumed)
        if interval and run.iteration % interval:
            latest = _validate(run, reporter)
        if config.checkpoint.save and saved != run.iteration:
            _save(run, reporter)
    finally:
        loader.close()
        reporter.close()
    _summary(run, reporter, baseline, latest)


def _nothing_to_do(run: Run, batch: int) -> str:
    where = f"nothing to do: {run.consumed} of {run.outlook.total} samples are trained on, and an iteration is {batch}"
    if run.outlook.ending:
        return f"{where}; {run.outlook.ending}: raise its max_epochs, or lower its weights from here on and add --amend-curriculum"
    return f"{where}; raise --train-samples or --train-iters to go on"


def _iterate(run: Run, reporter: Reporter, loader: Loader) -> None:
    config, begin = run.config, time.perf_counter()
    batch = get_current_global_batch_size()
    start, stop = run.consumed, run.consumed + batch
    micro_batches = loader.iteration(start, batch)
    assert len(micro_batches) == get_num_microbatches()
    seed_iteration(config.training.seed, run.iteration)
    alone = start < config.training.train_new_rows_samples
    if run.only_new_rows and not alone:
        forget_moments(run.optimizer)
        reporter.say(f" from sample {start} on all weights are trained")
    run.only_new_rows = alone
    lr = get_canonical_lr_for_logging(run.optimizer.param_groups)
    try:
        result = train_step(
            run.forward_step, run.model, run.optimizer, micro_batches, run.shape, len(run.plan.domain_names), run.device,
            check_finite=config.training.check_for_nan_in_loss_and_grad, only=run.new_rows if alone else None,
        )  # fmt: skip
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error} at iteration {run.iteration + 1}, samples {start} to {stop - 1}; see what they hold with "
            f"`chatflow locate --iteration {run.iteration + 1}`"
        ) from None
    if run.average is not None:
        checkpoint.gather_weights(run.model)
        run.average.update()
    run.scheduler.step(increment=batch)
    run.iteration, run.consumed = run.iteration + 1, stop
    reporter.step(start, stop, result.sums, result.grad_norm, lr, time.perf_counter() - begin)


def _validate(run: Run, reporter: Reporter) -> dict[str, Any]:
    config, names = run.config, run.held_out_names
    most = config.validation.eval_iters * config.training.global_batch_size
    token_bytes = torch.from_numpy(run.inputs.token_bytes).to(run.device)
    step = make_forward_step(len(names), token_bytes, run.transformer_impl == "transformer_engine")
    held_out = run.inputs.held_out
    return reporter.validation(evaluate_domains(step, run.model, held_out, names, most, config.training.micro_batch_size, run.shape, run.device))


def _save(run: Run, reporter: Reporter) -> None:
    config, begin = run.config, time.perf_counter()
    state = {
        "iteration": run.iteration,
        "consumed_train_samples": run.consumed,
        "optimizer": not config.checkpoint.no_save_optim,
        "ema_decay": config.training.ema_decay,
        "only_new_rows": run.only_new_rows,
        "opt_param_scheduler": run.scheduler.state_dict(),
        "data": data_identity(config, run.inputs),
        "batches": batches_state(run.batches),
        "plan": run.plan.to_json(),
    }
    folder = checkpoint.save(
        Path(config.checkpoint.save), run.iteration, run.model, None if config.checkpoint.no_save_optim else run.optimizer, state, run.average
    )
    reporter.say(f" saved {folder} in {time.perf_counter() - begin:.1f} s")


def _summary(run: Run, reporter: Reporter, baseline: dict[str, Any], latest: dict[str, Any]) -> None:
    if run.outlook.ending:
        reporter.say(f"the run ends {run.plan.num_samples - run.consumed} samples before its planned {run.plan.num_samples}: {run.outlook.ending}")
    for name, values in latest.items():
        if name in baseline:
            reporter.say(
                f" held-out loss of {name}: {baseline[name]['loss']:.3f} before, {values['loss']:.3f} after {run.iteration} "
                f"iterations ({values['loss'] - baseline[name]['loss']:+.3f})"
            )
    if run.config.checkpoint.save:
        folder = Path(run.config.checkpoint.save)
        reporter.say(
            f"done: {run.iteration} iterations, {run.consumed} samples; checkpoint and metrics in {folder}, TensorBoard log in "
            f"{run.config.logging.tensorboard_dir or folder / 'tensorboard'}"
        )
    else:
        reporter.say(f"done: {run.iteration} iterations, {run.consumed} samples; nothing was saved (no --save)")
