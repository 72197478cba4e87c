"""The section ``training``: batches, length and precision of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, convert_to, flag_name, switch_field

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")
"""Parts of a layer that can be recomputed."""


@dataclass(frozen=True)
class TrainingSettings(Section):
    """Batches, length and precision of the run."""

    _positive = ("micro_batch_size",)
    _intervals = (
        "exit_interval",
        "exit_duration_in_mins",
        "check_weight_hash_across_dp_replicas_interval",
    )

    micro_batch_size: int = 1
    """Samples in one forward pass of one data-parallel rank."""
    global_batch_size: int | None = None
    """Samples in one optimizer step over all data-parallel ranks; micro_batch_size x data-parallel
    size by default.
    """
    rampup_batch_size: list[int] | None = None
    """START INCREMENT SAMPLES: grow the global batch from START by INCREMENT in equal steps over
    SAMPLES samples.
    """
    train_iters: int | None = None
    """Length of the run in iterations (or give --train-samples)."""
    train_samples: int | None = None
    """Length of the run in samples (or give --train-iters)."""
    seed: int = 1234
    """Seed of the initial weights, the order of the data and dropout."""
    bf16: bool = False
    """Compute in bfloat16 with float32 main parameters; float32 throughout by default."""
    accumulate_allreduce_grads_in_fp32: bool = switch_field(off="--grad-reduce-in-bf16")
    """Accumulate and reduce gradients in float32 under --bf16 (always on here unless
    --grad-reduce-in-bf16 is given).
    """
    recompute_granularity: Literal["full", "selective"] | None = None
    """Store fewer activations and recompute them in the backward pass: full for entire layers,
    selective for parts of each; off by default.
    """
    recompute_method: Literal["uniform", "block"] | None = None
    """Layers that --recompute-granularity full applies to: uniform takes all of them in groups of
    --recompute-num-layers, block the first --recompute-num-layers of each pipeline stage (of each
    model chunk, when interleaved)."""
    recompute_num_layers: int | None = None
    """Layers in a group of --recompute-method uniform, or layers that --recompute-method block
    recomputes.
    """
    recompute_modules: list[str] | None = None
    """Parts that --recompute-granularity selective recomputes: core_attn (the default), mlp,
    layernorm.
    """
    check_for_nan_in_loss_and_grad: bool = True
    """Skip the step when the loss or the gradient norm is not finite; --max-nonfinite-iterations
    sets when to stop.
    """
    max_nonfinite_iterations: int = 3
    """Consecutive iterations that are skipped because the loss or the gradient norm is not finite
    or no token has loss (their samples count as read, the weights stay unchanged); one more stops
    the run and reports the samples."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Iterations between checks that the weights of all data-parallel replicas are equal and
    finite; where they are not, the run stops and reports ranks and weights. Off by default: each
    check copies all weights to the host."""
    iterations_to_skip: list[int] | None = None
    """Iterations whose samples are skipped without training, e.g. those that caused a loss spike.
    """
    train_new_rows_samples: int = 0
    """Samples (rounded to complete iterations) at the start over which only the embedding and
    output rows of the tokens that an extended tokenizer added are trained, without weight decay;
    token_map.json next to the tokenizer lists these tokens."""
    ema_decay: float | None = None
    """Keep a running mean of the weights, X x mean + (1 - X) x weights after every iteration, in
    float32; it is saved with every checkpoint."""
    exit_interval: int | None = None
    """Save and exit after every iteration that is a multiple of this."""
    exit_duration_in_mins: int | None = None
    """Save and exit after this many minutes, with the exit code of a preempted run."""
    use_cpu_initialization: bool = False
    """Draw initial weights on the CPU, the same for every layout; always on without a CUDA device.
    """

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        errors = super().validate()
        if self.ema_decay is not None and self.ema_decay >= 0 and not 0 < self.ema_decay < 1:
            errors.append(
                f"ema_decay is {self.ema_decay}; give --ema-decay a number between 0 and 1, "
                "e.g. 0.999"
            )
        return errors + self._recompute_errors()

    def length_errors(self) -> list[str]:
        """Return the errors in the length of the run, which only training and the blend need."""
        if self.train_iters is None and self.train_samples is None:
            return ["the run has no length; give --train-iters or --train-samples"]
        if self.train_iters is not None and self.train_samples is not None:
            return ["train_iters and train_samples are both given; drop one of them"]
        if not (self.train_iters or self.train_samples):
            return ["the run is 0 long; give --train-iters or --train-samples a positive number"]
        return []

    def resolve(self, data_parallel_size: int) -> ResolvedTrainingSettings:
        """Fill in the global batch size and the parts of a layer to recompute."""
        modules = self.recompute_modules
        if self.recompute_granularity == "selective":
            modules = modules or ["core_attn"]
        return convert_to(
            ResolvedTrainingSettings,
            self,
            global_batch_size=self.global_batch_size or self.micro_batch_size * data_parallel_size,
            recompute_modules=modules,
        )

    def _recompute_errors(self) -> list[str]:
        details = ("recompute_method", "recompute_num_layers", "recompute_modules")
        given = [name for name in details if getattr(self, name) is not None]
        if self.recompute_granularity is None:
            return [
                f"{name} has no effect without recompute_granularity; add "
                "--recompute-granularity full or selective, or drop it"
                for name in given
            ]
        if self.recompute_granularity == "full":
            return self._full_recompute_errors()
        errors = [
            f"{name} belongs to recompute_granularity full; drop {flag_name(name)} or write full"
            for name in given
            if name != "recompute_modules"
        ]
        for name in self.recompute_modules or ():
            if name not in RECOMPUTE_MODULES:
                errors.append(
                    f"recompute_modules has {name!r}; the parts of a layer are "
                    f"{', '.join(RECOMPUTE_MODULES)}"
                )
        return errors

    def _full_recompute_errors(self) -> list[str]:
        errors = []
        if self.recompute_modules is not None:
            errors.append(
                "recompute_modules belongs to recompute_granularity selective; drop "
                "--recompute-modules or write selective"
            )
        if self.recompute_method is None or self.recompute_num_layers is None:
            errors.append(
                "recompute_granularity full needs recompute_method and recompute_num_layers; "
                "add --recompute-method uniform --recompute-num-layers 1"
            )
        return errors


@dataclass(frozen=True)
class ResolvedTrainingSettings(TrainingSettings):
    """Batches, length and precision with the global batch size known."""

    global_batch_size: int = 0
