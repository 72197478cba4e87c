"""The length of a run in samples and iterations, and which samples each iteration reads.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from megatron_chatflow.config import DataConfig, total_samples
from megatron_chatflow.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound=DataConfig)


@dataclass(frozen=True)
class Batches:
    """The size of the global batch from one point of a run on."""

    iteration: int
    """Iterations done before."""
    consumed: int
    """Samples read before."""
    global_batch_size: int
    rampup_batch_size: Sequence[int] | None = None

    def size_at(self, consumed: int) -> int:
        """Return the global batch size after `consumed` samples, by megatron-core's ramp-up."""
        full, ramp = self.global_batch_size, self.rampup_batch_size
        if not ramp or consumed > ramp[2]:
            return full
        start, increment, samples = ramp
        steps = int(consumed / (samples / ((full - start) / increment)))
        return min(start + steps * increment, full)

    def ramp_up(self, iterations: float, stop: float) -> tuple[int, int]:
        """Step through the ramp-up; returns (iterations made, samples consumed after them).

        Args:
            iterations: at most this many.
            stop: no iteration reads beyond this sample.
        """
        done, consumed, ramp = 0, self.consumed, self.rampup_batch_size
        while (
            ramp
            and consumed <= ramp[2]
            and done < iterations
            and consumed + self.size_at(consumed) <= stop
        ):
            consumed += self.size_at(consumed)
            done += 1
        return done, consumed


def batch_history(
    config: DataConfig,
    saved: Iterable[Mapping[str, Any]] = (),
    iteration: int = 0,
    consumed: int = 0,
) -> tuple[Batches, ...]:
    """Return the batch sizes of a run: those of its checkpoint, then those of these settings.

    Args:
        config: the settings now.
        saved: `batches` of the checkpoint's state; nothing for a run that starts.
        iteration: iterations done at the checkpoint.
        consumed: samples read at the checkpoint.
    """
    history = [Batches(**entry) for entry in saved if entry["iteration"] < iteration]
    t = config.training
    now = Batches(iteration, consumed, t.global_batch_size, t.rampup_batch_size)
    if history and (history[-1].global_batch_size, history[-1].rampup_batch_size) == (
        now.global_batch_size,
        now.rampup_batch_size,
    ):
        return tuple(history)
    return (*history, now)


def batches_state(history: Iterable[Batches]) -> list[dict[str, Any]]:
    """Return the history as plain data for a checkpoint; `batch_history` reads it."""
    return [asdict(entry) for entry in history]


def samples_of_iteration(history: Sequence[Batches], iteration: int) -> tuple[int, int]:
    """Return (first sample, one past the last) of an iteration counted from 1."""
    entry = next(entry for entry in reversed(history) if entry.iteration < iteration)
    before = iteration - 1 - entry.iteration
    done, consumed = entry.ramp_up(before, math.inf)
    start = consumed + (before - done) * entry.global_batch_size
    return start, start + entry.size_at(start)


def count_iterations(history: Sequence[Batches], total: int) -> int:
    """Return the number of iterations in a run of `total` samples.

    Samples that do not fill a last iteration are not read.
    """
    last = history[-1]
    done, consumed = last.ramp_up(math.inf, total)
    return last.iteration + done + max(0, total - consumed) // last.global_batch_size


def fix_length(config: AnyConfig, iteration: int, consumed: int) -> AnyConfig:
    """Return the settings of a run that continues after `iteration` and `consumed` samples.

    `train_iters` counts iterations, those done with another batch size included; where that is
    another number of samples than train_iters x global_batch_size, the result has `train_samples`
    instead.

    Raises:
        ConfigError: the run would end before the sample where it continues.
    """
    t = config.training
    total = (
        total_samples(config)
        if t.train_iters is None
        else consumed + (t.train_iters - iteration) * t.global_batch_size
    )
    if total < consumed:
        length = (
            f"train_samples is {t.train_samples}"
            if t.train_iters is None
            else f"train_iters is {t.train_iters}"
        )
        raise ConfigError(
            f"{length} and the checkpoint is at iteration {iteration}, sample {consumed}; "
            f"give a longer run, or an earlier checkpoint with --ckpt-step"
        )
    if total == total_samples(config):
        return config
    return config.replace(train_iters=None, train_samples=total)
