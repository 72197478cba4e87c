"""The chat template that a Hugging Face tokenizer brings along: Jinja over messages, in a sandbox."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_chatflow.data.templates import ANSWER, PROMPT, Conversation, MalformedRecord, Part, Passage, question
from megatron_chatflow.tokenizer import Tokenizer


def check_own_template(tokenizer: Tokenizer) -> None:
    """Checks that the tokenizer has a chat template that can be read.

    Raises:
        ValueError: it has none, or it is not Jinja.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--template tokenizer: {tokenizer.name} ({tokenizer.type}) has no chat template; give a HuggingFaceTokenizer whose folder has one "
            "(chat_template in tokenizer_config.json, or chat_template.jinja), or name another template"
        )
    try:
        _compiled(tokenizer.chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--template tokenizer: the chat template of {tokenizer.name} is not Jinja ({error}); mend it or name another") from error


def own_template(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    """The tokenizer's own chat template, turn by turn: what it adds up to `add_generation_prompt` is the prompt, what the answer adds the rest.

    Control tokens that the template spells are set as ids; in what the messages say, none may be spelled.

    Raises:
        MalformedRecord: a message spells a control token, the template refuses the conversation, or renders an earlier turn in another way
            when a later one follows, so that prompts and answers cannot be told apart.
    """
    assert tokenizer.chat_template is not None, "check_own_template was not called"
    _refuse_control(conversation, tokenizer)
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    result: list[Passage] = []
    done = ""
    for turn in conversation.turns:
        messages.append({"role": "user", "content": question(turn)})
        asked = _render(messages, tokenizer, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": turn.output})
        answered = _render(messages, tokenizer, add_generation_prompt=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise MalformedRecord(
                "the tokenizer's chat template does not render it turn by turn (an earlier turn, or what comes before an answer, changes with what "
                "follows), so prompts and answers cannot be told apart"
            )
        result.append(Passage(PROMPT, _parts(asked[len(done) :], tokenizer)))
        result.append(Passage(ANSWER, _parts(answered[len(asked) :], tokenizer)))
        done = answered
    return result


def _refuse_control(conversation: Conversation, tokenizer: Tokenizer) -> None:
    texts = [conversation.system, *(text for turn in conversation.turns for text in (turn.instruction, turn.input, turn.output))]
    for spelling in tokenizer.control_tokens():
        if any(spelling in text for text in texts):
            raise MalformedRecord(f"the text holds {spelling!r}, a control token that only the template may set")


def _parts(text: str, tokenizer: Tokenizer) -> tuple[Part, ...]:
    """Rendered text with the control tokens in it as ids."""
    control = tokenizer.control_tokens()
    if not control:
        return (text,)
    longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    return tuple(control.get(piece, piece) for piece in re.split(f"({longest_first})", text) if piece)


def _render(messages: list[dict[str, str]], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> str:
    spelled = {token: spelling for spelling, token in tokenizer.control_tokens().items()}
    names = {"bos_token": spelled.get(tokenizer.bos, ""), "eos_token": spelled.get(tokenizer.eod, ""), "pad_token": spelled.get(tokenizer.pad, "")}
    try:
        return _compiled(tokenizer.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
    except jinja2.TemplateError as error:
        raise MalformedRecord(f"the tokenizer's chat template refuses it: {error}") from error


@functools.cache
def _compiled(template: str) -> Any:
    """The template with what Hugging Face gives it, but the time of day: a corpus must not depend on it."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
