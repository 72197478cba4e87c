"""From checked inputs to a run that can take its next step: process groups, model, optimizer,
checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_chatflow import __version__
from megatron_chatflow.checkpoint.run_directory import (
    complete_iterations,
    find_sound_checkpoint,
    read_state,
)
from megatron_chatflow.config import Config, Schedule, to_yaml
from megatron_chatflow.curriculum import BlendPlan, check_exhaustion, forecast
from megatron_chatflow.data import BlendedDataset
from megatron_chatflow.distributed.launch import Launch
from megatron_chatflow.errors import ChatflowError, ConfigError
from megatron_chatflow.training.batch_schedule import Batches, batch_history, fix_length
from megatron_chatflow.training.data_setup import Inputs, make_plan
from megatron_chatflow.training.new_token_ids import new_row_ids
from megatron_chatflow.training.resume_plan import (
    check_identity,
    check_seq_length,
    data_identity,
    resume_plan,
)
from megatron_chatflow.training.resume_settings import (
    check_finetune,
    check_optimizer_group,
    resume_settings,
    saved_settings,
)
from megatron_chatflow.utils.files import unwritable

if TYPE_CHECKING:
    from megatron_chatflow.checkpoint.lease import Lease
    from megatron_chatflow.checkpoint.saver import Saver
    from megatron_chatflow.distributed.heartbeat import Lifeline


@dataclass(frozen=True)
class Start:
    """Where the run begins: known before any process group is made."""

    config: Config
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
    """The checkpoint's state when the run is resumed; None when it starts afresh (also under
    --finetune).
    """
    new_rows: np.ndarray
    """The tokens whose rows are trained alone at first (--train-new-rows-samples); none where the
    setting is off.
    """
    notes: tuple[str, ...]
    """Checkpoints that are passed over because they are damaged, and settings that differ."""


def find_start(
    config: Config,
    inputs: Inputs,
    damaged: Mapping[Path, str] = MappingProxyType({}),
    *,
    plan_only: bool = False,
) -> Start:
    """Resume, finetune or start a new run, and with which plan.

    Args:
        config: resolved settings.
        inputs: what they name.
        damaged: checkpoints known to be damaged, with what is wrong; the newest before them is
        taken. plan_only: compare only what the plan depends on; model and optimizer need not be
        set.

    Raises:
        ConfigError: checkpoint and settings contradict each other.
    """
    where = config.checkpoint
    checkpoint, notes = (
        find_sound_checkpoint(where.load, where.ckpt_step, damaged) if where.load else (None, [])
    )
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
    new_rows = new_row_ids(config, inputs.vocab_size)
    if checkpoint is None or where.finetune:
        plan = make_plan(config, inputs.curriculum, inputs.epoch_samples)
        if checkpoint is not None and not plan_only:
            notes += check_finetune(checkpoint, read_state(checkpoint), config, inputs.vocab_size)
        schedule, batches, blend = (
            Schedule.of(config),
            batch_history(config),
            BlendedDataset(plan, inputs.domains),
        )
        return Start(
            config, schedule, blend, batches, 0, 0, checkpoint, None, new_rows, tuple(notes)
        )
    state = read_state(checkpoint)
    if "plan" not in state:
        raise ConfigError(
            f"{checkpoint} holds weights only, no run to go on with; add --finetune to "
            f"train them, and give --save a folder of its own"
        )
    iteration, consumed = state["iteration"], state["consumed_train_samples"]
    if (
        iteration
        and not state.get("only_new_rows")
        and consumed < config.training.train_new_rows_samples
    ):
        raise ConfigError(
            f"train_new_rows_samples is {config.training.train_new_rows_samples}, but the "
            f"checkpoint at sample {consumed} has trained all weights "
            "already, and the phase stands at the start of a run; drop "
            "--train-new-rows-samples, or --finetune to start afresh"
        )
    ledger = BlendPlan.from_json(state["plan"])
    check_seq_length(ledger, config.data.seq_length)
    check_identity(state["data"], data_identity(config, inputs))
    config = fix_length(config, iteration, consumed)
    schedule = Schedule.of(config)
    if not plan_only:
        resumed = resume_settings(checkpoint, state, config, inputs.vocab_size)
        config, schedule = resumed.config, resumed.schedule
        notes += resumed.notes
    wanted = make_plan(config, inputs.curriculum, inputs.epoch_samples)
    plan = resume_plan(
        ledger, wanted, consumed, amend=config.data.amend_curriculum, curriculum=inputs.curriculum
    )
    batches = batch_history(config, state["batches"], iteration, consumed)
    blend, told = BlendedDataset(plan, inputs.domains), tuple(notes)
    return Start(
        config, schedule, blend, batches, iteration, consumed, checkpoint, state, new_rows, told
    )


@dataclass(frozen=True)
class Outlook:
    """How far the run will get."""

    total: int
    """Samples that it may read: fewer than the plan's where a domain runs out under `on_exhausted:
    stop`.
    """
    ending: str | None
    """Why it ends before the plan's end."""
    notes: tuple[str, ...]
    """Sentences that the user should see once."""


def look_ahead(start: Start, inputs: Inputs) -> Outlook:
    """Checks that every domain can give what the plan asks of it. Raises ValueError where one
    cannot.
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
            (
                f"amended at sample {start.consumed}: the past stays as it was, the curriculum "
                f"is followed from here on"
            ),
        )
    return Outlook(outlook.end, ending, tuple(notes))


@dataclass
class Run:
    """A run between two steps."""

    config: Config
    schedule: Schedule
    launch: Launch
    inputs: Inputs
    blend: BlendedDataset
    outlook: Outlook
    batches: tuple[Batches, ...]
    device: Any
    transformer_impl: str
    model: list[Any]
    optimizer: Any
    scheduler: Any
    forward_step: Callable[..., Any]
    shape: Mapping[str, int]
    iteration: int
    consumed: int
    average: Any
    """The running mean of the weights (training.average.WeightAverage), or None."""
    new_rows: Any
    """The rows that are trained alone at first (training.new_rows.NewRows), or None."""
    only_new_rows: bool
    """Whether the last iteration trained these alone."""
    validated: bool
    """Whether the validation that was due after the last iteration, or before the first, was
    made.
    """
    resumed_from: Path | None
    """The checkpoint that the run continues; None where it starts."""

    @property
    def plan(self) -> BlendPlan:
        """Which sample of which domain is read when."""
        return self.blend.plan

    @property
    def held_out_names(self) -> tuple[str, ...]:
        """What is validated on: the plan's domains, then the named validation sets."""
        return (*self.plan.domain_names, *self.inputs.curriculum.validation)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes and prints."""
        return self.launch.rank == 0


def _facts(start: Start, inputs: Inputs) -> dict[str, str]:
    """What must be the same on every process, in short forms."""
    corpora = {
        f"the corpus of {name}": fingerprint[:12]
        for name, fingerprint in data_identity(start.config, inputs)["corpora"].items()
    }
    return corpora | {
        "the version": __version__,
        "the settings": hashlib.sha256(to_yaml(start.config).encode()).hexdigest()[:12],
        "the plan": start.blend.plan.fingerprint()[:12],
        "the checkpoint": str(start.checkpoint),
    }


@contextmanager
def saving(config: Config, lease: Lease | None) -> Iterator[Saver | None]:
    """What saves the run, where --save is given. Entered before `join`, so its process shares no
    process groups and no weights with this one.

    `lease`: that of the run directory.
    """
    from megatron_chatflow.distributed import cuda_shim, process_groups

    process_groups.hide_engine_warnings()
    cuda_shim.install()
    from megatron_chatflow.checkpoint.saver import Saver

    where = config.checkpoint
    if not where.save:
        yield None
        return
    with Saver(Path(where.save), where.most_recent_k, where.save_retain_interval, lease) as saver:
        yield saver


def claim(lease: Lease | None, say: Callable[[str], None]) -> None:
    """Have rank 0 take the lease of the run directory; called by every rank, after `join`.

    Raises on every rank alike:
        ConfigError: another run holds it, or the folder cannot be written.
        WriteError: the disk is full.
    """
    from megatron_chatflow.distributed.consistency_check import on_first_rank

    def acquire() -> None:
        try:
            lease.acquire(say)
        except OSError as error:
            raise unwritable("save", lease.folder, error) from None

    if lease is not None:
        on_first_rank(acquire, ChatflowError)


def join(launch: Launch, config: Config) -> Lifeline | None:
    """Make this process one of the job's, with megatron-core's process groups; returns what reports
    to the others why it failed, where there are others."""
    from megatron_chatflow.distributed import process_groups

    return process_groups.initialize(launch, config.parallel, config.model.num_layers)


def find_sound_start(config: Config, inputs: Inputs, start: Start) -> Start:
    """`start`, or an earlier one if its checkpoint turns out to be damaged when the ranks read all
    of it. Raises ConfigError where none is sound.

    Before that all ranks compare what they are about to run. Raises ConfigError where it is not the
    same.
    """
    from megatron_chatflow.checkpoint.state_dict import find_damage
    from megatron_chatflow.distributed.consistency_check import require_agreement

    require_agreement(_facts(start, inputs))
    damaged: dict[Path, str] = {}
    while start.checkpoint is not None and (wrong := find_damage(start.checkpoint)):
        damaged[start.checkpoint] = wrong
        start = find_start(config, inputs, damaged)
    return start


def assemble(
    launch: Launch, inputs: Inputs, start: Start, outlook: Outlook, say: Callable[[str], None]
) -> Run:
    """Model, optimizer and, where there is one, the checkpoint, over the groups of `join`. `say`
    prints a line (on one rank only).
    """
    config = start.config
    import torch
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_chatflow.checkpoint import state_dict
    from megatron_chatflow.checkpoint.ema import WeightAverage
    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.bf16_matmul import uses_float32
    from megatron_chatflow.distributed.kernels import describe_cpu
    from megatron_chatflow.model.forward import make_forward_step, schedule_shape
    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.model.spec import choose_transformer_impl
    from megatron_chatflow.planner.parameters import count_parameters
    from megatron_chatflow.training.lr_check import late_stage_note
    from megatron_chatflow.training.new_token_phase import NewRows
    from megatron_chatflow.training.optimizer import build_optimizer, build_scheduler

    impl, reason = choose_transformer_impl(config)
    if reason:
        say(reason)
    device = process_groups.device(launch.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // max(1, launch.world_size)))
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)
    dp = process_groups.data_parallel()[1]
    init_num_microbatches_calculator(
        launch.rank,
        config.training.rampup_batch_size,
        config.training.global_batch_size,
        config.training.micro_batch_size,
        dp,
    )
    model = build_model(config, inputs.vocab_size, impl)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, start.schedule, optimizer)
    processes = (
        f"{launch.world_size} process{'es' if launch.world_size > 1 else ''} ({launch.launcher})"
    )
    cpu_note = f" ({describe_cpu(uses_float32())})" if device.type == "cpu" else ""
    layout = (
        f"TP {config.parallel.tensor_model_parallel_size}, PP "
        f"{config.parallel.pipeline_model_parallel_size}, DP {dp}"
    )
    say(
        f"{count_parameters(config, inputs.vocab_size):,} parameters; {processes}, "
        f"{layout}; {impl} layers on {device.type}{cpu_note}"
    )
    if note := late_stage_note(config, start.blend.plan, outlook.total):
        say(note)
    average = WeightAverage(model, config.training.ema_decay) if config.training.ema_decay else None
    if start.checkpoint is not None:
        with_optimizer = (
            start.state is not None
            and start.state["optimizer"]
            and not config.checkpoint.no_load_optim
        )
        with_average = (
            average is not None
            and start.state is not None
            and start.state.get("ema_decay") is not None
        )
        wanted = (optimizer if with_optimizer else None, average if with_average else None)
        recorded = saved_settings(start.checkpoint, start.state or read_state(start.checkpoint))
        state_dict.check_unrecorded(
            start.checkpoint,
            None if "vocab_size" in recorded else inputs.vocab_size,
            config.optimizer.optimizer if with_optimizer and "optimizer" not in recorded else None,
        )
        group = state_dict.load(start.checkpoint, model, *wanted, verified=True)
        old = with_optimizer and "settings" not in start.state
        if old and (note := check_optimizer_group(group, config)):
            say(note)
        if average is not None and not with_average:
            average = WeightAverage(model, config.training.ema_decay)
            if start.state is not None:
                say(
                    f"{start.checkpoint} has no mean of the weights (--ema-decay); it "
                    f"begins at the weights as they are there"
                )
        if not with_optimizer:
            optimizer.reload_model_params()
        if start.state is not None:
            scheduler.step(start.state["opt_param_scheduler"]["num_steps"])
        say(
            f"loaded {start.checkpoint}"
            + ("" if with_optimizer else ", weights only")
            + (f"; going on after iteration {start.iteration}" if start.state else "")
        )
    names = start.blend.plan.domain_names
    step = make_forward_step(len(names), inputs.token_bytes, impl == "transformer_engine", device)
    shape = schedule_shape(
        config.data.seq_length, config.training.micro_batch_size, impl == "transformer_engine"
    )
    return Run(
        config, start.schedule, launch, inputs, start.blend, outlook, start.batches, device, impl,
        model, optimizer, scheduler, step, shape,
        start.iteration, start.consumed, average, NewRows(model,
        start.new_rows) if len(start.new_rows) else None,
        bool(start.state and start.state.get("only_new_rows")),
        bool(start.state) and start.state.get("validated", True),
        start.checkpoint if start.state is not None else None,
    )  # fmt: skip
