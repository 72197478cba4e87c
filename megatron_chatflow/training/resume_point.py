"""Where a run begins, by which plan, and how far it will get. Imports no torch.

The order of the checks is the order of their messages: first whether the folders fit the flags,
then whether the data is that of the checkpoint, then the settings, then the curriculum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megatron_chatflow.checkpoint.branching import find_branch_checkpoint
from megatron_chatflow.checkpoint.run_directory import (
    complete_iterations,
    find_intact_checkpoint,
    read_state,
)
from megatron_chatflow.config import ResolvedConfig, Schedule
from megatron_chatflow.config.schema import CheckpointSettings
from megatron_chatflow.curriculum import BlendPlan, check_exhaustion, forecast, keep_expansion
from megatron_chatflow.data import BlendedDataset
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.training.batch_schedule import Batches, batch_history, fix_length
from megatron_chatflow.training.data_setup import Inputs, make_plan
from megatron_chatflow.training.new_token_ids import new_row_ids
from megatron_chatflow.training.resume_plan import (
    check_identity,
    check_seq_length,
    data_identity,
    resume_plan,
)
from megatron_chatflow.training.resume_settings import check_finetune, resume_settings


@dataclass(frozen=True)
class ResumePoint:
    """Where the run begins: known before any process group is made."""

    config: ResolvedConfig
    """The settings in effect: with the length that they mean from here on (`fix_length`), and with
    the checkpoint's schedule where that was asked for."""
    schedule: Schedule
    """Lengths of the schedule of learning rate and weight decay."""
    blend: BlendedDataset
    batches: tuple[Batches, ...]
    """The batch sizes of the run so far and from here on."""
    iteration: int
    consumed: int
    checkpoint: Path | None
    """Folder to load weights from."""
    state: dict[str, Any] | None
    """The checkpoint's state.json when the run is resumed; None for a new run, --finetune too."""
    new_rows: np.ndarray
    """Tokens whose rows are trained alone at first (--train-new-rows-samples); may be empty."""
    notes: tuple[str, ...]
    """Checkpoints that are skipped because they are damaged, and settings that differ."""


@dataclass(frozen=True)
class RunForecast:
    """How far the run will get."""

    total: int
    """Samples that it may read: fewer than planned if a domain with `on_exhausted: stop` ends."""
    ending: str | None
    """Why it ends before the plan's end."""
    notes: tuple[str, ...]
    """Messages that the user should see once."""


def resolve_resume_point(
    config: ResolvedConfig,
    inputs: Inputs,
    damaged: Mapping[Path, str] = MappingProxyType({}),
    *,
    plan_only: bool = False,
) -> ResumePoint:
    """Decide between resuming, finetuning and a new run, and by which plan.

    Args:
        config: resolved settings.
        inputs: what they name.
        damaged: checkpoints known to be damaged, with what is wrong; the newest before them is
            taken.
        plan_only: compare only what the plan depends on; model and optimizer need not be set.

    Raises:
        ConfigError: checkpoint and settings contradict each other.
    """
    where = config.checkpoint
    checkpoint, notes = _find_checkpoint(where, damaged)
    _check_folders(config, checkpoint)
    new_rows = new_row_ids(config, inputs.vocab_size)
    if checkpoint is None or where.finetune:
        plan = make_plan(config, inputs.curriculum, inputs.epoch_samples)
        if checkpoint is not None and not plan_only:
            notes += check_finetune(checkpoint, read_state(checkpoint), config, inputs.vocab_size)
        return ResumePoint(
            config=config,
            schedule=Schedule.of(config),
            blend=BlendedDataset(plan, inputs.domains),
            batches=batch_history(config),
            iteration=0,
            consumed=0,
            checkpoint=checkpoint,
            state=None,
            new_rows=new_rows,
            notes=tuple(notes),
        )
    state = read_state(checkpoint)
    if "plan" not in state:
        raise ConfigError(
            f"{checkpoint} holds weights only, no run to resume; add --finetune to "
            f"train them, and give --save another folder"
        )
    iteration, consumed = state["iteration"], state["consumed_train_samples"]
    _check_new_rows_phase(config, state)
    ledger = BlendPlan.from_json(state["plan"])
    check_seq_length(ledger, config.data.seq_length)
    check_identity(state["data"], data_identity(config, inputs))
    config = fix_length(config, iteration, consumed)
    schedule = Schedule.of(config)
    if not plan_only:
        resumed = resume_settings(
            checkpoint,
            state,
            config,
            inputs.vocab_size,
            begins_branch=_begins_branch(config, checkpoint),
        )
        config, schedule = resumed.config, resumed.schedule
        notes += resumed.notes
    curriculum = keep_expansion(inputs.curriculum, ledger.preset)
    wanted = make_plan(config, curriculum, inputs.epoch_samples)
    plan = resume_plan(
        ledger, wanted, consumed, amend=config.data.amend_curriculum, curriculum=curriculum
    )
    return ResumePoint(
        config=config,
        schedule=schedule,
        blend=BlendedDataset(plan, inputs.domains),
        batches=batch_history(config, state["batches"], iteration, consumed),
        iteration=iteration,
        consumed=consumed,
        checkpoint=checkpoint,
        state=state,
        new_rows=new_rows,
        notes=tuple(notes),
    )


def _find_checkpoint(
    where: CheckpointSettings, damaged: Mapping[Path, str]
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to load, if there is one, and what the user should see."""
    if where.load is None:
        return None, []
    if where.branch_from is not None:
        assert where.save is not None, "the settings are checked"
        trunk, branch = Path(where.load), Path(where.save)
        return find_branch_checkpoint(trunk, where.branch_from, branch, damaged)
    return find_intact_checkpoint(where.load, where.ckpt_step, damaged)


def _begins_branch(config: ResolvedConfig, checkpoint: Path) -> bool:
    """Whether the run is a branch that has not saved a checkpoint yet."""
    where = config.checkpoint
    return where.branch_from is not None and (
        os.path.realpath(checkpoint.parent) != os.path.realpath(where.save or "")
    )


def _check_folders(config: ResolvedConfig, checkpoint: Path | None) -> None:
    """Refuse flags that contradict what --load and --save hold."""
    where = config.checkpoint
    if (
        where.load
        and checkpoint is None
        and (where.exit_on_missing_checkpoint or where.finetune or where.ckpt_step is not None)
    ):
        raise ConfigError(
            f"load {where.load} holds no checkpoint; give a run directory that has one, or "
            f"drop --load"
        )
    if (
        where.save
        and where.branch_from is None
        and not (where.load and os.path.realpath(where.load) == os.path.realpath(where.save))
        and complete_iterations(Path(where.save))
    ):
        raise ConfigError(
            f"save {where.save} already holds checkpoints of a run; add --load {where.save} "
            f"to resume it, or give --save another folder"
        )
    if config.data.amend_curriculum and (checkpoint is None or where.finetune):
        raise ConfigError(
            "amend_curriculum has no effect without a run to resume; drop "
            "--amend-curriculum or give --load"
        )


def _check_new_rows_phase(config: ResolvedConfig, state: Mapping[str, Any]) -> None:
    """Refuse the first phase of new rows in a run that is past it."""
    consumed = state["consumed_train_samples"]
    if (
        state["iteration"]
        and not state.get("only_new_rows")
        and consumed < config.training.train_new_rows_samples
    ):
        raise ConfigError(
            f"train_new_rows_samples is {config.training.train_new_rows_samples}, but the "
            f"checkpoint at sample {consumed} has trained all weights already, and the phase is "
            "at the start of a run; drop --train-new-rows-samples, or --finetune to start from "
            "scratch"
        )


def forecast_run(start: ResumePoint, inputs: Inputs) -> RunForecast:
    """Check that every domain can give what the plan asks of it, and forecast the run's end.

    Raises:
        ConfigError: a domain cannot.
    """
    plan = start.blend.plan
    check_exhaustion(plan, inputs.epoch_samples)
    outlook = forecast(plan, inputs.epoch_samples)
    ending = None
    if outlook.end < plan.num_samples:
        first = next(
            domain.name for domain in outlook.domains if domain.exhausted_at == outlook.end
        )
        ending = f"{first} runs out at sample {outlook.end} (on_exhausted: stop)"
    notes = list(outlook.warnings)
    if (
        start.state is not None
        and len(plan.segments) > 1
        and plan.segments[-1].start == start.consumed
    ):
        notes.insert(
            0,
            f"amended at sample {start.consumed}: the past is unchanged, the curriculum is "
            f"followed from here on",
        )
    return RunForecast(outlook.end, ending, tuple(notes))
