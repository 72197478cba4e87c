"""The checkpoints of a run: when one is saved, what it holds besides tensors, and failed saves."""

from __future__ import annotations

import logging
from typing import Any

from megatron_chatflow.checkpoint import state_dict
from megatron_chatflow.checkpoint.saver import Saved, SaveError, Saver
from megatron_chatflow.training.batch_schedule import batches_state
from megatron_chatflow.training.callbacks import Callback, CallbackList, IterationResult
from megatron_chatflow.training.resume_plan import data_identity
from megatron_chatflow.training.resume_settings import settings_to_save
from megatron_chatflow.training.train_state import TrainState

logger = logging.getLogger(__name__)


class CheckpointCallback(Callback):
    """Saves a run every --save-interval iterations and at its end; without a saver does nothing."""

    def __init__(self, saver: Saver | None, callbacks: CallbackList) -> None:
        """Save with `saver`; `callbacks` are notified of what is saved."""
        self._saver, self._callbacks = saver, callbacks
        self._saved_iteration = 0
        """The last iteration that has a checkpoint, or needs none: those before this launch."""

    def on_fit_start(self, state: TrainState) -> None:
        """Note where the run begins."""
        self._saved_iteration = state.iteration

    def before_update(self, state: TrainState) -> None:
        """Wait until the tensors of a checkpoint that is being written have been copied."""
        if self._saver is not None:
            self._saver.settle()

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Publish what has been written meanwhile.

        Raises:
            SaveError: it could not be written, under --exit-on-failed-save.
        """
        self._poll(state)

    def on_iteration_end(self, state: TrainState) -> None:
        """Save if --save-interval or --exit-interval is due; with --async-save only begin to.

        Raises:
            SaveError: it cannot be written, under --exit-on-failed-save.
        """
        if state.exit_reason is not None or self._saver is None:
            return
        intervals = (
            state.config.training.exit_interval,
            state.config.checkpoint.save_interval,
        )
        if not any(interval and state.iteration % interval == 0 for interval in intervals):
            return
        self._poll(state, wait=True)
        try:
            self._begin(state, self._saver)
        except SaveError as error:
            self._report_failure(state, error)
        self._poll(state, wait=not state.config.checkpoint.async_save)

    def on_fit_end(self, state: TrainState) -> None:
        """Have the last iteration saved and published.

        Raises:
            SaveError: it cannot be written.
        """
        if self._saver is None:
            return
        self._poll(state, wait=True)
        if self._saved_iteration != state.iteration:
            self._begin(state, self._saver)
            self._report(state, self._saver.poll(wait=True))

    def _poll(self, state: TrainState, *, wait: bool = False) -> None:
        """Publish what has been written; with `wait`, also what is being written."""
        if self._saver is not None:
            try:
                self._report(state, self._saver.poll(wait=wait))
            except SaveError as error:
                self._report_failure(state, error)

    def _begin(self, state: TrainState, saver: Saver) -> None:
        optimizer = None if state.config.checkpoint.no_save_optim else state.optimizer
        record: dict[str, Any] = {}
        self._callbacks.on_checkpoint_start(state, record)
        saver.begin(
            state.iteration,
            state_dict.sharded_state(state.model, optimizer, state.average),
            _run_record(state) | record,
        )

    def _report(self, state: TrainState, saved: Saved | None) -> None:
        if saved is None:
            return
        self._saved_iteration = int(saved.folder.name.removeprefix("iter_"))
        stall = f", {saved.stall:.2f} s of it without training"
        logger.info(
            f" saved {saved.folder} in {saved.seconds:.1f} s"
            + stall * bool(state.config.checkpoint.async_save)
        )
        self._callbacks.on_checkpoint_saved(state, saved)

    def _report_failure(self, state: TrainState, error: SaveError) -> None:
        if state.config.checkpoint.exit_on_failed_save:
            raise error
        logger.info(
            f" {error}; training continues, earlier checkpoints are unchanged "
            f"(--exit-on-failed-save stops instead)"
        )


def _run_record(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint records of the run besides its tensors."""
    config = state.config
    return {
        "iteration": state.iteration,
        "consumed_train_samples": state.consumed,
        "optimizer": not config.checkpoint.no_save_optim,
        "ema_decay": config.training.ema_decay,
        "only_new_rows": state.only_new_rows,
        "validated": state.validated,
        "opt_param_scheduler": state.scheduler.state_dict(),
        "settings": settings_to_save(config, state.inputs.vocab_size, state.schedule),
        "data": data_identity(config, state.inputs),
        "batches": batches_state(state.batches),
        "plan": state.plan.to_json(),
    }
