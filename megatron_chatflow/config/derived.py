"""Values that follow from the settings: lengths in samples and the size of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_chatflow.config.schema import Config, DataConfig
from megatron_chatflow.errors import ConfigError

_MAX_SAMPLES = 1 << 53


def total_samples(config: DataConfig) -> int:
    """Return the length of the run in samples, complete iterations with ``train_iters``.

    Raises ConfigError beyond 2^53 samples.
    """
    t = config.training
    samples = t.train_samples
    if samples is None:
        samples = (t.train_iters or 0) * t.global_batch_size
    if samples > _MAX_SAMPLES:
        name = "train_iters" if t.train_samples is None else "train_samples"
        raise ConfigError(
            f"{name}: a run of {samples:.4g} samples is longer than 2^53; "
            f"give --{name.replace('_', '-')} a smaller number"
        )
    return samples


@dataclass(frozen=True)
class Schedule:
    """Lengths of the learning-rate schedule in samples, as OptimizerParamScheduler takes them."""

    warmup: int
    decay: int
    wsd: int | None
    total: int

    @classmethod
    def of(cls, config: DataConfig) -> Schedule:
        """Convert the lengths by Megatron's rules.

        Iterations count as iterations x global_batch_size; the decay spans the entire run by
        default.
        """
        o = config.optimizer
        batch, total = config.training.global_batch_size, total_samples(config)
        decay = o.lr_decay_samples or (o.lr_decay_iters or 0) * batch or total
        warmup = o.lr_warmup_samples or o.lr_warmup_iters * batch
        if o.lr_warmup_fraction is not None:
            warmup = int(o.lr_warmup_fraction * decay)
        wsd = o.lr_wsd_decay_samples or (o.lr_wsd_decay_iters or 0) * batch or None
        return cls(warmup, decay, wsd, total)


def padded_vocab_size(config: Config, vocab_size: int) -> int:
    """Return the vocabulary's size padded as the settings require (`pad_vocab_size`)."""
    return pad_vocab_size(
        vocab_size,
        config.model.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )


def pad_vocab_size(
    vocab_size: int, make_vocab_size_divisible_by: int, tensor_model_parallel_size: int
) -> int:
    """Round a vocabulary's size up to a multiple of both numbers."""
    multiple = math.lcm(make_vocab_size_divisible_by, tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple
