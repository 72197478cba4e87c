"""The forward step that megatron-core's schedules call, and the sums that it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.model.segments import attention_arguments
from megatron_chatflow.tokenizer import TokenBytes

SUMS = 3
"""Columns of the sums of a domain: loss in nats, trained-on tokens, their UTF-8 bytes."""


def to_tensors(batch: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the arrays of a micro-batch as tensors on the device of this rank."""
    return {
        name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()
    }


def label_bytes(
    batch: Mapping[str, torch.Tensor], table: torch.Tensor, byte_space: tuple[int, int, int] | None
) -> torch.Tensor:
    """Return the UTF-8 bytes of text that each label represents, int64 [b, s].

    The last byte piece of a space counts -1, so that all three add up to 1. Where a window or a
    piece of a document in it begins at the second of the three, its label is the third only if the
    character is a space or another whose last two bytes are those of U+2581 (such as U+1581 or
    U+4581); it is taken for a space. Everything else is exact.

    Args:
        batch: tokens, labels and segment_ids: [b, s].
        table: int64 [vocabulary], bytes of each token on its own.
        byte_space: see `TokenBytes`.
    """
    tokens, labels, segments = batch["tokens"], batch["labels"], batch["segment_ids"]
    lengths = table[labels]
    if byte_space is None:
        return lengths
    first, second, third = byte_space
    # [b, s]: the label is the last of the three byte pieces.
    ends = (labels == third) & (tokens == second)
    ends[:, 1:] &= (tokens[:, :-1] == first) | (segments[:, 1:] != segments[:, :-1])
    return lengths.masked_fill(ends, -1)


def domain_sums(
    losses: torch.Tensor, batch: Mapping[str, torch.Tensor], num_domains: int, lengths: torch.Tensor
) -> torch.Tensor:
    """Return the sums of each domain, float64 [num_domains, SUMS].

    Args:
        losses: [b, s], nats of each position.
        batch: loss_mask [b, s] and domain [b].
        num_domains: rows of the result.
        lengths: [b, s], bytes of each label.
    """
    mask = batch["loss_mask"].double()  # [b, s]
    # Sum over the positions of each window, [b, SUMS], then over the windows of each domain.
    sums = torch.stack(
        [(losses.double() * mask).sum(1), mask.sum(1), (lengths * mask).sum(1)], dim=1
    )
    return torch.zeros(num_domains, SUMS, dtype=torch.float64, device=sums.device).index_add_(
        0, batch["domain"], sums
    )


def make_forward_step(
    num_domains: int, token_bytes: TokenBytes, transformer_engine: bool, device: torch.device
) -> Callable[[Iterator[Any], MegatronModule], Any]:
    """Return the function that megatron-core's schedules call for each micro-batch.

    It returns the loss as (sum over tokens, number of tokens, {"sums": `domain_sums`});
    megatron-core divides the gradients by the tokens of the global batch
    (calculate_per_token_loss), so neither micro-batching nor data parallelism changes the loss.
    """
    table = torch.from_numpy(token_bytes.table).to(device)

    def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: MegatronModule) -> Any:
        batch = next(iterator)
        extra = attention_arguments(batch["segment_ids"], transformer_engine)
        tokens, positions, labels = batch["tokens"], batch["position_ids"], batch["labels"]
        if transformer_engine:  # [b, s] -> [1, b x s]: packed sequences are one row
            tokens, positions, labels = (t.reshape(1, -1) for t in (tokens, positions, labels))
        output = model(
            tokens,
            positions,
            extra["attention_mask"],
            labels=labels,
            packed_seq_params=extra["packed_seq_params"],
        )

        def loss_func(
            losses: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            losses = losses.float().reshape(batch["loss_mask"].shape)
            total = (losses * batch["loss_mask"]).sum()
            count = batch["loss_mask"].sum().to(torch.int)
            lengths = label_bytes(batch, table, token_bytes.byte_space)
            return total, count, {"sums": domain_sums(losses.detach(), batch, num_domains, lengths)}

        return output, loss_func

    return forward_step


class ScheduleShape(NamedTuple):
    """Shape of the activations that the pipeline schedule sends."""

    seq_length: int
    micro_batch_size: int


def schedule_shape(
    seq_length: int, micro_batch_size: int, transformer_engine: bool
) -> ScheduleShape:
    """Return the shape for the pipeline schedule: packed sequences are sent as one long row."""
    if transformer_engine:
        return ScheduleShape(seq_length * micro_batch_size, 1)
    return ScheduleShape(seq_length, micro_batch_size)


def run_schedule(
    forward_step: Callable[..., Any],
    model: list[MegatronModule],
    micro_batches: Iterable[Mapping[str, np.ndarray]],
    num_microbatches: int,
    shape: ScheduleShape,
    device: torch.device,
    *,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Run megatron-core's pipeline schedule over the micro-batches of this rank.

    Returns what the loss function of the last stage returned, per micro-batch.
    """
    if len(model) == 1:
        data: Any = (to_tensors(batch, device) for batch in micro_batches)
    else:  # every model chunk reads all micro-batches
        batches = [to_tensors(batch, device) for batch in micro_batches]
        data = [iter(batches) for _ in model]
    chunks: list[torch.nn.Module] = [*model]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=num_microbatches,
        forward_only=forward_only,
        seq_length=shape.seq_length,
        micro_batch_size=shape.micro_batch_size,
    )


def reduce_sums(
    store: list[dict[str, torch.Tensor]], num_domains: int, device: torch.device
) -> np.ndarray:
    """Reduce the sums over all micro-batches and data-parallel ranks, float64 [num_domains, SUMS].

    The result is the same on every rank of the job.
    """
    total = torch.zeros(num_domains, SUMS, dtype=torch.float64, device=device)
    if (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        for entry in store:
            total += entry["sums"]
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()
