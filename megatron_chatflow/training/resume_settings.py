"""The settings of a checkpoint compared with those of the command that loads it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config, ResolvedConfig, Schedule, load_values
from megatron_chatflow.config.resume_policy import (
    AT_RESUME,
    BRANCH_MAY_CHANGE,
    WARMUP,
    WEIGHT_DECAY_LENGTH,
    AtResume,
    kind_of,
    model_settings,
    training_settings,
    with_schedule,
    without_effect,
)
from megatron_chatflow.errors import ChatflowError, ConfigError

OVERRIDE, USE_CHECKPOINT = "--override-opt_param-scheduler", "--use-checkpoint-opt_param-scheduler"

_IN_SCHEDULER = {
    "lr": "max_lr", "min_lr": "min_lr", "lr_decay_style": "lr_decay_style", "lr_warmup_samples":
    "lr_warmup_steps",
    "lr_decay_samples": "lr_decay_steps", "weight_decay_incr_style": "wd_incr_style",
    WEIGHT_DECAY_LENGTH: "wd_incr_steps",
}  # fmt: skip
"""{setting: its key in the state of megatron-core's scheduler}."""


@dataclass(frozen=True)
class Resumed:
    """How a run continues."""

    config: ResolvedConfig
    """The settings in effect: the command's, under --use-checkpoint-opt_param-scheduler with the
    checkpoint's optimizer and schedule."""
    schedule: Schedule
    """Lengths of the schedule in effect."""
    notes: tuple[str, ...]
    """Notes for the user: what differs, and what could not be compared."""


@dataclass(frozen=True)
class _Difference:
    name: str
    here: Any
    saved: Any

    def refused(self) -> str:
        return f"{self.name} is {_text(self.here)} here and {_text(self.saved)} in the checkpoint"


def _text(value: Any) -> str:
    return (
        {None: "off", True: "on", False: "off"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def settings_to_save(config: ResolvedConfig, vocab_size: int, schedule: Schedule) -> dict[str, Any]:
    """Return what a checkpoint records of its run's settings: `settings` in state.json."""
    return model_settings(config, vocab_size) | training_settings(config, schedule)


def saved_settings(checkpoint: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint was made with; empty where it does not record them.

    Checkpoints of version 0.1.0 and converted ones record them in the run's config.yaml, and the
    schedule in the state.
    """
    if "settings" in state:
        return state["settings"]
    path = checkpoint.parent / "config.yaml"
    try:
        written = load_values(path) if path.is_file() else {}
    except ChatflowError:  # of a version with other settings
        written = {}
    scheduler, values = state.get("opt_param_scheduler"), {}
    if written:
        config: Any = Config().replace(**written)  # what was written was resolved
        values = model_settings(config, config.tokenizer.vocab_size)
        if scheduler:
            values |= training_settings(config, Schedule.of(config))
    if not scheduler:
        return values
    values |= {name: scheduler[key] for name, key in _IN_SCHEDULER.items()}
    if scheduler["wd_incr_style"] == "constant":
        return values | {"weight_decay": scheduler["start_wd"]}
    return values | {
        "start_weight_decay": scheduler["start_wd"],
        "end_weight_decay": scheduler["end_wd"],
    }


def check_finetune(
    checkpoint: Path, state: Mapping[str, Any], config: Config, vocab_size: int
) -> tuple[str, ...]:
    """Compare the model with that of a checkpoint to finetune; returns notes for the user.

    Raises:
        ConfigError: the weights are of another model; names every setting that differs.
    """
    saved, here = saved_settings(checkpoint, state), model_settings(config, vocab_size)
    found = _differences(saved, here)
    _refuse({AtResume.MODEL: _of_kind(found, AtResume.MODEL)})
    notes = [
        _reported(
            "in effect with --finetune", _of_kind(found, AtResume.POSITIONS), "in the checkpoint"
        )
    ]
    return tuple(note for note in [*notes, _not_compared(checkpoint, saved, here)] if note)


def resume_settings(
    checkpoint: Path,
    state: Mapping[str, Any],
    config: ResolvedConfig,
    vocab_size: int,
    *,
    begins_branch: bool = False,
) -> Resumed:
    """Compare the settings of a run with those of the checkpoint that it continues from.

    Args:
        checkpoint: the folder.
        state: its state.json.
        config: this command's settings, resolved, with their length (`fix_length`).
        vocab_size: tokens without padding.
        begins_branch: whether a branch begins here, whose schedule may end differently.

    Raises:
        ConfigError: settings differ that may not, or not without a flag; names every one of them
            with both values.
    """
    schedule = Schedule.of(config)
    saved, here = saved_settings(checkpoint, state), settings_to_save(config, vocab_size, schedule)
    found = _differences(saved, here)
    o = config.optimizer
    takes_one = o.override_opt_param_scheduler or o.use_checkpoint_opt_param_scheduler
    branched: list[_Difference] = []
    if begins_branch and not takes_one:
        free = _free_in_branch(saved, here, state["consumed_train_samples"])
        branched = [difference for difference in found if difference.name in free]
        found = [difference for difference in found if difference.name not in free]
    refused = [AtResume.MODEL, AtResume.POSITIONS]
    if state["optimizer"] and not config.checkpoint.no_load_optim:
        refused.append(AtResume.KIND)
        if (
            o.override_opt_param_scheduler
            and o.optimizer == "sgd"
            and o.sgd_momentum
            and saved.get("sgd_momentum") == 0
        ):
            raise ConfigError(
                f"sgd_momentum is {o.sgd_momentum} here and 0.0 in the checkpoint, which holds no "
                f"momentum; "
                "add --no-load-optim to start without"
            )
    if not takes_one:
        refused.append(AtResume.SCHEDULE)
    _refuse({kind: _of_kind(found, kind) for kind in refused})
    scheduled = _of_kind(found, AtResume.SCHEDULE)
    notes = [
        _reported(
            f"changed from iteration {state['iteration'] + 1} on",
            _of_kind(found, AtResume.REPORTED, AtResume.KIND),
            "before",
        ),
        _reported(
            f"changed by the branch from iteration {state['iteration'] + 1} on", branched, "before"
        ),
    ]
    if o.override_opt_param_scheduler:
        notes.append(_reported(f"this command's ({OVERRIDE})", scheduled, "in the checkpoint"))
    elif o.use_checkpoint_opt_param_scheduler:
        swapped = [_Difference(d.name, d.saved, d.here) for d in scheduled]
        notes.append(_reported(f"the checkpoint's ({USE_CHECKPOINT})", swapped, "in this command"))
        config = with_schedule(
            config,
            {name: value for name, value in saved.items() if kind_of(name) == AtResume.SCHEDULE},
        )
        schedule = dataclasses.replace(
            Schedule.of(config), total=saved.get(WEIGHT_DECAY_LENGTH, schedule.total)
        )
    notes.append(_not_compared(checkpoint, saved, here))
    return Resumed(config, schedule, tuple(note for note in notes if note))


def _free_in_branch(
    saved: Mapping[str, Any], here: Mapping[str, Any], consumed: int
) -> frozenset[str]:
    """Return the settings of the schedule that a branch after `consumed` samples may change."""
    lengths = [values.get("lr_warmup_samples") for values in (saved, here)]
    is_over = all(length is not None and length < consumed for length in lengths)
    return BRANCH_MAY_CHANGE | WARMUP if is_over else BRANCH_MAY_CHANGE


def check_optimizer_group(group: Mapping[str, Any], config: ResolvedConfig) -> str | None:
    """Compare the settings with those that the optimizer of an old checkpoint really used.

    Version 0.1.0 recorded the command's settings and continued with the checkpoint's, so its
    config.yaml may be wrong.

    Args:
        group: the first parameter group of the optimizer, as saved.
        config: the settings in effect.

    Returns:
        A note for the user, or None.

    Raises:
        ConfigError: they differ, and --override-opt_param-scheduler is not given.
    """
    o = config.optimizer
    used = {"lr": group.get("max_lr"), "min_lr": group.get("min_lr")}
    if o.optimizer == "adam":
        used |= dict(
            zip(("adam_beta1", "adam_beta2"), group.get("betas", (None, None)), strict=True)
        ) | {"adam_eps": group.get("eps")}
    else:
        used["sgd_momentum"] = group.get("momentum")
    found = [
        _Difference(name, getattr(o, name), value)
        for name, value in used.items()
        if value is not None and value != getattr(o, name)
    ]
    if found and not o.override_opt_param_scheduler:
        listed = ", ".join(
            f"{d.name} is {_text(d.here)} here and was {_text(d.saved)}" for d in found
        )
        raise ConfigError(
            f"the optimizer of the checkpoint used other settings than its config.yaml records: "
            f"{listed}; add {OVERRIDE} to take those here"
        )
    return _reported(f"this command's ({OVERRIDE})", found, "in the optimizer of the checkpoint")


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[_Difference]:
    idle = without_effect(dict(saved)) & without_effect(dict(here))
    return [
        _Difference(name, here[name], saved[name])
        for name in here
        if name in saved and saved[name] != here[name] and name not in idle
    ]


def _of_kind(found: list[_Difference], *kinds: AtResume) -> list[_Difference]:
    return [difference for difference in found if kind_of(difference.name) in kinds]


_WHAT_TO_DO = {
    AtResume.MODEL: "give the checkpoint's, its weights are of that model",
    AtResume.POSITIONS: "give the checkpoint's, or --finetune to start a new run from its weights",
    AtResume.KIND: "give the checkpoint's, or --no-load-optim to start without its optimizer state",
    AtResume.SCHEDULE: (
        f"add {OVERRIDE} to take this command's or {USE_CHECKPOINT} to take the checkpoint's"
    ),
}


def _refuse(found: Mapping[AtResume, list[_Difference]]) -> None:
    """Raise ConfigError with all differences in one message, by class and with what to do."""
    parts = [
        ", ".join(d.refused() for d in differences) + f"; {_WHAT_TO_DO[kind]}"
        for kind, differences in found.items()
        if differences
    ]
    if parts:
        raise ConfigError(". Also, ".join(parts))


def _reported(what: str, found: list[_Difference], then: str) -> str | None:
    listed = ", ".join(f"{d.name} {_text(d.here)} ({then}: {_text(d.saved)})" for d in found)
    return f"{what}: {listed}" if found else None


def _not_compared(
    checkpoint: Path, saved: Mapping[str, Any], here: Mapping[str, Any]
) -> str | None:
    if not set(saved) & set(here):
        model = all(AT_RESUME[name] in (AtResume.MODEL, AtResume.POSITIONS) for name in here)
        what = "the model is" if model else "they are"
        return f"{checkpoint} does not record its settings, so {what} not compared"
    missing = [
        name for name in here if name not in saved and name not in without_effect(dict(here))
    ]
    return (
        f"not compared, {checkpoint} does not record them: {', '.join(missing)}"
        if missing
        else None
    )
