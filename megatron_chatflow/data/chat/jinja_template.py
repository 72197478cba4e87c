"""The chat template that comes with a Hugging Face tokenizer: Jinja over messages.

It runs in a separate process (`template_sandbox.py`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_chatflow.data.chat.template_sandbox import (
    TemplateLimit,
    TemplateRefusal,
    TemplateSandbox,
)
from megatron_chatflow.data.chat.templates import (
    ANSWER,
    PROMPT,
    Conversation,
    MalformedRecord,
    Part,
    Passage,
)
from megatron_chatflow.errors import DataError
from megatron_chatflow.tokenizer import Tokenizer

_TRIAL = ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"})
Rendered = tuple[str, list[tuple[int, int]]]


def check_tokenizer_template(tokenizer: Tokenizer) -> None:
    """Check that the tokenizer has a chat template, and try it with a short conversation.

    Raises:
        DataError: it has none, or one that cannot be read, raises a Python error or exceeds a
            limit.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"--template tokenizer: {tokenizer.name} ({tokenizer.type}) has no chat "
            f"template; give a HuggingFaceTokenizer whose folder has one "
            "(chat_template in tokenizer_config.json, or chat_template.jinja), or name "
            "another template"
        )
    try:
        _render(_TRIAL, None, [(1, True), (2, False)], tokenizer)
    except TemplateRefusal as error:
        if error.always:
            raise DataError(_problem(tokenizer, f"fails: {error}")) from None


def apply_tokenizer_template(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    """Return the passages of a conversation in the tokenizer's chat template.

    What it encloses in `{% generation %}` are the answers. Without that, it is rendered turn by
    turn: what it adds up to `add_generation_prompt` is the prompt, what the answer adds is the
    rest. Control tokens that the template spells are set as ids; the messages may not spell any.

    Raises:
        MalformedRecord: a message spells a control token, the template refuses the conversation,
            leaves a part of it out, or renders an earlier turn in another way when a later one
            follows, so that prompts and answers cannot be distinguished.
        DataError: the template exceeds a limit.
    """
    _refuse_control(conversation, tokenizer)
    if not _sandbox(tokenizer).marks:
        return _by_turns(conversation, tokenizer)
    ((text, spans),) = _written(conversation, [(len(conversation.messages), False)], tokenizer)
    _refuse_omissions(conversation, text, tokenizer)
    passages = list(_split(text, spans, tokenizer))
    if not spans:
        raise MalformedRecord(
            "the tokenizer's chat template marks no answer in it with {% generation %}"
        )
    return passages


def tokenizer_template_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    """Return the passages of a conversation whose last answer is empty.

    As `apply_tokenizer_template`: what asks for the answer, and last what ends it.
    """
    if not _sandbox(tokenizer).marks:
        return apply_tokenizer_template(conversation, tokenizer)
    _refuse_control(conversation, tokenizer)
    count = len(conversation.messages)
    (asked, spans), (answered, _) = _written(
        conversation, [(count - 1, True), (count, False)], tokenizer
    )
    _refuse_omissions(conversation, asked, tokenizer)
    if not answered.startswith(asked):
        raise MalformedRecord(
            "the tokenizer's chat template changes what comes before an answer with the answer"
        )
    return [
        *_split(asked, spans, tokenizer),
        Passage(ANSWER, _parts(answered[len(asked) :], tokenizer)),
    ]


def _by_turns(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    answers = [
        i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"
    ]
    texts = _written(
        conversation, [step for i in answers for step in ((i, True), (i + 1, False))], tokenizer
    )
    result: list[Passage] = []
    done = ""
    for (asked, _), (answered, _) in zip(texts[::2], texts[1::2], strict=True):
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise MalformedRecord(
                "the tokenizer's chat template does not render it turn by turn (an earlier "
                "turn, or what comes before an answer, changes with what "
                "follows), so prompts and answers cannot be distinguished; enclose the answers "
                "in {% generation %} tags in chat_template.jinja, or give "
                "conversations of one answer"
            )
        result.append(Passage(PROMPT, _parts(asked[len(done) :], tokenizer)))
        result.append(Passage(ANSWER, _parts(answered[len(asked) :], tokenizer)))
        done = answered
    _refuse_omissions(conversation, done, tokenizer)
    return result


def _split(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Yield the text as passages; what is inside the spans is the answers."""
    at = 0
    for begin, end in [*spans, (len(text), len(text))]:
        for mode, piece in ((PROMPT, text[at:begin]), (ANSWER, text[begin:end])):
            if piece:
                yield Passage(mode, _parts(piece, tokenizer))
        at = end


def _refuse_control(conversation: Conversation, tokenizer: Tokenizer) -> None:
    texts = list(_texts([conversation.messages, conversation.tools]))
    for spelling in tokenizer.control_tokens():
        if any(spelling in text for text in texts):
            raise MalformedRecord(
                f"the text holds {spelling!r}, a control token that only the template may set"
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in messages and tools; `parse_conversation` has bounded their depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _refuse_omissions(conversation: Conversation, text: str, tokenizer: Tokenizer) -> None:
    """Raise MalformedRecord where the template leaves out a message's text, its calls, or a tool.

    Short texts are found by chance, so a conversation of the same shape is written as well, once,
    in which every text is unmistakable.
    """
    what = _omitted(conversation, text) or _omitted_of_shape(tokenizer, _shape(conversation))
    if what:
        raise MalformedRecord(
            f"the tokenizer's chat template leaves out {what}: take it out, or give a "
            f"tokenizer whose template has it"
        )


def _omitted(conversation: Conversation, text: str) -> str | None:
    for what, said in _said(conversation):
        said = said.strip()
        if (
            said not in text
            and json.dumps(said, ensure_ascii=False)[1:-1] not in text
            and json.dumps(said)[1:-1] not in text
        ):
            return what
    return None


def _shape(conversation: Conversation) -> str:
    """Return the conversation as JSON, with texts that say where they are."""

    def named(call: dict[str, Any], name: str) -> dict[str, Any]:
        inner = {"name": name, "arguments": {}}
        return {"type": "function", "function": inner} if "function" in call else inner

    messages = []
    for number, message in enumerate(conversation.messages):
        shape: dict[str, Any] = {
            "role": message["role"],
            "content": message["content"] and f"text-{number}-of-shape",
        }
        for key in ("reasoning_content", "reasoning", "thinking"):
            if key in message:
                shape[key] = f"{key}-{number}-of-shape"
        if "tool_calls" in message:
            shape["tool_calls"] = [
                named(call, f"call-{number}-{i}-of-shape")
                for i, call in enumerate(message["tool_calls"])
            ]
        messages.append(shape)
    tools = [named(tool, f"tool-{i}-of-shape") for i, tool in enumerate(conversation.tools or ())]
    return json.dumps([messages, tools or None])


@functools.lru_cache(maxsize=4096)
def _omitted_of_shape(tokenizer: Tokenizer, shape: str) -> str | None:
    messages, tools = json.loads(shape)
    conversation = Conversation("", (), tuple(messages), (), tools, "", ())
    try:
        ((text, _),) = _render(messages, tools, [(len(messages), False)], tokenizer)
    except TemplateRefusal:
        return None  # it wants other texts; the conversation itself was written
    return _omitted(conversation, text)


def _said(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for tool in conversation.tools or ():
        name = tool.get("function", tool)
        yield "'tools'", str(name.get("name", "") if isinstance(name, dict) else "")
    for number, message in enumerate(conversation.messages):
        yield f"the content of message {number} ({message['role']})", message["content"] or ""
        for call in message.get("tool_calls", ()):
            yield f"'tool_calls' of message {number}", call.get("function", call)["name"]
        for name in ("reasoning_content", "reasoning", "thinking"):
            yield f"{name!r} of message {number}", message.get(name, "")


def _parts(text: str, tokenizer: Tokenizer) -> tuple[Part, ...]:
    """Return rendered text with the control tokens in it as ids."""
    control = tokenizer.control_tokens()
    if not control:
        return (text,)
    longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    return tuple(
        control.get(piece, piece) for piece in re.split(f"({longest_first})", text) if piece
    )


def _written(
    conversation: Conversation, steps: list[tuple[int, bool]], tokenizer: Tokenizer
) -> list[Rendered]:
    try:
        return _render(conversation.messages, conversation.tools, steps, tokenizer)
    except TemplateRefusal as error:
        raise MalformedRecord(f"the tokenizer's chat template refuses it: {error}") from None


def _render(
    messages: Any, tools: Any, steps: list[tuple[int, bool]], tokenizer: Tokenizer
) -> list[Rendered]:
    """Return what the template writes, with the values that Hugging Face gives it.

    All but the time of day: a corpus must not depend on it.
    """
    spelled = {token: spelling for spelling, token in tokenizer.control_tokens().items()}
    names = {
        "bos_token": "" if tokenizer.bos is None else spelled.get(tokenizer.bos, ""),
        "eos_token": spelled.get(tokenizer.eod, ""),
        "pad_token": "" if tokenizer.pad is None else spelled.get(tokenizer.pad, ""),
    }
    sandbox = _sandbox(tokenizer)
    # As in transformers: templates take a key without a value for text, and write "None".
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    try:
        return sandbox.render({"messages": messages, "tools": tools, **names}, steps)
    except TemplateLimit as error:
        raise DataError(_problem(tokenizer, str(error))) from None


def _sandbox(tokenizer: Tokenizer) -> TemplateSandbox:
    assert tokenizer.chat_template is not None, "check_own_template was not called"
    try:
        return _opened(tokenizer.chat_template)
    except TemplateLimit as error:
        raise DataError(_problem(tokenizer, str(error))) from None


_opened = functools.lru_cache(maxsize=4)(TemplateSandbox)
"""Processes end when this one does, or when the cache drops a template that is no longer used."""


def _problem(tokenizer: Tokenizer, what: str) -> str:
    return (
        f"--template tokenizer: the chat template of {tokenizer.name} {what}; fix it or name "
        f"another template"
    )
