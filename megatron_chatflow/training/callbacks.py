"""The interface by which code takes part in a run: what built-in and user callbacks extend.

The loop calls every hook on every rank, in the same order of callbacks everywhere, so a hook may
use collectives. A hook that works on one rank only tests `state.is_first_rank`. An exception ends
the run on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_chatflow.checkpoint.saver import Saved
    from megatron_chatflow.training.train_state import TrainState
    from megatron_chatflow.training.train_step import StepResult


@dataclass(frozen=True)
class IterationResult:
    """One iteration: which samples it read, and what came of them."""

    start: int
    """The first sample."""
    stop: int
    """One past the last sample."""
    step: StepResult
    """Losses and gradient norm, or why no step was taken."""
    learning_rate: float | None
    seconds: float

    @property
    def num_samples(self) -> int:
        """The global batch size."""
        return self.stop - self.start


@dataclass(frozen=True)
class HeldOutLosses:
    """What a validation found."""

    by_name: dict[str, dict[str, Any]]
    """{domain or validation set: {"loss", "ppl", "bits_per_byte", "tokens"}}; losses in nats."""
    overall: dict[str, Any]
    """The same values over the tokens of all domains; "loss" is None where no domain has any."""


class Callback:
    """Takes part in a run. Override the hooks that you need; each does nothing by default.

    Pass instances to `Trainer.from_config(config, callbacks=[...])`. They run after the built-in
    callbacks: metrics, the check for skipped iterations, signals, validation, checkpoints, the
    check of the replicas.
    """

    def on_fit_start(self, state: TrainState) -> None:
        """Called once, before anything else."""

    def before_first_iteration(self, state: TrainState) -> None:
        """Called once, after `on_fit_start` of all callbacks: the baseline validation."""

    def before_update(self, state: TrainState) -> None:
        """Called before weights or optimizer state change; not for an iteration without a step."""

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Called after each iteration, also after one that was skipped (`result.step.skipped`)."""

    def on_iteration_end(self, state: TrainState) -> None:
        """Called after `on_step_end` of all callbacks: validation and checkpoints that are due."""

    def on_validation_end(self, state: TrainState, losses: HeldOutLosses) -> None:
        """Called after each complete validation."""

    def on_checkpoint_start(self, state: TrainState, record: dict[str, Any]) -> None:
        """Called before a checkpoint is written; what is added to `record` goes to state.json."""

    def on_checkpoint_saved(self, state: TrainState, saved: Saved) -> None:
        """Called after a checkpoint is published; with --async-save some iterations later."""

    def on_fit_end(self, state: TrainState) -> None:
        """Called once, after the last iteration; `state.exit_reason` says if it came early."""

    def close(self) -> None:
        """Release resources; also called after an error. Must not use collectives."""


class CallbackList(Callback):
    """Forwards every hook to its members, in order."""

    def __init__(self, members: Sequence[Callback] = ()) -> None:
        """Forward to `members`."""
        self.members = list(members)

    def on_fit_start(self, state: TrainState) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_fit_start(state)

    def before_first_iteration(self, state: TrainState) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.before_first_iteration(state)

    def before_update(self, state: TrainState) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.before_update(state)

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_step_end(state, result)

    def on_iteration_end(self, state: TrainState) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_iteration_end(state)

    def on_validation_end(self, state: TrainState, losses: HeldOutLosses) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_validation_end(state, losses)

    def on_checkpoint_start(self, state: TrainState, record: dict[str, Any]) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_checkpoint_start(state, record)

    def on_checkpoint_saved(self, state: TrainState, saved: Saved) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_checkpoint_saved(state, saved)

    def on_fit_end(self, state: TrainState) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.on_fit_end(state)

    def close(self) -> None:
        """See `Callback`."""
        for callback in self.members:
            callback.close()
