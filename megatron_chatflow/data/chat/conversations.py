"""Records to conversations, and which of their answers are trained on.

Records are messages, ShareGPT's, instructions with a history, or prompts with completions. Nothing
in a record is dropped silently: what cannot be written is refused by name, and keys that are not
read are counted.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_chatflow.data.chat.templates import (
    Conversation,
    MalformedRecord,
    Turn,
    checked_text,
    json_kind,
    text_field,
)

Message = dict[str, Any]

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},
}
MARKS = ("weight", "loss", "train", "trainable", "training", "train_on_turn", "loss_weight")
"""Keys of a message, or of a record for all of it: whether it is trained on (true, 1, false, 0)."""
_BEYOND = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message that only the tokenizer's chat template can write."""
_REFUSED = {
    **dict.fromkeys(
        ("mask", "masked", "loss_mask", "assistant_masks"),
        "say what is trained on with 'weight': 0 or 1",
    ),
    "train_detail": "parts of an answer are not masked; take it out, or make it a "
    "separate message with 'weight': 0",
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos", "documents"),
        "only text is read; take it out",
    ),
    **dict.fromkeys(
        ("chosen", "rejected"), "pairs of answers are not trained on; keep one as the answer"
    ),
    "function_call": "write it as 'tool_calls'",
    "functions": "write them as 'tools'",
    "chat_template_kwargs": "templates get no further values; take it out",
}
_SYSTEM = ("system", "system_prompt")
_FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "input", "output", "history"),
    "prompt": ("prompt", "completion"),
}
_DEPTH = 100


def parse_conversation(record: Mapping[str, Any]) -> Conversation:
    """Read a conversation in one of several forms.

        {"messages": [{"role", "content"}, ...]}
        {"conversations": [{"from", "value"}, ...]}
            ShareGPT: human, gpt, system, function_call, observation, tool
        {"instruction", "input", "output", "history": [[user, assistant], ...]}
            Alpaca; `input` and `history` may be missing
        {"prompt", "completion"}
            texts, or lists of messages, of which the completion is trained on

    Each may have `system` and `tools`. Messages are an optional system prompt, then user and
    assistant in turn, the assistant last; an assistant may call tools, whose results follow. An
    answer is trained on unless its message or the record says otherwise (`MARKS`), or it is empty.

    Raises:
        MalformedRecord: the record is none of these, or has what cannot be read; names the key.
    """
    form = next((key for key in _FORMS if record.get(key) is not None), None)
    if form is None:
        raise MalformedRecord("none of 'messages', 'conversations', 'instruction' and 'prompt'")
    _refuse(record, "the record")
    ignored = {
        key for key in record if key not in (*_FORMS[form], *_SYSTEM, *MARKS, *_REFUSED, "tools")
    }
    given = ""
    if form in ("messages", "conversations"):
        messages = list(_messages(record[form], form, ignored))
    elif form == "instruction":
        messages, given = list(_alpaca(record)), _optional_text(record, "input")
    else:
        messages = list(_completion(record, ignored))
    for key in _SYSTEM:
        if system := _optional_text(record, key):
            if messages and messages[0]["role"] == "system" and messages[0]["content"] != system:
                raise MalformedRecord(f"{key!r} and a system message are both there: keep one")
            messages = [
                {"role": "system", "content": system},
                *(m for m in messages if m["role"] != "system"),
            ]
    trained = bool(_mark(record, "the record", True))
    return _conversation(
        messages, trained, _tools(record.get("tools")), given, tuple(sorted(ignored))
    )


def _messages(messages: Any, key: str, ignored: set[str]) -> Iterator[Message]:
    """Yield the messages under `key` as `{"role", "content", ...}`, with the marks under ""."""
    if not isinstance(messages, list) or not messages:
        raise MalformedRecord(
            f"{key!r} is not a list of messages"
            if not isinstance(messages, list)
            else f"{key!r} is empty"
        )
    for number, message in enumerate(messages):
        what = f"message {number}"
        names = next(
            (
                names
                for names in (("role", "content"), ("from", "value"))
                if isinstance(message, dict) and names[0] in message
            ),
            None,
        )
        if names is None or (names[1] not in message and not message.get("tool_calls")):
            raise MalformedRecord(
                f"{what} is not an object with 'role' and 'content' (or 'from' and 'value')"
            )
        _refuse(message, what)
        role, content = message[names[0]], message.get(names[1])
        if not isinstance(role, str) or role not in _ROLES:
            raise MalformedRecord(f"{what} has the role {role!r} (known are {', '.join(_ROLES)})")
        result = {"role": _ROLES[role], "content": content}
        rest = {
            name: value
            for name, value in message.items()
            if name not in (*names, *MARKS, *_REFUSED)
        }
        ignored.update(f"{key}[].{name}" for name in rest if name not in _BEYOND)
        result |= {name: value for name, value in rest.items() if value not in (None, "", [])}
        if role == "function_call":
            result |= {
                "content": "",
                "tool_calls": _calls(_parsed(content, f"the call of {what}"), what),
            }
        elif result.get("tool_calls"):
            result["tool_calls"] = _calls(result["tool_calls"], what)
        if content is not None or not result.get("tool_calls"):
            result["content"] = _content(result["content"], what)
        for name in _BEYOND:
            if name in result and result["role"] != "assistant":
                raise MalformedRecord(
                    f"{what} ({role}) has {name!r}, which only an assistant's can"
                )
            if name in result and name != "tool_calls":
                result[name] = checked_text(result[name], f"{name!r} of {what}")
        trained = _mark(message, what, None)
        if trained and result["role"] != "assistant":
            raise MalformedRecord(
                f"{what} ({role}) is marked to be trained on, and only answers are: take the mark "
                "out, or use train_on_prompt"
            )
        yield result | {"": trained}  # no key of JSON that a template reads


def _alpaca(record: Mapping[str, Any]) -> Iterator[Message]:
    history = record.get("history") or []
    for number, pair in enumerate(history if isinstance(history, list) else [None]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise MalformedRecord(
                f"'history' is not a list of [user, assistant] pairs (entry {number})"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            yield {
                "role": role,
                "content": checked_text(text, f"the {role}'s text in entry {number} of 'history'"),
            }
    yield {"role": "user", "content": text_field(record, "instruction")}
    yield {"role": "assistant", "content": text_field(record, "output")}


def _completion(record: Mapping[str, Any], ignored: set[str]) -> Iterator[Message]:
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record.get(key), list):
            for message in _messages(record[key], key, ignored):
                yield message if key == "completion" else message | {"": False}
        else:
            yield {"role": role, "content": text_field(record, key)}


def _conversation(
    messages: list[Message], trained: bool, tools: Any, given: str, ignored: tuple[str, ...]
) -> Conversation:
    shown = [message["role"] for message in messages]
    system = messages[0]["content"] if shown[0] == "system" else ""
    talk = messages[1:] if shown[0] == "system" else messages
    roles = [message["role"] for message in talk]
    # A call's results and the answer to them belong to the turn of the call.
    before = "assistant"
    calls = False
    for message in talk:
        role = message["role"]
        expected = (
            role == "assistant"
            if before in ("user", "tool") and role != "tool"
            else role == "user"
            if role != "tool"
            else calls
        )
        if not expected:
            before = ""
            break
        before, calls = role, bool(message.get("tool_calls")) or (role == "tool" and calls)
    if before != "assistant" or not roles:
        raise MalformedRecord(
            f"the roles are {', '.join(roles) or 'system alone'} (user and assistant in turn, "
            "assistant last, are expected; a tool's after its call)"
        )
    beyond = "'tools'" if tools else ""
    for number, message in enumerate(messages):
        names = [repr(name) for name in _BEYOND if name in message]
        if not beyond and (names or message["role"] == "tool"):
            beyond = (
                f"message {number} has {names[0]}" if names else f"message {number} is a tool's"
            )
    marks = []
    for message in talk:
        if message["role"] == "assistant":
            says = bool((message["content"] or "").strip()) or any(
                name in message for name in _BEYOND
            )
            marks.append(trained and message.get("") is not False and says)
    turns: tuple[Turn, ...] = ()
    if not beyond:
        pairs = list(zip(talk[::2], talk[1::2], strict=True))
        inputs = [""] * (len(pairs) - 1) + [given]
        turns = tuple(
            Turn(user["content"], extra, answer["content"])
            for (user, answer), extra in zip(pairs, inputs, strict=True)
        )
    if given:
        messages[-2] = messages[-2] | {"content": f"{messages[-2]['content']}\n{given}"}
    clean = tuple({name: value for name, value in message.items() if name} for message in messages)
    _check_texts([clean, tools])
    return Conversation(system, turns, clean, tuple(marks), tools, beyond, ignored)


def _refuse(mapping: Mapping[str, Any], what: str) -> None:
    for key, fix in _REFUSED.items():
        if mapping.get(key) not in (None, "", [], {}):
            raise MalformedRecord(f"{what} has {key!r}: {fix}")


def _mark(mapping: Mapping[str, Any], what: str, default: bool | None) -> bool | None:
    """Return whether the marks of a message or record say to train on it, or `default`."""
    found: dict[str, bool] = {}
    for key in MARKS:
        value = mapping.get(key)
        if value is None:
            continue
        if isinstance(value, str | list | dict) or value not in (0, 1):
            raise MalformedRecord(
                f"{key!r} of {what} is {value!r:.60}: write 0 or 1, true or false"
            )
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        raise MalformedRecord(
            f"{' and '.join(map(repr, found))} of {what} say different things: keep one"
        )
    return next(iter(found.values()), default)


def _content(content: Any, what: str) -> str:
    """Return the text of a message, or of its parts of type `text`."""
    if not isinstance(content, list):
        return checked_text(content, f"the content of {what}")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else json_kind(part)
        if kind != "text":
            raise MalformedRecord(
                f"part {number} of {what} is {kind!r:.60}: only parts of type 'text' are read"
            )
        texts.append(checked_text(part.get("text"), f"the text of part {number} of {what}"))
    return "".join(texts)


def _optional_text(record: Mapping[str, Any], key: str) -> str:
    return "" if record.get(key) is None else text_field(record, key)


def _parsed(value: Any, what: str) -> Any:
    """Return JSON that is written as a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise MalformedRecord(f"{what} is not JSON ({error})") from error


def _calls(calls: Any, what: str) -> list[Any]:
    """Return tool calls with their arguments as objects, as templates expect them."""
    calls = calls if isinstance(calls, list) else [calls]
    result = []
    for number, call in enumerate(calls):
        where = f"tool call {number} of {what}"
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise MalformedRecord(
                f"{where} is not an object with 'name' and 'arguments' "
                f"(or with them under 'function')"
            )
        inner = inner | {
            "arguments": _parsed(inner.get("arguments", {}), f"'arguments' of {where}")
        }
        result.append(call | {"function": inner} if "function" in call else inner)
    return result


def _tools(tools: Any) -> list[Any] | None:
    tools = _parsed(tools, "'tools'") if tools else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise MalformedRecord("'tools' is not a list of objects")
    return tools or None


def _check_texts(value: Any) -> None:
    """Raise MalformedRecord for a text that is not UTF-8, or for values nested too deeply."""
    left = [(value, 0)]
    while left:
        value, depth = left.pop()
        if depth > _DEPTH:
            raise MalformedRecord(
                f"'tools' or 'tool_calls' is nested more than {_DEPTH} levels deep"
            )
        if isinstance(value, str):
            checked_text(value, "a text")
        elif isinstance(value, dict):
            left += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple):
            left += [(item, depth + 1) for item in value]
