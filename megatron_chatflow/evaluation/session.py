"""A checkpoint opened for reading: process groups, a model without optimizer, and its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.config import Config, UsageError
from megatron_chatflow.engine.launch import Launch
from megatron_chatflow.training.run_directory import find_checkpoint, read_state


@dataclass
class Session:
    """A model in evaluation mode."""

    config: Config
    inputs: Any
    checkpoint: Path
    iteration: int
    transformer_impl: str
    model: list[Any]
    device: Any

    def forward_step(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """The forward step whose sums have a row for each name."""
        import torch

        from megatron_chatflow.model.forward import make_forward_step

        return make_forward_step(len(names), torch.from_numpy(self.inputs.token_bytes).to(self.device), self.transformer_impl == "transformer_engine")

    @property
    def shape(self) -> Mapping[str, int]:
        """seq_length and micro_batch_size for the schedule."""
        from megatron_chatflow.model.forward import schedule_shape

        return schedule_shape(self.config.data.seq_length, self.config.training.micro_batch_size, self.transformer_impl == "transformer_engine")


@contextlib.contextmanager
def open_model(config: Config, launch: Launch, inputs: Any) -> Iterator[Session]:
    """Load the checkpoint that config.checkpoint names into a model of this launch's layout; leaves the process groups at the end.

    Raises UsageError where there is no checkpoint.
    """
    folder = find_checkpoint(config.checkpoint.load, config.checkpoint.ckpt_step)
    if folder is None:
        raise UsageError(f"load {config.checkpoint.load} holds no checkpoint; give a run directory that has one")
    state = read_state(folder)
    from megatron_chatflow.engine import cpu, distributed

    distributed.hide_engine_warnings()
    cpu.install()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.model.spec import choose_transformer_impl
    from megatron_chatflow.training import checkpoint

    impl, _ = choose_transformer_impl(config)
    distributed.initialize(launch, config.parallel, config.model.num_layers)
    try:
        model_parallel_cuda_manual_seed(config.training.seed)
        model = build_model(config, inputs.vocab_size, impl, wrap=False)
        checkpoint.load(folder, model, None)
        for chunk in model:
            chunk.eval()
        yield Session(config, inputs, folder, state["iteration"], impl, model, distributed.device(launch.local_rank))
    finally:
        distributed.shut_down()
