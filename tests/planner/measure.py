"""What a small model really takes on gloo ranks: parameters, states, and what autograd keeps for
the backward pass. Runs in the session's pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_chatflow.config import Config, resolve

VOCAB = 1000
LLAMA = {
    "group_query_attention": True, "num_query_groups": 2, "position_embedding_type": "rope",
    "swiglu": True, "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "ffn_hidden_size": 176,
}  # fmt: skip


def small(world_size: int, model: dict[str, Any], **settings: Any) -> Config:
    """Resolved settings of a small model without dropout; `settings` go to whatever section knows
    them.
    """
    values = {
        "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "seq_length": 128,
        "micro_batch_size": 2, "train_iters": 10, "lr": 1e-3,
    }  # fmt: skip
    return resolve(Config().replace(**values | model | settings), world_size)


@contextmanager
def _groups(config: Config) -> Iterator[None]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_chatflow.distributed import process_groups
    from megatron_chatflow.distributed.launch import read_launch

    process_groups.initialize(read_launch(), config.parallel, config.model.num_layers)
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        process_groups.shut_down()


def rehearsed_parameters(config: Config, world_size: int, ranks: list[int]) -> list[int]:
    """Parameters of these ranks' models, built without memory."""
    from megatron_chatflow.distributed.fake_ranks import rehearse
    from megatron_chatflow.model.gpt import build_model

    counts = []
    for rank in ranks:
        with rehearse(rank, world_size, config.parallel, config.model.num_layers):
            parameters = [
                p
                for chunk in build_model(config, VOCAB, "local", wrap=False)
                for p in chunk.parameters()
            ]
            assert all(p.is_meta for p in parameters)
        counts.append(sum(p.numel() for p in parameters))
    return counts


def saved_in_a_layer(config: Config) -> float:
    """Bytes a token that autograd keeps for one layer on this rank: half of what two more layers
    add.
    """
    deeper = config.replace(num_layers=config.model.num_layers + 2)
    tokens = config.data.seq_length * config.training.micro_batch_size
    with _groups(config):
        return (_saved(deeper) - _saved(config)) / 2 / tokens


def _saved(config: Config) -> int:
    import torch

    from megatron_chatflow.model.gpt import build_model

    (model,) = build_model(config, VOCAB, "local", wrap=False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.zeros(config.training.micro_batch_size, config.data.seq_length, dtype=torch.long)
    positions = torch.arange(config.data.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, positions, None, labels=tokens)
    return sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in kept.items()
        if pointer not in weights
    )


def states(config: Config) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on this rank after a step."""
    import torch

    from megatron_chatflow.model.gpt import build_model
    from megatron_chatflow.training.optimizer import build_optimizer

    with _groups(config):
        model = build_model(config, VOCAB, "local")
        optimizer = build_optimizer(config, model)
        for parameter in (p for chunk in model for p in chunk.parameters()):
            parameter.main_grad.fill_(1e-3)
        optimizer.step()
        weights = {p.data_ptr() for chunk in model for p in chunk.parameters()}
        kept: dict[int, torch.Tensor] = {}
        for part in optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                tensors = [
                    p for p in group["params"] if p.dtype == torch.float32 and config.training.bf16
                ]
                tensors += [
                    t
                    for p in group["params"]
                    for t in part.optimizer.state[p].values()
                    if t.numel() > 1
                ]
                kept |= {t.data_ptr(): t for t in tensors if t.data_ptr() not in weights}
        return {
            "weights": sum(p.nbytes for chunk in model for p in chunk.parameters()),
            "gradients": sum(p.main_grad.nbytes for chunk in model for p in chunk.parameters()),
            "optimizer": sum(t.nbytes for t in kept.values()),
        }
