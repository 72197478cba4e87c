"""Iterations that could not be trained on: reported, and too many in a row end the run."""

from __future__ import annotations

import logging

from megatron_chatflow.errors import RunError
from megatron_chatflow.training.callbacks import Callback, IterationResult
from megatron_chatflow.training.train_state import TrainState

SKIPPED_BY_SETTING = "iterations_to_skip"
"""`StepResult.skipped` of an iteration that the user left out."""

logger = logging.getLogger(__name__)


class NonFiniteError(RunError):
    """Too many iterations in a row without a finite loss and gradient, or without a loss."""


class NonFiniteCheckCallback(Callback):
    """Counts iterations in a row that were skipped because a value was not finite."""

    def __init__(self) -> None:
        """Start without skipped iterations."""
        self._skipped_before = 0

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Report a skipped iteration.

        Raises:
            NonFiniteError: it is one more than --max-nonfinite-iterations in a row; on every rank.
        """
        reason = result.step.skipped
        if not reason or reason == SKIPPED_BY_SETTING:
            self._skipped_before = 0
            return
        what = (
            f"{reason} at iteration {state.iteration}, samples {result.start} to {result.stop - 1}"
        )
        look = f"see what they hold with `chatflow locate --iteration {state.iteration}`"
        before = self._skipped_before
        if before + 1 > state.config.training.max_nonfinite_iterations:
            also = f"; the {before} iterations before it were skipped for the same" * bool(before)
            raise NonFiniteError(f"{what}; {look}{also}")
        logger.info(f" {what}: skipped, the weights stay; {look}")
        self._skipped_before += 1
