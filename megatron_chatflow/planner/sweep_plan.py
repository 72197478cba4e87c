r"""The runs of a sweep: a pure function of its file.

Several lengths of one size, share and seed share a trunk at a constant learning rate. From the
point where the cooldown of a length begins, a branch continues over the rest of that length with a
rate that decays. The trunk is divided into legs, one per length, each a run directory that
continues the one before. So a directory that is finished never changes, and lengths can be added.

    leg 1 ---> leg 2 ---> leg 3            constant rate
        \          \          \
         shortest   next       longest     the rate decays
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config, ResolvedConfig, resolve
from megatron_chatflow.config.resume_policy import AT_RESUME, AtResume
from megatron_chatflow.config.schema import section_of
from megatron_chatflow.errors import ConfigError, ErrorCollector, messages_of
from megatron_chatflow.planner.parameters import flops_per_token, scaling_law_parameters
from megatron_chatflow.planner.sweep_file import Sweep, relative_stages

KEPT_CHECKPOINTS = 2
"""Checkpoints that a run keeps where the base does not say it."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep."""

    name: str
    """Of its directory."""
    size: str
    share: str
    seed: int
    iterations: int
    """Its last iteration."""
    first: int
    """Iterations that it takes over from its parent."""
    parent: str | None
    """The leg that it continues."""
    start: str | None
    """Run directory whose weights it starts with."""
    is_leg: bool
    """Whether it is part of a trunk, and not in the table."""
    config: ResolvedConfig
    written: Config
    """The settings as `train` gets them."""

    @property
    def iteration_tokens(self) -> int:
        """Tokens of an iteration."""
        return self.config.training.global_batch_size * self.config.data.seq_length

    @property
    def tokens(self) -> int:
        """Training tokens at its end, those of its parents included."""
        return self.iterations * self.iteration_tokens

    @property
    def own_tokens(self) -> int:
        """Tokens that it trains on itself."""
        return (self.iterations - self.first) * self.iteration_tokens

    def params(self, vocab_size: int) -> int:
        """Return N of the laws."""
        return scaling_law_parameters(self.config, vocab_size)

    def flops(self, vocab_size: int) -> float:
        """Return the floating-point operations that it does itself."""
        return flops_per_token(self.config, vocab_size) * self.own_tokens

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide what the run computes, without its curriculum's path."""
        kinds = (AtResume.LAYOUT, AtResume.CONTROL, AtResume.CURRICULUM)
        values = {
            name: getattr(getattr(self.written, section), name)
            for name, section in section_of().items()
            if AT_RESUME[name] not in kinds
        }
        return values | {"start": self.start}


def plan_runs(sweep: Sweep) -> list[list[PlannedRun]]:
    """Return the runs of a sweep in groups.

    A group has one size, share and seed; a run comes after its parent. Groups are independent.

    Raises:
        ConfigErrors: settings cannot be used, or do not fit a sweep.
    """
    errors, groups = ErrorCollector(), []
    for size in sweep.sizes:
        try:
            _check_size(sweep, size)
            groups += [
                list(_group(sweep, size, share, seed))
                for share in sweep.curricula
                for seed in sweep.seeds
            ]
        except ConfigError as error:
            errors.add(*(f"{sweep.source}: sizes.{size}: {text}" for text in messages_of(error)))
    errors.raise_all()
    return groups


def curriculum_path(sweep: Sweep, share: str) -> Path:
    """Return the curriculum file that the sweep writes for the runs of a share."""
    return sweep.runs / "curricula" / f"{share or 'base'}.yaml"


def length_name(tokens: int) -> str:
    """Return a short, exact name of a number of tokens: 1500000 is 1.5M."""
    for size, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size and tokens % (size // 100) == 0:
            return f"{tokens / size:.2f}".rstrip("0").rstrip(".") + suffix
    return str(tokens)


def _check_size(sweep: Sweep, size: str) -> None:
    config = sweep.sizes[size]
    if config.training.rampup_batch_size:
        raise ConfigError(
            "rampup_batch_size: lengths are counted in complete batches of one size; remove it "
            "from the base"
        )
    if len(sweep.tokens) == 1:
        return
    if config.optimizer.lr_warmup_fraction is not None:
        raise ConfigError(
            f"lr_warmup_fraction {config.optimizer.lr_warmup_fraction} depends on the length, and "
            "all lengths share a trunk; give lr_warmup_iters or lr_warmup_samples"
        )
    for share, curriculum in sweep.curricula.items():
        if found := relative_stages(curriculum):
            where = f"shares.{share}" if share else "the base's curriculum"
            raise ConfigError(
                f"{where}: stage {found[0]!r} is at a percentage of the run, and all lengths "
                "share a trunk; give its position in the clock's unit, or one length"
            )


def _group(sweep: Sweep, size: str, share: str, seed: int) -> Iterator[PlannedRun]:
    prefix = "-".join([size, *([share] if share else []), *([f"seed{seed}"] * sweep.names_seeds)])
    start = sweep.start
    for key, value in {"size": size, "share": share, "seed": str(seed)}.items():
        start = start.replace(f"{{{key}}}", value) if start is not None else None
    shared = _shared_settings(sweep, size, share, seed)
    begin: dict[str, Any] = {"load": start, "finetune": True} if start else {}
    begun, leg = 0, None
    seen: dict[int, int] = {}
    for tokens in sweep.tokens:
        end, cooled = _points(sweep, shared, tokens)
        if end in seen:
            raise ConfigError(
                f"tokens: {seen[end]} and {tokens} are both {end} iterations; give lengths that "
                "differ by a global batch"
            )
        seen[end] = tokens
        if len(sweep.tokens) > 1 and cooled != begun:  # cooldowns may begin at the same iteration
            name = f"{prefix}-trunk-{cooled}"
            leg_settings = {"train_iters": cooled, "lr_decay_style": "constant"}
            leg_settings |= {"eval_interval": None, **begin}
            yield _run(sweep, name, shared, leg_settings, size, share, seed, begun, leg, start)
            begun, leg, start = cooled, name, None
            begin = {"load": str(sweep.runs / name), "branch_from": cooled}
        name = f"{prefix}-{length_name(tokens)}"
        ending = {"train_iters": end, "lr_decay_style": "WSD", "lr_wsd_decay_iters": end - cooled}
        ending |= begin
        yield _run(sweep, name, shared, ending, size, share, seed, begun, leg, start)


def _shared_settings(sweep: Sweep, size: str, share: str, seed: int) -> Config:
    config = sweep.sizes[size]
    keep = config.checkpoint.most_recent_k, config.checkpoint.save_retain_interval
    return config.replace(
        seed=seed,
        curriculum=str(curriculum_path(sweep, share)),
        data_path=None,
        train_samples=None,
        lr_decay_iters=None,
        lr_decay_samples=None,
        lr_wsd_decay_iters=None,
        lr_wsd_decay_samples=None,
        load=None,
        finetune=False,
        branch_from=None,
        ckpt_step=None,
        no_load_optim=False,
        no_save_optim=False,
        exit_interval=None,
        exit_duration_in_mins=None,
        tensorboard_dir=None,
        amend_curriculum=False,
        override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False,
        most_recent_k=KEPT_CHECKPOINTS if keep == (None, None) else keep[0],
    )


def _points(sweep: Sweep, shared: Config, tokens: int) -> tuple[int, int]:
    """Return (iterations of a length, the iteration after which its rate decays)."""
    length = shared.replace(train_iters=1, lr_decay_style="constant")
    config = resolve(length.replace(lr_warmup_iters=0, lr_warmup_samples=0), sweep.processes)
    batch = config.training.global_batch_size
    end = round(tokens / (batch * config.data.seq_length))
    cooled = end - max(1, round(sweep.cooldown * end))
    warmup = shared.optimizer.lr_warmup_iters or -(-shared.optimizer.lr_warmup_samples // batch)
    if cooled <= max(warmup, 0):
        raise ConfigError(
            f"tokens: {tokens} are {end} iterations of {batch * config.data.seq_length} tokens, of "
            f"which {warmup} are warm-up and {end - cooled} cooldown; give a longer length, or "
            "a smaller batch, warm-up or cooldown"
        )
    return end, cooled


def _run(
    sweep: Sweep,
    name: str,
    shared: Config,
    settings: dict[str, Any],
    size: str,
    share: str,
    seed: int,
    first: int,
    parent: str | None,
    start: str | None,
) -> PlannedRun:
    folder = str(sweep.runs / name)
    written = shared.replace(**{"save": folder, "load": folder, **settings})
    is_leg = settings["lr_decay_style"] == "constant"
    if not is_leg and not written.validation.eval_interval:
        written = written.replace(eval_interval=settings["train_iters"])
    return PlannedRun(
        name=name,
        size=size,
        share=share,
        seed=seed,
        iterations=settings["train_iters"],
        first=first,
        parent=parent,
        start=start,
        is_leg=is_leg,
        config=resolve(written, sweep.processes),
        written=written,
    )
