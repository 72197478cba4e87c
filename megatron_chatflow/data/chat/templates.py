"""Records to documents: plain text, parallel text and conversations, each by a template."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.errors import DataError
from megatron_chatflow.tokenizer import Tokenizer

ANSWER = 0
PROMPT = 1

Part = str | int
"""Text to be encoded, or the id of a control token."""


@dataclass(frozen=True)
class Passage:
    """A part of a document that is trained on (`ANSWER`) or not (`PROMPT`)."""

    mode: int
    parts: tuple[Part, ...]


class MalformedRecord(DataError):
    """A record that is not what its file should hold; the message says what is wrong with it."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    `input` is the material that the instruction refers to, often empty.
    """

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Conversation:
    """A conversation, as turns for the templates of this file and as messages for a tokenizer's.

    Attributes:
        system: the system prompt; empty without one.
        turns: questions and answers; none where a template of this file cannot write them.
        messages: `role`, `content` and whatever else each has.
        trained: of each assistant's message, whether it is trained on.
        tools: descriptions of tools, or None.
        beyond: the first thing in it that no template of this file can write; empty where they can.
        ignored: keys of the record that nothing reads.
    """

    system: str
    turns: tuple[Turn, ...]
    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: list[Any] | None
    beyond: str
    ignored: tuple[str, ...]


ChatTemplate = Callable[[Conversation, Tokenizer], list[Passage]]
"""Returns a prompt and its answer for each assistant's message, in order.

Raises MalformedRecord for a conversation that the template cannot hold.
"""


def text_field(record: Mapping[str, Any], key: str) -> str:
    """Return the text under `key`.

    Raises:
        MalformedRecord: there is none, or it is not text, or not text that can be written as UTF-8
            (a lone surrogate).
    """
    if key not in record:
        raise MalformedRecord(f"no key {key!r}")
    return checked_text(record[key], repr(key))


def texts_field(record: Mapping[str, Any], key: str) -> str | list[str]:
    """Return the text under `key`, or the sentences where it holds a list of them.

    Raises:
        MalformedRecord: as `text_field`; or the list holds something other than texts.
    """
    if not isinstance(record.get(key), list):
        return text_field(record, key)
    return [
        checked_text(item, f"item {number} of {key!r}") for number, item in enumerate(record[key])
    ]


def checked_text(value: Any, what: str) -> str:
    """Return `value`, which the message calls `what`.

    Raises:
        MalformedRecord: it is not text, or has a lone surrogate.
    """
    if not isinstance(value, str):
        raise MalformedRecord(f"{what} is {json_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MalformedRecord(f"{what} has a lone surrogate at character {error.start}") from error
    return value


def json_kind(value: Any) -> str:
    """Return what a parsed JSON value is, in words."""
    return {
        type(None): "null",
        bool: "a boolean",
        str: "a text",
        list: "a list",
        dict: "an object",
    }.get(type(value), "a number")


def _chatflow(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    """Write `### Instruction:{instruction}{input}### Response:{output}`, without line ends.

    As in the ChatFlow recipe; a system prompt comes before it.
    """
    lead: tuple[Part, ...] = () if tokenizer.bos is None else (tokenizer.bos,)
    result = []
    for number, turn in enumerate(conversation.turns):
        system = "" if number else conversation.system
        result.append(
            Passage(
                PROMPT,
                (
                    *([] if number else lead),
                    f"{system}### Instruction:{turn.instruction}{turn.input}### Response:",
                ),
            )
        )
        result.append(Passage(ANSWER, (turn.output, tokenizer.eod)))
    return result


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request."
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. "
    "Write a response that appropriately completes the request."
)


def _alpaca(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    """Write Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, `PROMPT_DICT`).

    A system prompt takes the place of the first sentence.
    """
    result = []
    for number, turn in enumerate(conversation.turns):
        given = f"### Input:\n{turn.input}\n\n" if turn.input else ""
        prompt = f"### Instruction:\n{turn.instruction}\n\n{given}### Response:\n"
        if number:
            lead: tuple[Part, ...] = ("\n\n",)
        else:
            lead = (() if tokenizer.bos is None else (tokenizer.bos,)) + (
                (conversation.system or (_ALPACA_INPUT if given else _ALPACA)) + "\n\n",
            )
        result.append(Passage(PROMPT, (*lead, prompt)))
        result.append(Passage(ANSWER, (turn.output, tokenizer.eod)))
    return result


def _chatml(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    r"""Write `<|im_start|>role\\n{content}<|im_end|>\\n`.

    The marks are control tokens where the tokenizer has them, else plain text.
    """
    start, end = (_mark(tokenizer, mark) for mark in ("<|im_start|>", "<|im_end|>"))
    system: tuple[Part, ...] = (
        (start, f"system\n{conversation.system}", end, "\n") if conversation.system else ()
    )
    result = []
    for number, turn in enumerate(conversation.turns):
        lead: tuple[Part, ...] = ("\n",) if number else system
        result.append(
            Passage(
                PROMPT, (*lead, start, f"user\n{question(turn)}", end, "\n", start, "assistant\n")
            )
        )
        result.append(Passage(ANSWER, (turn.output, end)))
    return result


def question(turn: Turn) -> str:
    """Return instruction and input as one message."""
    return f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction


def _mark(tokenizer: Tokenizer, spelling: str) -> Part:
    token = tokenizer.control_id(spelling)
    return spelling if token is None else token


def _plain(template: ChatTemplate) -> ChatTemplate:
    """Return a template that refuses what questions and answers cannot express."""

    def checked(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
        if conversation.beyond:
            raise MalformedRecord(
                f"{conversation.beyond}, which only a tokenizer's own chat template can "
                f"write: use --template tokenizer, or take it out"
            )
        return template(conversation, tokenizer)

    return checked


def mark_untrained(passages: list[Passage], trained: Sequence[bool]) -> list[Passage]:
    """Return the passages with the answers that are not trained on as prompts.

    Raises:
        MalformedRecord: answers and messages cannot be matched.
    """
    if all(trained):
        return passages
    count = sum(passage.mode == ANSWER for passage in passages)
    if count != len(trained):
        raise MalformedRecord(
            f"the chat template marks {count} answers in {len(trained)} messages of the "
            f"assistant, so those not trained on cannot be found"
        )
    marks = iter(trained)
    return [
        Passage(PROMPT, p.parts) if p.mode == ANSWER and not next(marks) else p for p in passages
    ]


def _own(conversation: Conversation, tokenizer: Tokenizer) -> list[Passage]:
    from megatron_chatflow.data.chat.jinja_template import apply_tokenizer_template

    return apply_tokenizer_template(conversation, tokenizer)


TOKENIZER_TEMPLATE = "tokenizer"
CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "chatflow": _plain(_chatflow),
    "alpaca": _plain(_alpaca),
    "chatml": _plain(_chatml),
    TOKENIZER_TEMPLATE: _own,
}
DEFAULT_CHAT_TEMPLATE = "chatflow"
ENDS_WITH_EOD = frozenset({"chatflow", "alpaca"})
"""Templates that end every answer with the end-of-document token."""


class ParallelTemplate:
    r"""A text with the fields of a record in braces, such as `{en}\n{zh}`.

    Args:
        template: `\n`, `\t` and `\\` may be written out, as a shell passes them on; `{{` and `}}`
            stand for braces.

    Attributes:
        fields: names of the fields, in their order in the text.

    Raises:
        DataError: it names no field, or has more than a name in braces.
    """

    def __init__(self, template: str) -> None:
        text = re.sub(
            r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), template
        )
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(
                f"--template {template!r} cannot be read ({error}): name fields in braces, "
                f"as in '{{en}}\\n{{zh}}'"
            ) from error
        self._pieces = [(literal, name) for literal, name, _, _ in pieces]
        self._format = "".join(
            literal.replace("%", "%%") + ("%s" if name else "") for literal, name in self._pieces
        )
        self.fields = [name for _, name in self._pieces if name]
        if not any(name for _, name in self._pieces) or any(
            name == "" or spec or conversion for _, name, spec, conversion in pieces
        ):
            raise DataError(
                f"--template {template!r} must name the fields of a record in braces and "
                f"nothing else, as in '{{en}}\\n{{zh}}'"
            )

    def fill(self, record: Mapping[str, Any]) -> str:
        """Return the text for one record.

        Raises:
            MalformedRecord: a field is missing, or is not text.
        """
        return "".join(
            literal + (text_field(record, name) if name else "") for literal, name in self._pieces
        )

    def fill_all(self, columns: Sequence[Sequence[str]]) -> list[str]:
        """Return the texts for many records, given the values of each of `fields`."""
        return [self._format % values for values in zip(*columns, strict=True)]
