"""The records of a run: the console, TensorBoard, metrics.jsonl, and the files that describe it."""

from __future__ import annotations

import contextlib
import datetime
import logging
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
from megatron_chatflow.report.metrics_file import copy_records, prepare_records
from megatron_chatflow.report.writers import MetricsWriter, TensorBoardWriter
from megatron_chatflow.training.batch_schedule import count_iterations
from megatron_chatflow.training.callbacks import Callback, HeldOutLosses, IterationResult
from megatron_chatflow.training.metrics import SpikeDetector, by_domain, loss_values
from megatron_chatflow.training.train_state import TrainState
from megatron_chatflow.utils.files import unwritable, write_atomically

logger = logging.getLogger(__name__)


class MetricsCallback(Callback):
    """Prints and records the losses; ranks other than the first only open nothing together."""

    def __init__(self, lease: Lease | None) -> None:
        """Make a callback without files; `on_fit_start` opens them.

        Args:
            lease: that of the run directory, on rank 0: without it no record is written.
        """
        self._lease = lease
        self._metrics: MetricsWriter | None = None
        self._board: TensorBoardWriter | None = None
        self._lineage: dict[str, Any] = {}
        """What checkpoints record of the run's course; empty on ranks other than 0."""
        self._branch: dict[str, str] = {}
        """What records show of it."""
        self._spikes = SpikeDetector()
        self._window: list[dict[str, Any]] = []
        """The records since the last printed line."""

    def on_fit_start(self, state: TrainState) -> None:
        """Open the logs, and write the files that describe the run.

        Raises:
            ConfigError, WriteError: they cannot be written; on every rank alike.
        """
        config = state.config
        folder = Path(config.checkpoint.save) if config.checkpoint.save else None
        board = config.logging.tensorboard_dir or (folder / "tensorboard" if folder else None)
        on_first_rank(
            lambda: self._open(state, folder, Path(board) if board else None),
            ChatflowError,
        )
        self._train_iters = count_iterations(state.batches, state.forecast.total)
        self._flops = flops_per_token(config, state.inputs.vocab_size)
        # [domains, 3]: loss, tokens, bytes of the iterations since the last printed line
        self._window_sums = np.zeros((len(state.plan.domain_names), SUMS))

    def _open(self, state: TrainState, folder: Path | None, board: Path | None) -> None:
        try:
            if board:
                self._board = TensorBoardWriter(board, state.iteration + 1)
        except OSError as error:
            key = "tensorboard_dir" if state.config.logging.tensorboard_dir else "save"
            raise unwritable(key, board or Path(), error) from None
        if not folder:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            course, notes = begin_course(
                folder, state.resumed_from, state.iteration, state.initial_weights
            )
            self._lineage, self._branch = {"lineage": course.plain()}, {"branch": course.branch}
            for note in notes:
                logger.info(note)
            write_atomically(folder / "config.yaml", to_yaml(state.config))
            write_atomically(folder / "plan.json", state.plan.to_json())
            path = folder / METRICS
            is_branch = state.config.checkpoint.branch_from is not None
            if is_branch and state.resumed_from is not None:
                copy_records(state.resumed_from.parent / METRICS, path)
            for note in prepare_records(
                path, state.iteration, validated=state.validated, course=course.has
            ):
                logger.warning(note)
            self._metrics = MetricsWriter(path)
        except OSError as error:
            raise unwritable("save", folder, error) from None

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Record one iteration, and print the values since the last printed line when due.

        A skipped iteration has no loss.
        """
        if not state.is_first_rank:
            return
        sums = np.zeros_like(result.step.sums) if result.step.skipped else result.step.sums
        record = _record(state, result, sums)
        tokens_per_second = result.num_samples * state.config.data.seq_length / result.seconds
        times = {
            "iteration-time": result.seconds,
            "tokens-per-second": tokens_per_second,
            "throughput": tokens_per_second * self._flops / state.launch.world_size / 1e12,
        }
        if self._metrics is not None and self._may_write():
            self._metrics.add(record | self._branch | {"time": times})
        if self._board and state.iteration % state.config.logging.tensorboard_log_interval == 0:
            self._to_board(state.iteration, _tags(record, times))
        self._window.append(record | {"seconds": result.seconds})
        self._window_sums += sums
        loss = record["lm loss"]
        if loss is not None and (mean := self._spikes.observe(loss)) is not None:
            logger.info(
                f" loss spike at iteration {state.iteration}: {loss:.3f}, against {mean:.3f} on "
                f"average before; see what its samples {result.start} to {result.stop - 1} hold "
                f"with `chatflow locate --iteration {state.iteration}`"
            )
        if (
            state.iteration == 1
            or state.iteration % state.config.logging.log_interval == 0
            or result.stop + state.config.training.micro_batch_size > state.forecast.total
        ):
            self._print_window(state, result.stop)

    def _may_write(self) -> bool:
        """Whether the run directory is still this run's."""
        return self._lease is None or self._lease.holds()

    def _to_board(self, iteration: int, tags: dict[str, float | None]) -> None:
        """Write to TensorBoard; if that fails, report it and continue without."""
        assert self._board is not None
        try:
            self._board.add(iteration, tags)
        except OSError as error:
            logger.info(
                f" TensorBoard's log cannot be written any more "
                f"({error.strerror or error}); metrics.jsonl holds the same numbers"
            )
            self._board = None

    def _print_window(self, state: TrainState, stop: int) -> None:
        window, config = self._window, state.config
        seconds = sum(r["seconds"] for r in window) / len(window)
        samples = sum(r["batch-size"] for r in window)
        rate = samples * config.data.seq_length / (seconds * len(window))
        throughput = rate * self._flops / state.launch.world_size / 1e12
        values = {
            "iteration": state.iteration,
            "train_iters": self._train_iters,
            "consumed_samples": stop,
            "seconds": seconds,
            "tokens_per_second": rate,
            "throughput": throughput if config.logging.log_throughput else None,
            "learning_rate": window[-1]["learning-rate"],
            "global_batch_size": window[-1]["batch-size"],
            "loss": loss_values(self._window_sums.sum(0))["loss"],
            "grad_norm": window[-1]["grad-norm"],
            "skipped": sum("skipped" in r for r in window),
            "nan": sum("finite" in r.get("skipped", "") for r in window),
        }
        logger.info(console.iteration_line(values, datetime.datetime.now()))
        losses = by_domain(state.plan.domain_names, self._window_sums)
        shares = {
            name: {
                "share": sum(r["domains"][name]["samples"] for r in window) / samples,
                "loss": losses[name]["loss"],
            }
            for name in state.plan.domain_names
        }
        total = state.forecast.total
        left = (total - stop) / samples * seconds * len(window)
        logger.info(console.progress_line(stop / total, left, window[-1]["stage"], shares))
        self._window, self._window_sums = [], np.zeros_like(self._window_sums)

    def on_validation_end(self, state: TrainState, losses: HeldOutLosses) -> None:
        """Print and record the held-out losses.

        Megatron's `lm loss validation` is that of the domains together.
        """
        if not state.is_first_rank:
            return
        results, total = losses.by_name, losses.overall
        for line in console.validation_lines(state.iteration, results, total):
            logger.info(line)
        if self._board:
            tags = {"lm loss validation": total["loss"], "lm loss validation ppl": total["ppl"]}
            for name, values in results.items():
                tags |= {
                    f"validation/{name}/{key}": values[key] for key in ("loss", "bits_per_byte")
                }
            self._to_board(state.iteration, tags)
        if self._metrics is not None and self._may_write():
            record = {
                "iteration": state.iteration,
                "lm loss validation": total["loss"],
                "validation": results,
            }
            self._metrics.add(record | self._branch)

    def on_checkpoint_start(self, state: TrainState, record: dict[str, Any]) -> None:
        """Flush the records so far to disk: no checkpoint may outlive the records before it.

        A full disk is reported by the checkpoint itself.
        """
        if self._metrics:
            with contextlib.suppress(OSError):
                self._metrics.flush()
        record |= self._lineage

    def close(self) -> None:
        """Write out what is left."""
        for log in filter(None, (self._board, self._metrics)):
            try:
                log.close()
            except OSError as error:
                logger.error(f"the end of a log is lost: {error}")


def _record(state: TrainState, result: IterationResult, sums: np.ndarray) -> dict[str, Any]:
    """Return the values of one iteration, without times.

    Args:
        state: the run after the iteration.
        result: the iteration.
        sums: [domains, 3]: loss, tokens, bytes.
    """
    plan, start, stop = state.plan, result.start, result.stop
    before, after, target = plan.counts(start), plan.counts(stop), plan.shares(start)
    total = loss_values(sums.sum(0))
    domains, epoch_samples = {}, state.inputs.epoch_samples
    for i, (name, values) in enumerate(by_domain(plan.domain_names, sums).items()):
        count = int(after[i] - before[i])
        domains[name] = {
            "samples": count,
            "share": count / (stop - start),
            "share_target": float(target[i]),
            "loss": values["loss"],
            "bits_per_byte": values["bits_per_byte"],
            "tokens": int(after[i]) * state.config.data.seq_length,
            "epoch": int(after[i]) / max(epoch_samples[name], 1),
        }
    grad_norm = result.step.grad_norm
    record = {
        "iteration": state.iteration,
        "consumed_samples": stop,
        "samples": [start, stop],
        "stage": plan.stage_at(start),
        "batch-size": stop - start,
        "lm loss": total["loss"],
        "bits_per_byte": total["bits_per_byte"],
        "learning-rate": result.learning_rate,
        "grad-norm": grad_norm if math.isfinite(grad_norm) else None,
        "domains": domains,
    }
    return record | ({"skipped": result.step.skipped} if result.step.skipped else {})


def _tags(record: dict[str, Any], times: dict[str, float]) -> dict[str, float | None]:
    """Return TensorBoard's tags of one iteration."""
    tags = {name: record[name] for name in ("lm loss", "learning-rate", "grad-norm", "batch-size")}
    tags |= times
    for name, values in record["domains"].items():
        tags |= {
            f"domain/{name}/{key}": values[key]
            for key in ("loss", "share", "share_target", "tokens", "epoch")
        }
    return tags
