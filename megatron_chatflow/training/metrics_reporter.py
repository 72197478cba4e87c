"""What a run tells: the console, TensorBoard, metrics.jsonl, and the files that describe it."""

from __future__ import annotations

import contextlib
import datetime
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.checkpoint.lease import Lease
from megatron_chatflow.checkpoint.run_directory import METRICS, begin_course
from megatron_chatflow.config import to_yaml
from megatron_chatflow.distributed.consistency_check import on_first_rank
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.model.forward import SUMS
from megatron_chatflow.planner.parameters import flops_per_token
from megatron_chatflow.report import console
from megatron_chatflow.report.metrics_file import prepare_records
from megatron_chatflow.report.writers import MetricsWriter, TensorBoardWriter
from megatron_chatflow.training.loss_spikes import SpikeWatch
from megatron_chatflow.training.metrics import by_domain, loss_values
from megatron_chatflow.training.setup import Run
from megatron_chatflow.training.train_step import StepResult
from megatron_chatflow.utils.files import unwritable, write_atomically


class Reporter:
    """Prints and keeps what a run tells; on every rank but the first it does nothing."""

    def __init__(self, run: Run, train_iters: int, lease: Lease | None) -> None:
        """Open the logs, and write the files that describe the run. Called by every rank.

        Raises:
            ConfigError, WriteError: they cannot be written; on every rank alike.
        """
        config = run.config
        self._lease = lease
        self.run, self.total, self.train_iters = run, run.outlook.total, train_iters
        self.active = run.is_first_rank
        self.metrics: MetricsWriter | None = None
        self.board: TensorBoardWriter | None = None
        self.lineage: dict[str, Any] = {}
        """What checkpoints record of the course that the run is on; nothing on other ranks."""
        self.branch: dict[str, str] = {}
        """What records show of it."""
        folder = Path(config.checkpoint.save) if config.checkpoint.save else None
        board = config.logging.tensorboard_dir or (folder / "tensorboard" if folder else None)
        on_first_rank(lambda: self._open(folder, board and Path(board)), ChatflowError)
        self.flops = flops_per_token(config, run.inputs.vocab_size)
        self.spikes = SpikeWatch()
        self.window: list[dict[str, Any]] = []
        self.window_sums = np.zeros((len(run.plan.domain_names), SUMS))

    def _open(self, folder: Path | None, board: Path | None) -> None:
        run = self.run
        try:
            if board:
                self.board = TensorBoardWriter(board, run.iteration + 1)
        except OSError as error:
            key = "tensorboard_dir" if run.config.logging.tensorboard_dir else "save"
            raise unwritable(key, board, error) from None
        if not folder:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            course, notes = begin_course(folder, run.resumed_from, run.iteration)
            self.lineage, self.branch = {"lineage": course.plain()}, {"branch": course.branch}
            for note in notes:
                console.say(note)
            write_atomically(folder / "config.yaml", to_yaml(run.config))
            write_atomically(folder / "plan.json", run.plan.to_json())
            path, at, validated = folder / METRICS, run.iteration, run.validated
            for note in prepare_records(path, at, validated=validated, course=course.has):
                console.say(f"warning: {note}")
            self.metrics = MetricsWriter(path)
        except OSError as error:
            raise unwritable("save", folder, error) from None

    def say(self, text: str) -> None:
        """One line on the console, once for the whole job."""
        if self.active:
            console.say(text)

    def step(self, start: int, stop: int, result: StepResult, lr: float, seconds: float) -> None:
        """Keep one iteration's values, and print those of the last interval when it ends. A skipped
        iteration has no loss.
        """
        run, plan = self.run, self.run.plan
        if not self.active:
            return
        sums = np.zeros_like(result.sums) if result.skipped else result.sums
        grad_norm = result.grad_norm if math.isfinite(result.grad_norm) else None
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
        } | ({"skipped": result.skipped} if result.skipped else {})
        tokens_per_second = (stop - start) * run.config.data.seq_length / seconds
        throughput = tokens_per_second * self.flops / run.launch.world_size / 1e12
        if self._keeps_metrics():
            times = {"iteration-time": seconds, "tokens-per-second": tokens_per_second}
            times["throughput"] = throughput
            self.metrics.add(record | self.branch | {"time": times})
        if self.board and run.iteration % run.config.logging.tensorboard_log_interval == 0:
            self._to_board(self._tags(record, seconds, tokens_per_second, throughput))
        self.window.append(record | {"seconds": seconds})
        self.window_sums += sums
        if total["loss"] is not None and (mean := self.spikes.look(total["loss"])) is not None:
            console.say(
                f" loss spike at iteration {run.iteration}: {total['loss']:.3f}, against "
                f"{mean:.3f} on average before; see what its samples "
                f"{start} to {stop - 1} hold with `chatflow locate --iteration {run.iteration}`"
            )
        if (
            run.iteration == 1
            or run.iteration % run.config.logging.log_interval == 0
            or stop + run.config.training.micro_batch_size > self.total
        ):
            self._print_window(stop)

    def _keeps_metrics(self) -> bool:
        """Whether records are written: not into a run directory that is another run's by now."""
        return self.metrics is not None and (self._lease is None or self._lease.holds())

    def _to_board(self, tags: dict[str, float | None]) -> None:
        """A log that cannot be written is no reason to stop."""
        try:
            self.board.add(self.run.iteration, tags)
        except OSError as error:
            console.say(
                f" TensorBoard's log cannot be written any more "
                f"({error.strerror or error}); metrics.jsonl holds the same numbers"
            )
            self.board = None

    def _tags(
        self, record: dict[str, Any], seconds: float, tokens_per_second: float, throughput: float
    ) -> dict[str, float | None]:
        tags = {
            name: record[name] for name in ("lm loss", "learning-rate", "grad-norm", "batch-size")
        }
        tags |= {
            "iteration-time": seconds,
            "tokens-per-second": tokens_per_second,
            "throughput": throughput,
        }
        for name, values in record["domains"].items():
            tags |= {
                f"domain/{name}/{key}": values[key]
                for key in ("loss", "share", "share_target", "tokens", "epoch")
            }
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
            "throughput": rate * self.flops / run.launch.world_size / 1e12
            if run.config.logging.log_throughput
            else None,
            "learning_rate": window[-1]["learning-rate"],
            "global_batch_size": window[-1]["batch-size"],
            "loss": loss_values(self.window_sums.sum(0))["loss"],
            "grad_norm": window[-1]["grad-norm"],
            "skipped": sum("skipped" in r for r in window),
            "nan": sum("finite" in r.get("skipped", "") for r in window),
        }
        console.say(console.iteration_line(values, datetime.datetime.now()))
        losses = by_domain(run.plan.domain_names, self.window_sums)
        shares = {
            n: {
                "share": sum(r["domains"][n]["samples"] for r in window) / samples,
                "loss": losses[n]["loss"],
            }
            for n in run.plan.domain_names
        }
        left = (self.total - stop) / samples * seconds * len(window)
        console.say(console.progress_line(stop / self.total, left, window[-1]["stage"], shares))
        self.window, self.window_sums = [], np.zeros_like(self.window_sums)

    def validation(self, sums: np.ndarray) -> dict[str, Any]:
        """Print and keep the held-out losses; returns them by name. Megatron's `lm loss validation`
        is that of the domains together.
        """
        results = {
            name: v for name, v in by_domain(self.run.held_out_names, sums).items() if v["tokens"]
        }
        if not self.active:
            return results
        total = loss_values(sums[: len(self.run.plan.domain_names)].sum(0))
        for line in console.validation_lines(self.run.iteration, results, total):
            console.say(line)
        if self.board:
            tags = {"lm loss validation": total["loss"], "lm loss validation ppl": total["ppl"]}
            for name, values in results.items():
                tags |= {
                    f"validation/{name}/{key}": values[key] for key in ("loss", "bits_per_byte")
                }
            self._to_board(tags)
        if self._keeps_metrics():
            self.metrics.add(
                {
                    "iteration": self.run.iteration,
                    "lm loss validation": total["loss"],
                    "validation": results,
                }
                | self.branch
            )
        return results

    def flush(self) -> None:
        """Make what was told so far durable: a checkpoint should not outlive the records before it.
        A full disk is told by the checkpoint itself.
        """
        if self.metrics:
            with contextlib.suppress(OSError):
                self.metrics.flush()

    def close(self) -> None:
        """Write out what is left."""
        for log in filter(None, (self.board, self.metrics)):
            try:
                log.close()
            except OSError as error:
                console.complain(f"chatflow train: the end of a log is lost: {error}")
