"""The section ``optimizer``: the optimizer, its learning rate and its weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_chatflow.config.schema.section import Section, convert_to, flag_field
from megatron_chatflow.errors import ConfigError

_ALTERNATIVES = (
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples"),
    ("lr_warmup_fraction", "lr_warmup_iters"),
    ("lr_warmup_fraction", "lr_warmup_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
)
"""Pairs of settings of which only one may be given."""

_NO_LR = "lr is missing; give --lr, e.g. --lr 1e-4"


@dataclass(frozen=True)
class OptimizerSettings(Section):
    """The optimizer, its learning rate and its weight decay."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer; adam is AdamW (decoupled weight decay)."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay. A decay to zero erases much of what the last stages
    teach: a third of --lr is a good minimum.
    """
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Form of the decay after the warm-up."""
    lr_decay_iters: int | None = None
    """Iterations over which the learning rate decays; the entire run by default."""
    lr_decay_samples: int | None = None
    """Samples over which the learning rate decays; the entire run by default."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Linear warm-up as a fraction of the decay's length."""
    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Form of the last phase of WSD (warm-up, stable, decay)."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the last phase of WSD."""
    lr_wsd_decay_samples: int | None = None
    """Samples of the last phase of WSD."""
    weight_decay: float = 0.01
    """Weight decay, on matrices only."""
    start_weight_decay: float | None = None
    """Weight decay at the start, when --weight-decay-incr-style is not constant."""
    end_weight_decay: float | None = None
    """Weight decay at the end, when --weight-decay-incr-style is not constant."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay changes over the run."""
    clip_grad: float = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of --optimizer sgd."""
    override_opt_param_scheduler: bool = flag_field("--override-opt_param-scheduler")
    """On --load take the optimizer settings of this command where they differ from those of the
    checkpoint: learning rate and weight decay with their schedules, clipping, betas, epsilon,
    momentum."""
    use_checkpoint_opt_param_scheduler: bool = flag_field("--use-checkpoint-opt_param-scheduler")
    """On --load take the optimizer settings of the checkpoint, not those of this command."""

    def validate(self) -> list[str]:
        """Return what is wrong with this section alone, one message per error."""
        errors = [*super().validate(), *self._rate_errors(), *self._weight_decay_errors()]
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            errors.append(
                "override_opt_param_scheduler and use_checkpoint_opt_param_scheduler contradict "
                "each other; drop one of them"
            )
        return errors

    def resolve(self) -> ResolvedOptimizerSettings:
        """Return the same settings with a learning rate. Raises ConfigError where it is missing."""
        if self.lr is None:
            raise ConfigError(_NO_LR)
        return convert_to(ResolvedOptimizerSettings, self)

    def _rate_errors(self) -> list[str]:
        errors = []
        if self.lr is None:
            errors.append(_NO_LR)
        else:
            if self.min_lr > self.lr:
                errors.append(f"min_lr {self.min_lr} is larger than lr {self.lr}; lower --min-lr")
            if self.lr_warmup_init > self.lr:
                errors.append(
                    f"lr_warmup_init {self.lr_warmup_init} is larger than lr {self.lr}; lower "
                    "--lr-warmup-init"
                )
        errors += [
            f"{a} and {b} are both given; drop one of them"
            for a, b in _ALTERNATIVES
            if getattr(self, a) and getattr(self, b)
        ]
        if self.lr_warmup_fraction is not None and self.lr_warmup_fraction >= 1:
            errors.append(
                f"lr_warmup_fraction is {self.lr_warmup_fraction}; give a number from 0 up to, "
                "not including, 1"
            )
        if self.lr_decay_style == "WSD" and not (
            self.lr_wsd_decay_iters or self.lr_wsd_decay_samples
        ):
            errors.append(
                "lr_decay_style WSD needs the length of its last phase; give "
                "--lr-wsd-decay-iters or --lr-wsd-decay-samples"
            )
        return errors

    def _weight_decay_errors(self) -> list[str]:
        start, end, style = (
            self.start_weight_decay,
            self.end_weight_decay,
            self.weight_decay_incr_style,
        )
        if style == "constant":
            if start is None and end is None:
                return []
            return [
                "start_weight_decay and end_weight_decay have no effect with "
                "weight_decay_incr_style constant; give --weight-decay instead"
            ]
        if start is None or end is None:
            return [
                f"weight_decay_incr_style {style} needs start_weight_decay and end_weight_decay; "
                "give both"
            ]
        if start > end:
            return [f"start_weight_decay {start} is larger than end_weight_decay {end}; swap them"]
        return []


@dataclass(frozen=True)
class ResolvedOptimizerSettings(OptimizerSettings):
    """The optimizer with its learning rate known."""

    lr: float = 0.0
