"""Held-out loss of each domain over megatron-core's forward-only schedule, and when it is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.model.forward import (
    SUMS,
    ScheduleShape,
    make_forward_step,
    reduce_sums,
    run_schedule,
)
from megatron_chatflow.training.callbacks import (
    Callback,
    CallbackList,
    HeldOutLosses,
    IterationResult,
)
from megatron_chatflow.training.metrics import by_domain, loss_values
from megatron_chatflow.training.signals import StopRequest
from megatron_chatflow.training.train_state import TrainState


class ValidationCallback(Callback):
    """Validates every --eval-interval iterations, before the first one and after the last one.

    A validation that is due comes before the checkpoint of its iteration, which records whether it
    was made. So a run that is killed or stopped meanwhile makes it when it resumes.
    """

    def __init__(self, stop: StopRequest, callbacks: CallbackList) -> None:
        """Validate unless `stop` asks the run to exit; `callbacks` are notified of the losses."""
        self._stop, self._callbacks = stop, callbacks

    def before_first_iteration(self, state: TrainState) -> None:
        """Take the baseline of a new run, or a validation that the run before did not complete."""
        due = bool(state.config.validation.eval_interval) and not state.validated
        if due and state.exit_reason is None:
            self._validate(state)
            state.baseline_losses = state.held_out_losses if state.iteration == 0 else {}

    def on_step_end(self, state: TrainState, result: IterationResult) -> None:
        """Note that the validation of this iteration is still to be made, if it is due."""
        state.validated = not self._is_due(state)

    def on_iteration_end(self, state: TrainState) -> None:
        """Validate if it is due."""
        if state.exit_reason is None and not state.validated:
            self._validate(state)

    @staticmethod
    def _is_due(state: TrainState) -> bool:
        interval = state.config.validation.eval_interval
        if not interval:
            return False
        following = state.batches[-1].size_at(state.consumed)
        is_last = state.consumed + following > state.forecast.total
        return is_last or state.iteration % interval == 0

    def _validate(self, state: TrainState) -> None:
        """Take the held-out losses; a stop request between two domains leaves them incomplete."""
        config, names = state.config, state.held_out_names
        step = make_forward_step(
            len(names),
            state.inputs.token_bytes,
            state.transformer_impl == "transformer_engine",
            state.device,
        )
        # [names, 3]: loss, tokens, bytes
        sums = np.zeros((len(names), SUMS))
        state.held_out_losses = {}
        for name, domain in state.inputs.held_out.items():
            sums += evaluate_domains(
                step,
                state.model,
                {name: domain},
                names,
                config.validation.eval_iters * config.training.global_batch_size,
                config.training.micro_batch_size,
                state.shape,
                state.device,
            )
            state.exit_reason = self._stop.agreed(state.device)
            if state.exit_reason is not None:
                return
        state.validated = True
        by_name = {name: v for name, v in by_domain(names, sums).items() if v["tokens"]}
        state.held_out_losses = by_name
        overall = loss_values(sums[: len(state.plan.domain_names)].sum(0))
        self._callbacks.on_validation_end(state, HeldOutLosses(by_name, overall))


@torch.no_grad()
def evaluate_domain(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    domain: Any,
    number: int,
    num_domains: int,
    windows: int,
    micro_batch_size: int,
    shape: ScheduleShape,
    device: torch.device,
    progress: Callable[[int], None] = lambda windows: None,
) -> np.ndarray:
    """Sum loss, tokens and bytes over the first `windows` held-out windows of one domain.

    The windows are read in file order and dealt out to the data-parallel ranks; what is missing in
    the last micro-batches is filled with windows that carry no loss. `progress` is called with the
    number of windows begun.

    Returns:
        Float64 [3], the same on every rank.
    """
    dp, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    count = -(-windows // (micro_batch_size * dp))
    if len(model) > 1:
        count = (
            -(-count // parallel_state.get_pipeline_model_parallel_world_size())
            * parallel_state.get_pipeline_model_parallel_world_size()
        )

    def micro_batches() -> Iterator[dict[str, np.ndarray]]:
        for m in range(count):
            progress(min(windows, m * dp * micro_batch_size))
            wanted = (m * dp + rank) * micro_batch_size + np.arange(micro_batch_size)
            batch = domain.read_window(np.minimum(wanted, windows - 1))
            batch["loss_mask"] = batch["loss_mask"] * (wanted < windows)[:, None].astype(np.float32)
            batch["domain"] = np.full(micro_batch_size, number, np.int64)
            yield batch

    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    store = run_schedule(
        forward_step, model, micro_batches(), count, shape, device, forward_only=True
    )
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    return reduce_sums(store, num_domains, device)[number]


def evaluate_domains(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    domains: Mapping[str, Any],
    names: tuple[str, ...],
    most: int | None,
    micro_batch_size: int,
    shape: ScheduleShape,
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda name, done, windows: None,
) -> np.ndarray:
    """Sum loss, tokens and bytes of the held-out windows of several domains.

    Args:
        forward_step: of `model.forward.make_forward_step`, made for `names`.
        model: this rank's model chunks.
        domains: {name: its held-out windows}.
        names: the rows of the result; a name without held-out windows has zeros.
        most: windows of each domain at most; None for all.
        micro_batch_size: windows per micro-batch.
        shape: as `model.forward.schedule_shape` gives it.
        device: of this rank.
        progress: called with a name, how many of its windows are begun, and how many there are.

    Returns:
        Float64 [len(names), 3], the same on every rank.
    """
    sums = np.zeros((len(names), SUMS))
    for i, name in enumerate(names):
        if name in domains and domains[name].num_samples:
            windows = (
                domains[name].num_samples if most is None else min(most, domains[name].num_samples)
            )
            where = (i, len(names), windows, micro_batch_size, shape, device)
            sums[i] = evaluate_domain(
                forward_step,
                model,
                domains[name],
                *where,
                lambda done, name=name, windows=windows: progress(name, done, windows),
            )
    return sums
