"""This project's own training step, as the benchmarks run it: one process, random tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Trainer:
    """A model that is trained."""

    def __init__(self, words: str, vocab_size: int) -> None:
        """`words`: the flags of `chatflow train`; one micro-batch is an iteration."""
        from megatron_chatflow.config import Schedule, make_parser, parse, resolve
        from megatron_chatflow.distributed import cuda_shim, process_groups
        from megatron_chatflow.distributed.launch import Launch

        self.config = config = resolve(
            parse(make_parser("chatflow train", ""), words.split())[0], 1
        )
        process_groups.hide_engine_warnings()
        process_groups.initialize(
            Launch("single", 0, 1, 0, None, None), config.parallel, config.model.num_layers
        )
        import numpy as np
        import torch
        from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

        from megatron_chatflow.model.forward import make_forward_step, schedule_shape
        from megatron_chatflow.model.gpt import build_model
        from megatron_chatflow.planner.parameters import count_parameters
        from megatron_chatflow.tokenizer import TokenBytes
        from megatron_chatflow.training.optimizer import build_optimizer, build_scheduler
        from megatron_chatflow.training.train_step import seed_iteration

        assert cuda_shim.is_needed(), "the benchmarks measure CPU steps"
        self._batch, self._length = config.training.micro_batch_size, config.data.seq_length
        init_num_microbatches_calculator(0, None, self._batch, self._batch, 1)
        seed_iteration(1, 0)
        self.model = build_model(config, vocab_size, "local")
        self.optimizer = build_optimizer(config, self.model)
        build_scheduler(config, Schedule.of(config), self.optimizer)
        self.parameters = count_parameters(config, vocab_size)
        self._forward_step = make_forward_step(
            1, TokenBytes.of(None, vocab_size), False, torch.device("cpu")
        )
        self._shape = schedule_shape(self._length, self._batch, False)
        self._vocab_size, self._generator = vocab_size, np.random.default_rng(0)

    def step(self, settle: Callable[[], None] = lambda: None) -> float:
        """Forward, backward, clipping and AdamW; returns the loss. `settle` is called before the
        weights change.
        """
        import torch

        from megatron_chatflow.training.train_step import seed_iteration, train_step

        seed_iteration(1, 0)
        batch = self._random_batch()
        result = train_step(
            self._forward_step,
            self.model,
            self.optimizer,
            [batch],
            self._shape,
            1,
            torch.device("cpu"),
            check_finite=True,
            settle=settle,
        )
        loss, tokens = result.sums[:, :2].sum(0)
        return float(loss / tokens)

    def evaluate(self, model: list[Any]) -> None:
        """Forward pass and loss of one batch by a model in evaluation mode, as `chatflow evaluate`
        runs it.
        """
        import torch

        from megatron_chatflow.model.forward import run_schedule

        with torch.no_grad():
            run_schedule(
                self._forward_step,
                model,
                iter([self._random_batch()]),
                1,
                self._shape,
                torch.device("cpu"),
                forward_only=True,
            )

    def _random_batch(self) -> dict[str, Any]:
        import numpy as np

        shape = (self._batch, self._length)
        tokens = self._generator.integers(0, self._vocab_size, (self._batch, self._length + 1))
        return {
            "tokens": tokens[:, :-1].copy(),
            "labels": tokens[:, 1:].copy(),
            "loss_mask": np.ones(shape, np.float32),
            "position_ids": np.tile(np.arange(self._length), (self._batch, 1)),
            "segment_ids": np.zeros(shape, np.int32),
            "domain": np.zeros(self._batch, np.int64),
        }
