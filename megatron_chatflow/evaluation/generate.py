"""Continuing a prompt: the whole prefix is run again for every token (no cache)."""

from __future__ import annotations

import torch

from megatron_chatflow.evaluation.session import Session
from megatron_chatflow.model.segments import attention_arguments


@torch.no_grad()
def generate(session: Session, prompt: list[int], max_new_tokens: int, *, temperature: float, top_k: int, seed: int) -> list[int]:
    """Tokens that continue `prompt`, up to the end-of-document token (left out) or `max_new_tokens`.

    Args:
        session: an opened model; every tensor-parallel rank calls this alike and gets the same tokens.
        prompt: at least one token; beyond the model's longest sequence only the last part is seen.
        max_new_tokens: how many to add at most.
        temperature: 0 is greedy.
        top_k: sample among this many likeliest; 0 among all.
        seed: of the sampling.
    """
    assert prompt, "the prompt is empty"
    (model,) = session.model
    longest, vocab = session.config.model.max_position_embeddings, session.inputs.tokenizer.vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = list(prompt)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([ids[-longest:]], device=session.device)
        positions = torch.arange(tokens.shape[1], device=session.device)[None]
        extra = attention_arguments(torch.zeros_like(tokens), session.transformer_impl == "transformer_engine")
        logits = model(tokens, positions, extra["attention_mask"], packed_seq_params=extra["packed_seq_params"], runtime_gather_output=True)
        chosen = choose(logits[0, -1, :vocab].float().cpu(), temperature, top_k, generator)
        if chosen == session.inputs.tokenizer.eod:
            break
        ids.append(chosen)
    return ids[len(prompt) :]


def choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token from float logits [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
