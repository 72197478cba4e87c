"""Models opened on the pool's ranks as the commands open them, and their logits without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def opened(run: str, flags: list[str], average: int, body: Callable[[Any, Any], Any]) -> Any:
    """`body(session, tokenizer)` with the run's model laid out as the flags say."""
    from megatron_chatflow.checkpoint.run_directory import read_settings
    from megatron_chatflow.config import make_parser, parse
    from megatron_chatflow.distributed.launch import read_launch
    from megatron_chatflow.distributed.process_groups import install_engine
    from megatron_chatflow.evaluation.eval_model import resolve_run_model
    from megatron_chatflow.training.data_setup import open_tokenizer

    launch = read_launch()
    config, _ = parse(
        make_parser("test", ""), ["--load", run, *flags], read_settings(run, keep_layout=False)
    )
    model = resolve_run_model(config, launch.world_size, average)
    tokenizer, vocab_size = open_tokenizer(config)
    install_engine()
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups

    with open_process_groups(model.config, launch) as device:
        return body(open_model(model, vocab_size, device), tokenizer)


def logits(session: Any, ids: list[int]) -> Any:
    """Logits [tokens, padded vocabulary] of one row of tokens, in one pass without a cache."""
    import torch

    (model,) = session.model
    tokens = torch.tensor([ids], device=session.device)
    with torch.no_grad():
        return model(
            tokens,
            torch.arange(len(ids), device=session.device)[None],
            None,
            runtime_gather_output=True,
        )[0]
