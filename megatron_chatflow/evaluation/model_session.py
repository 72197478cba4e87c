"""A model opened for inference: process groups, then one model after the other, no optimizer."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.data.blend.document_dataset import DocumentDataset
from megatron_chatflow.distributed import process_groups
from megatron_chatflow.distributed.launch import Launch
from megatron_chatflow.errors import is_shared
from megatron_chatflow.evaluation.eval_model import EvalModel
from megatron_chatflow.model.forward import ScheduleShape, make_forward_step, schedule_shape
from megatron_chatflow.model.gpt import build_model
from megatron_chatflow.model.spec import choose_transformer_impl
from megatron_chatflow.tokenizer import TokenBytes
from megatron_chatflow.training.validation import evaluate_domains

_SECONDS_BETWEEN = 10.0
"""Between lines of progress."""

logger = logging.getLogger(__name__)


@dataclass
class ModelSession:
    """A model in evaluation mode."""

    config: ModelConfig
    vocab_size: int
    transformer_impl: str
    model: list[MegatronModule]
    device: torch.device

    def forward_step(self, names: tuple[str, ...], token_bytes: TokenBytes) -> Callable[..., Any]:
        """Return the forward step whose sums have a row for each name."""
        return make_forward_step(
            len(names), token_bytes, self.transformer_impl == "transformer_engine", self.device
        )

    @property
    def shape(self) -> ScheduleShape:
        """`seq_length` and `micro_batch_size` of the pipeline schedule."""
        return schedule_shape(
            self.config.data.seq_length,
            self.config.training.micro_batch_size,
            self.transformer_impl == "transformer_engine",
        )


@contextlib.contextmanager
def open_process_groups(config: ModelConfig, launch: Launch) -> Iterator[torch.device]:
    """Make the process groups of this launch and yield the device of this process.

    Every model that is opened inside has the same layout. A failure on one rank of several ends all
    of them with its reason.
    """
    monitor = process_groups.initialize(launch, config.parallel, config.model.num_layers)
    try:
        yield process_groups.device(launch.local_rank)
    except Exception as error:
        if monitor is None or is_shared(error):
            raise
        monitor.fail(error)
    finally:
        process_groups.shut_down()


def open_model(eval_model: EvalModel, vocab_size: int, device: torch.device) -> ModelSession:
    """Build a model and load its weights, inside `open_process_groups`.

    Args:
        eval_model: Which model.
        vocab_size: Before padding.
        device: Of this process.
    """
    impl, _ = choose_transformer_impl(eval_model.config)
    model_parallel_cuda_manual_seed(eval_model.config.training.seed)
    model = build_model(eval_model.config, vocab_size, impl, wrap=False)
    eval_model.load(model)
    for chunk in model:
        chunk.eval()
    return ModelSession(eval_model.config, vocab_size, impl, model, device)


def measure(
    session: ModelSession,
    sources: Mapping[str, Any],
    token_bytes: TokenBytes,
    max_windows: int | None,
) -> np.ndarray:
    """Return float64 [sources, 3]: summed loss, tokens and bytes, the same on every rank.

    Progress is logged, at most every ten seconds.

    Args:
        session: The model.
        sources: By name, what has `num_samples` and `read_window` (a text or instruction domain,
            or `DocumentDataset`).
        token_bytes: Bytes of the model's tokens; of `DocumentDataset` those of the text are taken.
        max_windows: Windows of each source at most; None means all.
    """
    names = tuple(sources)
    step, micro = session.forward_step(names, token_bytes), session.config.training.micro_batch_size
    last = time.monotonic()

    def report(name: str, done: int, windows: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN:
            last = time.monotonic()
            logger.info(f"{name}: {done:,} of {windows:,} windows")

    sums = evaluate_domains(
        step,
        session.model,
        sources,
        names,
        max_windows,
        micro,
        session.shape,
        session.device,
        report,
    )
    for row, source in zip(sums, sources.values(), strict=True):
        if isinstance(source, DocumentDataset):
            row[2] = source.bytes
    return sums
