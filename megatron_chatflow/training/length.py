"""How many iterations a run has, and which samples each of them reads. Imports no torch."""

from __future__ import annotations

from megatron_chatflow.config import Config


def batch_size_at(config: Config, consumed: int) -> int:
    """The global batch size after `consumed` samples (megatron-core's ramp-up rule)."""
    full, ramp = config.training.global_batch_size, config.training.rampup_batch_size
    if not ramp or consumed > ramp[2]:
        return full
    start, increment, samples = ramp
    steps = int(consumed / (samples / ((full - start) / increment)))
    return min(start + steps * increment, full)


def samples_of_iteration(config: Config, iteration: int) -> tuple[int, int]:
    """(first sample, one past the last) of an iteration counted from 1. Steps only through the ramp-up."""
    done, consumed = 0, 0
    ramp = config.training.rampup_batch_size
    while ramp and consumed <= ramp[2] and done < iteration - 1:
        consumed += batch_size_at(config, consumed)
        done += 1
    start = consumed + (iteration - 1 - done) * config.training.global_batch_size
    return start, start + batch_size_at(config, start)


def count_iterations(config: Config, total: int) -> int:
    """Whole iterations in a run of `total` samples; samples that do not fill a last one are not read."""
    done, consumed = 0, 0
    ramp = config.training.rampup_batch_size
    while ramp and consumed <= ramp[2] and consumed + batch_size_at(config, consumed) <= total:
        consumed += batch_size_at(config, consumed)
        done += 1
    return done + max(0, total - consumed) // config.training.global_batch_size
