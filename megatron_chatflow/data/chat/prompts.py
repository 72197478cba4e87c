"""What a model is to continue: plain text, or a conversation in a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.data.chat.conversations import parse_conversation
from megatron_chatflow.data.chat.jinja_template import tokenizer_template_prompt
from megatron_chatflow.data.chat.templates import (
    CHAT_TEMPLATES,
    TOKENIZER_TEMPLATE,
    MalformedRecord,
    Passage,
    text_field,
)
from megatron_chatflow.data.preprocess.encoder import Encoder, EncodeTask
from megatron_chatflow.data.preprocess.input_files import open_sources
from megatron_chatflow.data.preprocess.records import each_record
from megatron_chatflow.errors import ChatflowError, DataError
from megatron_chatflow.tokenizer import Tokenizer

Record = Mapping[str, Any]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and what ends the continuation."""

    record: Record
    """What was asked for."""
    ids: list[int]
    end_ids: frozenset[int]
    end_text: str = ""
    """A text that ends it as well: an end mark that is not a single token; empty without one."""


def read_prompts(path: str) -> Iterator[tuple[str, Record]]:
    """Yield (place in the file, record) of each prompt of a file.

    The file holds objects as JSON lines, or is a .txt whose lines are read as ``{"prompt": line}``.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; names file and line.
    """
    try:
        sources = open_sources([path])
    except ChatflowError as error:
        raise DataError(str(error).removeprefix("--input ")) from None
    for source in sources:
        for chunk in source.chunks(_CHUNK):
            for number, record in each_record(chunk):
                where = f"{path}, {source.record} {number}"
                if isinstance(record, MalformedRecord):
                    raise DataError(f"{where}: {record}; fix it or take it out")
                yield where, {"prompt": record["text"]} if source.format == "text" else record


def text_prompt(record: Record, tokenizer: Tokenizer, start: int | None = None) -> Prompt:
    """Return the text under `prompt` (or `text`) as tokens, after the token `start` if given.

    It ends with the end-of-document token.

    Raises:
        MalformedRecord: there is no text, or it is empty.
    """
    key = "text" if "text" in record and "prompt" not in record else "prompt"
    ids = ([] if start is None else [start]) + tokenizer.encode(text_field(record, key))
    if not ids:
        raise MalformedRecord("the prompt is empty")
    return Prompt(record, ids, frozenset([tokenizer.eod]))


def chat_prompt(record: Record, template: str, tokenizer: Tokenizer) -> Prompt:
    """Return a conversation whose last message waits for an answer.

    It is token for token what `preprocess --kind instruct` writes up to the answer.

    Args:
        record: ``{"messages": [...]}`` that end with the user's, ``{"instruction", "input"}``, or
            ``{"prompt"}``, which is an instruction.
        template: one of `CHAT_TEMPLATES`.
        tokenizer: the model's.

    Raises:
        MalformedRecord: it is not such a conversation, or spells a control token of the template.
    """
    conversation = parse_conversation(_unanswered(record))
    passages = (
        tokenizer_template_prompt if template == TOKENIZER_TEMPLATE else CHAT_TEMPLATES[template]
    )(conversation, tokenizer)
    encoder = Encoder(
        tokenizer, EncodeTask("instruct", ("prompt",), template, False, None, "int64")
    )
    corpus, refused = encoder.encode_conversations([passages[:-1]])
    if refused:
        raise MalformedRecord(refused[0][1])
    return Prompt(record, corpus.tokens.tolist(), *_ends(passages[-1], tokenizer))


def _unanswered(record: Record) -> Record:
    """Return the record with an empty answer, which the templates need."""
    key = next((key for key in ("messages", "conversations") if record.get(key) is not None), None)
    if key is None:
        key = "instruction" if "instruction" in record or "prompt" not in record else "prompt"
        more = {
            name: record[name]
            for name in ("input", "system", "system_prompt", "history", "tools")
            if name in record
        }
        return more | {"instruction": text_field(record, key), "output": ""}
    messages = record[key]
    if not isinstance(messages, list):
        return record
    last = messages[-1] if messages else None
    if isinstance(last, dict) and (
        last.get("role") == "assistant" or last.get("from") in ("gpt", "function_call")
    ):
        raise MalformedRecord("the last message is the assistant's; a prompt ends with the user's")
    return {**record, key: [*messages, {"role": "assistant", "content": ""}]}


def _ends(answer: Passage, tokenizer: Tokenizer) -> tuple[frozenset[int], str]:
    """Return what the template sets after an empty answer: control tokens, else a text.

    The end-of-document token is always included.
    """
    control = frozenset(part for part in answer.parts if isinstance(part, int))
    text = "".join(part for part in answer.parts if isinstance(part, str)).strip()
    return control | {tokenizer.eod}, "" if control else text
