"""A model opened for reading: process groups, then one model after the other, without optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule

from megatron_chatflow.config import Config
from megatron_chatflow.distributed import process_groups
from megatron_chatflow.distributed.launch import Launch
from megatron_chatflow.errors import is_shared
from megatron_chatflow.evaluation.eval_model import Subject
from megatron_chatflow.model.forward import make_forward_step, schedule_shape
from megatron_chatflow.model.gpt import build_model
from megatron_chatflow.model.spec import choose_transformer_impl
from megatron_chatflow.tokenizer import TokenBytes


@dataclass
class Session:
    """A model in evaluation mode."""

    config: Config
    vocab_size: int
    transformer_impl: str
    model: list[MegatronModule]
    device: torch.device

    def forward_step(self, names: tuple[str, ...], token_bytes: TokenBytes) -> Callable[..., Any]:
        """The forward step whose sums have a row for each name."""
        return make_forward_step(
            len(names), token_bytes, self.transformer_impl == "transformer_engine", self.device
        )

    @property
    def shape(self) -> Mapping[str, int]:
        """seq_length and micro_batch_size for the schedule."""
        return schedule_shape(
            self.config.data.seq_length,
            self.config.training.micro_batch_size,
            self.transformer_impl == "transformer_engine",
        )


@contextlib.contextmanager
def open_process_groups(config: Config, launch: Launch) -> Iterator[torch.device]:
    """Inside, the groups of this launch exist; gives the device of this process. Every model that
    is opened inside has the same layout.
    """
    lifeline = process_groups.initialize(launch, config.parallel, config.model.num_layers)
    try:
        yield process_groups.device(launch.local_rank)
    except Exception as error:
        if lifeline is None or is_shared(error):
            raise
        lifeline.fail(error)
    finally:
        process_groups.shut_down()


def open_model(subject: Subject, vocab_size: int, device: torch.device) -> Session:
    """Build a model and load its weights, inside `process_groups`. `vocab_size`: before padding."""
    impl, _ = choose_transformer_impl(subject.config)
    model_parallel_cuda_manual_seed(subject.config.training.seed)
    model = build_model(subject.config, vocab_size, impl, wrap=False)
    subject.load(model)
    for chunk in model:
        chunk.eval()
    return Session(subject.config, vocab_size, impl, model, device)
