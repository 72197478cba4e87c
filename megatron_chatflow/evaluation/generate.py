"""Text that a checkpoint generates after prompts or in answer to conversations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_chatflow.config import Config, ModelConfig
from megatron_chatflow.data.chat.prompts import Prompt, chat_prompt, read_prompts, text_prompt
from megatron_chatflow.data.chat.templates import (
    CHAT_TEMPLATES,
    TOKENIZER_TEMPLATE,
    MalformedRecord,
)
from megatron_chatflow.distributed.launch import read_launch
from megatron_chatflow.errors import ConfigError
from megatron_chatflow.evaluation.eval_data import start_token
from megatron_chatflow.evaluation.eval_model import ModelSource, find_source, with_any_length
from megatron_chatflow.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_chatflow.evaluation.decoding import Sampling
    from megatron_chatflow.evaluation.model_session import ModelSession


@dataclass(frozen=True)
class Generation:
    """What a model generated for one prompt."""

    prompt: Mapping[str, Any]
    """The record that was asked for; of a plain text, ``{"prompt": text}``."""
    text: str
    """The new text alone."""
    full_text: str
    """The prompt with the new text; of a conversation the new text alone."""
    num_tokens: int
    """New tokens."""
    ended: bool
    """Whether the model ended the text."""
    cut_off_at: int | None
    """The longest sequence of the model, where that ended the text; else None."""


def generate(
    load: str | Path,
    prompts: Iterable[str | Mapping[str, Any]] = (),
    *,
    prompt_file: str | Path | None = None,
    chat: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    document_start: Literal["bos", "eod"] | None = None,
    ckpt_step: int | None = None,
    use_ema: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the text of each prompt with its continuation; of conversations the answers alone.

    Under torchrun or srun every rank calls this, and every rank gets the texts.

    Args:
        load: A run directory or a Hugging Face folder.
        prompts: Texts, or records as in the lines of `prompt_file`.
        prompt_file: JSON lines with `prompt` (with `chat` also `messages`, or `instruction` and
            `input`), or a .txt with a prompt per line.
        chat: Render prompts as conversations in this template: `chatflow`, `alpaca`, `chatml`,
            `tokenizer` for the tokenizer's own, or an empty text for the one that the run's
            instruction corpora were made with. None continues the prompts as text.
        max_new_tokens: Tokens to add at most.
        temperature: 0 takes the most likely token; above 0, sample.
        top_k: Sample among that many most likely tokens; 0 means all.
        top_p: Sample among the fewest most likely tokens that together have this probability.
        document_start: The token to put before each prompt; none by default.
        ckpt_step: The iteration of a run directory; the latest by default.
        use_ema: Take the running mean of the weights (of a run with `ema_decay`).
        settings: {setting: value} over those of `load`, by the names of the configuration:
            `micro_batch_size` prompts share a forward pass, and `seed` determines the samples.

    Raises:
        ChatflowError: What was given cannot be used; no model has been opened yet.
    """
    source = find_source(load)
    steps = {} if ckpt_step is None else {"ckpt_step": ckpt_step}
    config = with_any_length(source.config({**(settings or {}), **steps}))
    with open_generations(
        source,
        config,
        prompts,
        prompt_file=prompt_file,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        document_start=document_start,
        use_ema=use_ema,
    ) as generations:
        return [generation.full_text for generation in generations]


@contextlib.contextmanager
def open_generations(
    source: ModelSource,
    config: Config,
    prompts: Iterable[str | Mapping[str, Any]],
    *,
    prompt_file: str | Path | None,
    chat: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    document_start: Literal["bos", "eod"] | None,
    use_ema: bool,
) -> Iterator[Iterator[Generation]]:
    """Open the model and yield an iterator that generates batch by batch; see `generate`."""
    _check_sampling(max_new_tokens, temperature, top_k, top_p)
    if chat is not None and document_start:
        raise ConfigError(
            "document_start has no effect with a chat template, which defines how a "
            "conversation begins; drop one of the two"
        )
    launch = read_launch()
    from megatron_chatflow.training.data_setup import open_tokenizer

    model = source.resolve(config, launch.world_size, use_ema=use_ema)
    _check_world_size(config, launch.world_size)
    tokenizer, vocab_size = open_tokenizer(config)
    records = [
        (f"prompt {p!r}", {"prompt": p}) if isinstance(p, str) else (f"prompt {number}", p)
        for number, p in enumerate(prompts, 1)
    ]
    records += read_prompts(str(prompt_file)) if prompt_file is not None else []
    if not records:
        raise ConfigError(f"prompt_file {prompt_file} holds no prompt; write one per line")
    template = None if chat is None else _template(chat, config, tokenizer)
    start = start_token(tokenizer, document_start)[0] if document_start else None
    encoded = [_encode(*record, template, tokenizer, start, model.config) for record in records]

    from megatron_chatflow.distributed.process_groups import install_engine

    install_engine()
    from megatron_chatflow.evaluation.decoding import Sampling
    from megatron_chatflow.evaluation.model_session import open_model, open_process_groups

    sampling = Sampling(temperature, top_k, top_p, config.training.seed)
    with open_process_groups(model.config, launch) as device:
        session = open_model(model, vocab_size, device)
        yield _generations(session, tokenizer, encoded, max_new_tokens, sampling, chat is not None)


def _generations(
    session: ModelSession,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    is_chat: bool,
) -> Iterator[Generation]:
    from megatron_chatflow.evaluation.decoding import decode

    config = session.config
    size, longest = config.training.micro_batch_size, config.model.max_position_embeddings
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        answers = decode(session, tokenizer, batch, max_new_tokens, sampling, at)
        for prompt, answer in zip(batch, answers, strict=True):
            text = tokenizer.decode(answer.ids)
            if prompt.end_text and answer.ended:
                text = text.partition(prompt.end_text)[0]
            cut_off = not answer.ended and len(answer.ids) < max_new_tokens
            yield Generation(
                prompt.record,
                text,
                text if is_chat else tokenizer.decode(prompt.ids + answer.ids),
                len(answer.ids),
                answer.ended,
                longest if cut_off else None,
            )


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
    ):
        if not value >= least:
            raise ConfigError(f"{name} is {value}; give a number from {least} up")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; give a number above 0 and up to 1")
    if temperature == 0 and (top_k or top_p < 1):
        raise ConfigError(
            "top_k and top_p have no effect on greedy generation; set temperature above 0, or drop "
            "them"
        )


def _check_world_size(config: Config, world_size: int) -> None:
    parallel = config.parallel
    model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if world_size != model_size:
        raise ConfigError(
            f"{world_size} processes are more than tensor_model_parallel_size x "
            f"pipeline_model_parallel_size {model_size}, and generate "
            f"makes no copies of the model; start {model_size}, or raise one of the two"
        )


def _encode(
    where: str,
    record: Mapping[str, Any],
    template: str | None,
    tokenizer: Tokenizer,
    start: int | None,
    config: ModelConfig,
) -> Prompt:
    """Return the tokens of a record, which `where` names in messages."""
    try:
        prompt = (
            chat_prompt(record, template, tokenizer)
            if template
            else text_prompt(record, tokenizer, start)
        )
    except MalformedRecord as error:
        raise ConfigError(f"{where}: {error}; correct it or remove it") from None
    longest = config.model.max_position_embeddings
    if len(prompt.ids) >= longest:
        learned = config.model.position_embedding_type == "learned_absolute"
        raise ConfigError(
            f"{where}: it has {len(prompt.ids)} tokens, and the model takes {longest} with "
            f"the answer; shorten it" + ("" if learned else ", or raise --max-position-embeddings")
        )
    return prompt


def _template(name: str, config: Config, tokenizer: Tokenizer) -> str:
    """Return the chat template of that name; of an empty name, the run's."""
    name = name or _trained_template(config)
    if name not in CHAT_TEMPLATES:
        raise ConfigError(
            f"chat: {name!r} is not a template; write one of {', '.join(CHAT_TEMPLATES)}"
        )
    if name == TOKENIZER_TEMPLATE:
        from megatron_chatflow.data.chat.jinja_template import check_tokenizer_template

        check_tokenizer_template(tokenizer)
    return name


def _trained_template(config: Config) -> str:
    """Return the chat template that the manifests of the run's instruction corpora name."""
    from megatron_chatflow.curriculum import load_curriculum
    from megatron_chatflow.data import read_manifest

    domains = (
        load_curriculum(config.data.curriculum).domains.values() if config.data.curriculum else ()
    )
    manifests = [read_manifest(domain.path) for domain in domains if domain.kind == "instruct"]
    names = sorted(
        {
            source["template"]
            for manifest in manifests
            if manifest is not None
            for source in manifest.sources
            if isinstance(source, dict) and source.get("template")
        }
    )
    if len(names) != 1:
        found = (
            f"are of several templates, {', '.join(names)}"
            if names
            else "do not name their template"
        )
        raise ConfigError(
            f"chat: the run's instruction corpora {found}; write --chat NAME, e.g. --chat chatflow"
        )
    return names[0]
