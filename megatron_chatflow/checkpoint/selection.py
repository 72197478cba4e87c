"""Which weights of a run to read: a checkpoint's, a mean of checkpoints, or the running mean.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.checkpoint.lineage import listed, read_lineage
from megatron_chatflow.checkpoint.run_directory import (
    complete_iterations,
    find_checkpoint,
    iteration_folder,
    on_course,
    read_state,
)
from megatron_chatflow.errors import CheckpointError


@dataclass(frozen=True)
class ChosenWeights:
    """Weights to read; `choose_weights` makes it."""

    folders: tuple[Path, ...]
    """Checkpoints to take the mean of, oldest first; one alone is taken as it is."""
    left: tuple[int, ...]
    """Iterations of checkpoints up to the newest that are not on its course."""
    use_ema: bool
    """Take the running mean of the weights (--ema-decay) in place of the weights."""

    @property
    def newest(self) -> Path:
        """The checkpoint that the weights are of, or the last one of the mean."""
        return self.folders[-1]

    @property
    def name(self) -> str:
        """What reports call them."""
        if self.use_ema:
            return f"running mean of the weights in {self.newest}"
        if len(self.folders) == 1:
            return str(self.newest)
        others = ", ".join(folder.name for folder in self.folders[:-1])
        without = f" (without {listed(self.left)}, not on its course)" if self.left else ""
        return f"mean of {others} and {self.newest}{without}"


def choose_weights(
    run: str | Path, ckpt_step: int | None, average: int = 1, use_ema: bool = False
) -> ChosenWeights:
    """The weights of a run up to `ckpt_step` (or the latest).

    Args:
        run: the run directory.
        ckpt_step: the iteration; None is the latest.
        average: how many of the last complete checkpoints to take the mean of.
        use_ema: take the running mean of the weights in place of the weights.

    Raises:
        ConfigError: there is no checkpoint, fewer than `average`, no running mean, or both means
        were asked for.
    """
    if use_ema and average != 1:
        raise CheckpointError(
            f"use_ema and average_checkpoints {average} are two ways to average; drop "
            f"--use-ema or --average-checkpoints"
        )
    folders, left = _last_checkpoints(Path(run), ckpt_step, average)
    if use_ema:
        check_running_mean(folders[-1])
    return ChosenWeights(folders, left, use_ema)


def check_running_mean(checkpoint: Path) -> None:
    """Raises ConfigError where a checkpoint holds no running mean of the weights."""
    if read_state(checkpoint).get("ema_decay") is None:
        raise CheckpointError(
            f"{checkpoint} holds no running mean of the weights: it was trained without "
            f"--ema-decay; drop --use-ema to take its weights"
        )


def _last_checkpoints(
    run: Path, ckpt_step: int | None, count: int
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """The last `count` checkpoints of one course, oldest first, and the iterations not on it."""
    newest = find_checkpoint(run, ckpt_step)
    if newest is None:
        raise CheckpointError(f"load {run} holds no checkpoint; give a run directory that has one")
    if count == 1:
        return (newest,), ()
    last = int(newest.name[5:])
    there = [iteration for iteration in sorted(complete_iterations(run)) if iteration <= last]
    course = read_lineage(newest)
    if course is None:
        raise CheckpointError(
            f"{newest} is damaged: state.json is not what was written; load another "
            f"checkpoint with --ckpt-step"
        )
    kept = on_course(run, course, there)
    left = tuple(iteration for iteration in there if iteration not in kept)
    if count < 1 or count > len(kept):
        others = f", without {listed(left)}, not on its course" if left else ""
        raise CheckpointError(
            f"average_checkpoints is {count}, and the complete checkpoints of {run} up to "
            f"{newest.name} are {len(kept)} (iteration "
            f"{', '.join(map(str, kept))}{others}); give --average-checkpoints a number "
            f"from 1 to {len(kept)}"
        )
    return tuple(iteration_folder(run, iteration) for iteration in kept[-count:]), left
