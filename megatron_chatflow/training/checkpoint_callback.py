"""The checkpoints of a run: what goes into one, when a failed one is no matter, and that the last
iteration has one.
"""

from __future__ import annotations

from typing import Any

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.checkpoint.saver import SaveError, Saver
from megatron_chatflow.training.batch_schedule import batches_state
from megatron_chatflow.training.metrics_reporter import Reporter
from megatron_chatflow.training.resume_plan import data_identity
from megatron_chatflow.training.resume_settings import settings_to_save
from megatron_chatflow.training.setup import Run


class Keeper:
    """Saves a run; without a saver it does nothing. Every method is called by every rank alike."""

    def __init__(self, run: Run, reporter: Reporter, saver: Saver | None) -> None:
        self._run, self._reporter, self._where, self._saver = (
            run,
            reporter,
            run.config.checkpoint,
            saver,
        )
        self._kept = run.iteration
        """The last iteration that has a checkpoint, or needs none: those that the run began
        with.
        """

    def save(self) -> None:
        """Save the run as it is now; with --async-save only begin to. Raises SaveError under
        --exit-on-failed-save.
        """
        if self._saver is None:
            return
        self.poll(wait=True)
        try:
            self._begin()
        except SaveError as error:
            self._failed(error)
        self.poll(wait=not self._where.async_save)

    def settle(self) -> None:
        """To be called before anything changes that a checkpoint holds: while one is begun, its
        tensors are still being copied.
        """
        if self._saver is not None:
            self._saver.settle()

    def poll(self, *, wait: bool = False) -> None:
        """Publish what has been written meanwhile; with `wait`, what is being written. Raises
        SaveError under --exit-on-failed-save.
        """
        if self._saver is not None:
            try:
                self._tell(self._saver.poll(wait=wait))
            except SaveError as error:
                self._failed(error)

    def finish(self) -> None:
        """Have the last iteration saved and published. Raises SaveError where that fails."""
        if self._saver is None:
            return
        self.poll(wait=True)
        if self._kept != self._run.iteration:
            self._begin()
            self._tell(self._saver.poll(wait=True))

    def _begin(self) -> None:
        run, optimizer = self._run, None if self._where.no_save_optim else self._run.optimizer
        self._reporter.flush()
        self._saver.begin(
            run.iteration,
            state_dict.sharded_state(run.model, optimizer, run.average),
            _state(run) | self._reporter.lineage,
        )

    def _tell(self, saved: Any) -> None:
        if saved is None:
            return
        self._kept = int(saved.folder.name.removeprefix("iter_"))
        aside = f", {saved.stall:.2f} s of it without training" if self._where.async_save else ""
        self._reporter.say(f" saved {saved.folder} in {saved.seconds:.1f} s{aside}")

    def _failed(self, error: SaveError) -> None:
        if self._where.exit_on_failed_save:
            raise error
        self._reporter.say(
            f" {error}; the training goes on, the checkpoints before are as they were "
            f"(--exit-on-failed-save stops instead)"
        )


def _state(run: Run) -> dict[str, Any]:
    """What a checkpoint knows beside its tensors."""
    return {
        "iteration": run.iteration,
        "consumed_train_samples": run.consumed,
        "optimizer": not run.config.checkpoint.no_save_optim,
        "ema_decay": run.config.training.ema_decay,
        "only_new_rows": run.only_new_rows,
        "validated": run.validated,
        "opt_param_scheduler": run.scheduler.state_dict(),
        "settings": settings_to_save(run.config, run.inputs.vocab_size, run.schedule),
        "data": data_identity(run.config, run.inputs),
        "batches": batches_state(run.batches),
        "plan": run.plan.to_json(),
    }
