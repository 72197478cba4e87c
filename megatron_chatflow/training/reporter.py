"""What a run tells: the console, TensorBoard, metrics.jsonl, and the files that describe it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.config import to_yaml
from megatron_chatflow.model.forward import SUMS
from megatron_chatflow.model.gpt import flops_per_token
from megatron_chatflow.report import console
from megatron_chatflow.report.writers import MetricsWriter, TensorBoardWriter
from megatron_chatflow.training.domain_loss import by_domain, loss_values
from megatron_chatflow.training.run_directory import METRICS, trim_metrics, write_atomically
from megatron_chatflow.training.setup import Run


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
