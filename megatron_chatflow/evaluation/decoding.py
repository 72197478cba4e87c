"""Decode prompts with megatron-core's key-value cache: the prompt once, then one token at a time.

The next token is chosen greedily or by temperature, top-k and top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.utils import get_model_config

from megatron_chatflow.data.chat.prompts import Prompt
from megatron_chatflow.evaluation.model_session import ModelSession
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.utils.seeding import seed_from


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the most likely."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens that together have at least this probability
    (Holtzman et al., arXiv:1904.09751, section 3.1).
    """
    seed: int = 1234

    def generator(self, number: int) -> torch.Generator:
        """Return the generator of the prompt with this number, whatever batch it is in."""
        return torch.Generator().manual_seed(seed_from(f"{self.seed}/{number}"))


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
        """Return the token at a position: of the prompt, chosen, or past the end, any."""
        at = position - len(self.prompt.ids)
        return self.prompt.ids[position] if at < 0 else self.new[at] if at < len(self.new) else 0

    def take(self, chosen: int, tokenizer: Tokenizer) -> None:
        """Add a token, unless it is one that ends the text."""
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
    """Whether the model ended it; else it has as many tokens as it may."""


@torch.no_grad()
def decode(
    session: ModelSession,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    first: int = 0,
) -> list[Continuation]:
    """Return the tokens that continue each prompt.

    A continuation ends before a token that ends the text, after `max_new_tokens`, or at the longest
    sequence of the model. The prompts share the forward passes: the part that all have is read at
    once, and from there on one position at a time, in which longer prompts still read their own
    tokens.

    Args:
        session: An opened model; every tensor- and pipeline-parallel rank calls this alike and gets
            the same tokens.
        tokenizer: The model's; ids beyond its vocabulary (padding) are never chosen.
        prompts: Each of at least one token and fewer than the model's longest sequence.
        max_new_tokens: How many tokens to add at most.
        sampling: How tokens are chosen.
        first: Number of the first prompt, which determines its random numbers.
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
    session: ModelSession, tokens: torch.Tensor, context: StaticInferenceContext
) -> torch.Tensor | None:
    """Return logits [rows, padded vocabulary] after the last of `tokens` [rows, n].

    The tokens follow what the cache holds. None except on the last stage.
    """
    model: Any = session.model[0]
    group: Any = parallel_state.get_pipeline_model_parallel_group()
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
    """Return the tokens that the last pipeline stage chooses, on every rank of the model."""
    tokens = torch.zeros(len(generators), dtype=torch.long, device=device)
    if logits is not None:
        tokens.copy_(
            torch.tensor(choose(logits[:, :vocab_size].float().cpu(), sampling, generators))
        )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(tokens, source, group=group)
    return tokens.tolist()


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> list[int]:
    """Return a token for each row of float32 logits [rows, vocabulary] on the CPU."""
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def likely(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return probabilities [rows, vocabulary] with all but the most likely tokens at 0.

    Those of top_k are kept first (with ties), then those of top_p among them.
    """
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities = torch.zeros_like(ordered).scatter(
            -1, index, ordered.masked_fill(before >= top_p, 0)
        )
    return probabilities / probabilities.sum(-1, keepdim=True)
