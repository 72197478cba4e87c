"""Continuing prompts with megatron-core's key-value cache: the prompt once, then one token at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import get_model_config

from megatron_chatflow.data.chat.prompts import Prompt
from megatron_chatflow.evaluation.model_session import Session
from megatron_chatflow.evaluation.sampling import Sampling, choose
from megatron_chatflow.tokenizer import Tokenizer


@dataclass
class _Row:
    """A prompt and what follows it so far."""

    prompt: Prompt
    generator: torch.Generator
    room: int
    """Tokens to add at most."""
    new: list[int]
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.new) == self.room

    def token(self, position: int) -> int:
        """What stands at a position: the prompt, what was chosen, and behind that (the row is done)
        anything.
        """
        at = position - len(self.prompt.ids)
        return self.prompt.ids[position] if at < 0 else self.new[at] if at < len(self.new) else 0

    def take(self, chosen: int, tokenizer: Tokenizer) -> None:
        """Adds a token, unless it is one that ends the text."""
        if chosen in self.prompt.end_ids:
            self.ended = True
            return
        self.new.append(chosen)
        self.ended = bool(self.prompt.end_text) and self.prompt.end_text in tokenizer.decode(
            self.new
        )


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    ids: list[int]
    ended: bool
    """Whether the model ended it; else there was no room for more tokens."""


@torch.no_grad()
def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    first: int = 0,
) -> list[Continuation]:
    """Tokens that continue each prompt, up to what ends it (left out where it is a token),
    `max_new_tokens`, or the longest sequence of the model.

    The prompts share the forward passes: the part that all have is read at once, and from there on
    a position at a time, in which longer prompts still read their own tokens.

    Args:
        session: an opened model; every tensor- and pipeline-parallel rank calls this alike and gets
        the same tokens. tokenizer: the model's; ids beyond its vocabulary (padding) are never
        chosen. prompts: each of at least one token and fewer than the model's longest sequence.
        max_new_tokens: how many to add at most. sampling: how tokens are chosen. first: number of
        the first prompt, which decides its random numbers.
    """
    longest = session.config.model.max_position_embeddings
    rows = [
        _Row(
            prompt,
            sampling.generator(first + i),
            min(max_new_tokens, longest - len(prompt.ids)),
            [],
        )
        for i, prompt in enumerate(prompts)
    ]
    assert all(row.prompt.ids and row.room > 0 for row in rows), "an empty or too long prompt"
    context = StaticInferenceContext(len(rows), max(len(row.prompt.ids) + row.room for row in rows))
    begin, end = 0, min(len(row.prompt.ids) for row in rows)
    while not all(row.done for row in rows):
        tokens = torch.tensor(
            [[row.token(position) for position in range(begin, end)] for row in rows],
            device=session.device,
        )
        logits = _forward(session, tokens, context)
        chosen = _agree(
            logits, tokenizer.vocab_size, sampling, [row.generator for row in rows], session.device
        )
        for row, token in zip(rows, chosen, strict=True):
            if not row.done and end >= len(row.prompt.ids):
                row.take(token, tokenizer)
        begin, end = end, end + 1
    return [Continuation(row.new, row.ended) for row in rows]


def _forward(
    session: Session, tokens: torch.Tensor, context: StaticInferenceContext
) -> torch.Tensor | None:
    """Logits [rows, padded vocabulary] after the last of `tokens` [rows, n], which follow what the
    cache holds; None but on the last stage.
    """
    (model,) = session.model
    group = parallel_state.get_pipeline_model_parallel_group()
    rows, count = tokens.shape
    if not parallel_state.is_pipeline_first_stage():
        core = get_model_config(model)
        hidden = torch.empty(
            count, rows, core.hidden_size, dtype=core.pipeline_dtype, device=session.device
        )
        recv_from_prev_pipeline_rank_(hidden, group)
        model.set_input_tensor(hidden)
    positions = torch.arange(
        context.sequence_len_offset, context.sequence_len_offset + count, device=session.device
    ).expand(rows, count)
    output = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    context.increment_sequence_len_offset(count)
    context.enable_decode_mode()
    if not parallel_state.is_pipeline_last_stage():
        send_to_next_pipeline_rank(output, group)
        return None
    return output[:, -1]


def _agree(
    logits: torch.Tensor | None,
    vocab_size: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    device: torch.device,
) -> list[int]:
    """The tokens that the last pipeline stage chooses, on every rank of the model."""
    tokens = torch.zeros(len(generators), dtype=torch.long, device=device)
    if logits is not None:
        tokens.copy_(
            torch.tensor(choose(logits[:, :vocab_size].float().cpu(), sampling, generators))
        )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(
            tokens, source, group=parallel_state.get_pipeline_model_parallel_group()
        )
    return tokens.tolist()
