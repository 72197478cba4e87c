"""The loop: read, step, report, validate, save."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches, update_num_microbatches
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_chatflow.config import to_yaml
from megatron_chatflow.data import Loader
from megatron_chatflow.engine.distributed import data_parallel
from megatron_chatflow.evaluation.loss import evaluate_domains
from megatron_chatflow.model.forward import SUMS, make_forward_step
from megatron_chatflow.model.gpt import flops_per_token
from megatron_chatflow.report import console
from megatron_chatflow.report.writers import MetricsWriter, TensorBoardWriter
from megatron_chatflow.training import checkpoint
from megatron_chatflow.training.domain_loss import by_domain, loss_values
from megatron_chatflow.training.ledger import data_identity
from megatron_chatflow.training.length import batches_state, count_iterations
from megatron_chatflow.training.run_directory import METRICS, trim_metrics, write_atomically
from megatron_chatflow.training.setup import Run
from megatron_chatflow.training.step import NonFiniteError, seed_iteration, train_step


class Reporter:
    """Prints and keeps what a run tells; on every rank but the first it does nothing."""

    def __init__(self, run: Run, train_iters: int) -> None:
        config = run.config
        self.run, self.total, self.train_iters = run, run.outlook.total, train_iters
        self.active = run.is_first_rank
        self.metrics: MetricsWriter | None = None
        self.board: TensorBoardWriter | None = None
        folder = Path(config.checkpoint.save) if config.checkpoint.save else None
        board = config.logging.tensorboard_dir or (folder / "tensorboard" if folder else None)
        if self.active and folder:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "config.yaml", to_yaml(config))
            write_atomically(folder / "plan.json", run.plan.to_json())
            trim_metrics(folder, run.iteration)
            self.metrics = MetricsWriter(folder / METRICS)
        if self.active and board:
            self.board = TensorBoardWriter(Path(board), run.iteration + 1)
        self.flops = flops_per_token(config, run.inputs.vocab_size)
        self.window: list[dict[str, Any]] = []
        self.window_sums = np.zeros((len(run.plan.domain_names), SUMS))

    def say(self, text: str) -> None:
        """One line on the console, once for the whole job."""
        if self.active:
            console.say(text)

    def step(self, start: int, stop: int, sums: np.ndarray, grad_norm: float, lr: float, seconds: float) -> None:
        """Keep one iteration's values, and print those of the last interval when it ends."""
        run, plan = self.run, self.run.plan
        if not self.active:
            return
        before, after, target = plan.counts(start), plan.counts(stop), plan.shares(start)
        total = loss_values(sums.sum(0))
        domains, epoch_samples = {}, run.inputs.epoch_samples
        for i, (name, values) in enumerate(by_domain(plan.domain_names, sums).items()):
            count = int(after[i] - before[i])
            domains[name] = {
                "samples": count,
                "share": count / (stop - start),
                "share_target": float(target[i]),
                "loss": values["loss"],
                "bits_per_byte": values["bits_per_byte"],
                "tokens": int(after[i]) * run.config.data.seq_length,
                "epoch": int(after[i]) / max(epoch_samples[name], 1),
            }
        record = {
            "iteration": run.iteration,
            "consumed_samples": stop,
            "samples": [start, stop],
            "stage": plan.stage_at(start),
            "batch-size": stop - start,
            "lm loss": total["loss"],
            "bits_per_byte": total["bits_per_byte"],
            "learning-rate": lr,
            "grad-norm": grad_norm,
            "domains": domains,
        }
        tokens_per_second = (stop - start) * run.config.data.seq_length / seconds
        throughput = tokens_per_second * self.flops / run.launch.world_size / 1e12
        if self.metrics:
            self.metrics.add(record | {"time": {"iteration-time": seconds, "tokens-per-second": tokens_per_second, "throughput": throughput}})
        if self.board and run.iteration % run.config.logging.tensorboard_log_interval == 0:
            self.board.add(run.iteration, self._tags(record, seconds, tokens_per_second, throughput))
        self.window.append(record | {"seconds": seconds})
        self.window_sums += sums
        if run.iteration == 1 or run.iteration % run.config.logging.log_interval == 0 or stop + run.config.training.micro_batch_size > self.total:
            self._print_window(stop)

    def _tags(self, record: dict[str, Any], seconds: float, tokens_per_second: float, throughput: float) -> dict[str, float | None]:
        tags = {name: record[name] for name in ("lm loss", "learning-rate", "grad-norm", "batch-size")}
        tags |= {"iteration-time": seconds, "tokens-per-second": tokens_per_second, "throughput": throughput}
        for name, values in record["domains"].items():
            tags |= {f"domain/{name}/{key}": values[key] for key in ("loss", "share", "share_target", "tokens", "epoch")}
        return tags

    def _print_window(self, stop: int) -> None:
        run, window = self.run, self.window
        seconds = sum(r["seconds"] for r in window) / len(window)
        samples = sum(r["batch-size"] for r in window)
        rate = samples * run.config.data.seq_length / (seconds * len(window))
        values = {
            "iteration": run.iteration,
            "train_iters": self.train_iters,
            "consumed_samples": stop,
            "seconds": seconds,
            "tokens_per_second": rate,
            "throughput": rate * self.flops / run.launch.world_size / 1e12 if run.config.logging.log_throughput else None,
            "learning_rate": window[-1]["learning-rate"],
            "global_batch_size": window[-1]["batch-size"],
            "loss": loss_values(self.window_sums.sum(0))["loss"] or 0.0,
            "grad_norm": window[-1]["grad-norm"],
        }
        console.say(console.iteration_line(values, datetime.datetime.now()))
        losses = by_domain(run.plan.domain_names, self.window_sums)
        shares = {n: {"share": sum(r["domains"][n]["samples"] for r in window) / samples, "loss": losses[n]["loss"]} for n in run.plan.domain_names}
        left = (self.total - stop) / samples * seconds * len(window)
        console.say(console.progress_line(stop / self.total, left, window[-1]["stage"], shares))
        self.window, self.window_sums = [], np.zeros_like(self.window_sums)

    def validation(self, sums: np.ndarray) -> dict[str, Any]:
        """Print and keep the held-out losses; returns them by name. Megatron's `lm loss validation` is that of the domains together."""
        results = {name: v for name, v in by_domain(self.run.held_out_names, sums).items() if v["tokens"]}
        if not self.active:
            return results
        total = loss_values(sums[: len(self.run.plan.domain_names)].sum(0))
        for line in console.validation_lines(self.run.iteration, results, total):
            console.say(line)
        if self.board:
            tags = {"lm loss validation": total["loss"], "lm loss validation ppl": total["ppl"]}
            for name, values in results.items():
                tags |= {f"validation/{name}/{key}": values[key] for key in ("loss", "bits_per_byte")}
            self.board.add(self.run.iteration, tags)
            self.board.flush()
        if self.metrics:
            self.metrics.add({"iteration": self.run.iteration, "lm loss validation": total["loss"], "validation": results})
        return results

    def close(self) -> None:
        """Write out what is left."""
        if self.board:
            self.board.close()
        if self.metrics:
            self.metrics.close()


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
    lr = get_canonical_lr_for_logging(run.optimizer.param_groups)
    try:
        result = train_step(
            run.forward_step, run.model, run.optimizer, micro_batches, run.shape, len(run.plan.domain_names), run.device,
            check_finite=config.training.check_for_nan_in_loss_and_grad,
        )  # fmt: skip
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error} at iteration {run.iteration + 1}, samples {start} to {stop - 1}; see what they hold with "
            f"`chatflow locate --iteration {run.iteration + 1}`"
        ) from None
    run.scheduler.step(increment=batch)
    run.iteration, run.consumed = run.iteration + 1, stop
    reporter.step(start, stop, result.sums, result.grad_norm, lr, time.perf_counter() - begin)


def _validate(run: Run, reporter: Reporter) -> dict[str, Any]:
    config, names = run.config, run.held_out_names
    most = config.validation.eval_iters * config.training.global_batch_size
    token_bytes = torch.from_numpy(run.inputs.token_bytes).to(run.device)
    step = make_forward_step(len(names), token_bytes, run.transformer_impl == "transformer_engine")
    held_out = run.inputs.held_out
    return reporter.validation(
        evaluate_domains(step, run.model, held_out, names, most, config.training.micro_batch_size, run.shape, run.device)
    )


def _save(run: Run, reporter: Reporter) -> None:
    config, begin = run.config, time.perf_counter()
    state = {
        "iteration": run.iteration,
        "consumed_train_samples": run.consumed,
        "optimizer": not config.checkpoint.no_save_optim,
        "opt_param_scheduler": run.scheduler.state_dict(),
        "data": data_identity(config, run.inputs),
        "batches": batches_state(run.batches),
        "plan": run.plan.to_json(),
    }
    folder = checkpoint.save(
        Path(config.checkpoint.save), run.iteration, run.model, None if config.checkpoint.no_save_optim else run.optimizer, state
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
