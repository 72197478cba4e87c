"""Records to documents."""

import pytest

from megatron_chatflow.data.chat.conversations import parse_conversation
from megatron_chatflow.data.chat.templates import (
    CHAT_TEMPLATES,
    MalformedRecord,
    ParallelTemplate,
    text_field,
)
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("ByteLevelTokenizer")
WITHOUT_BOS = load_tokenizer("NullTokenizer", vocab_size=10)
BOS, EOD = TOKENIZER.bos, TOKENIZER.eod


class WithMarks(type(TOKENIZER)):
    """Bytes, with the two marks of ChatML as control tokens."""

    def control_id(self, spelling):
        return {"<|im_start|>": 300, "<|im_end|>": 301}.get(spelling)


EXPECTED = "(user and assistant in turn, assistant last, are expected; a tool's after its call)"
KNOWN = "(known are system, user, assistant, tool, human, gpt, function_call, observation)"


def chat(*contents, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {
        "messages": messages
        + [
            {"role": ("user", "assistant")[i % 2], "content": content}
            for i, content in enumerate(contents)
        ]
    }


def render(template, record, tokenizer=TOKENIZER):
    """Returns mode and parts of each passage, neighboring texts joined."""
    result = []
    for passage in CHAT_TEMPLATES[template](parse_conversation(record), tokenizer):
        parts = []
        for part in passage.parts:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        result.append((passage.mode, parts))
    return result


def test_chatflow_has_no_line_ends_and_wraps_in_begin_and_end():
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert render("chatflow", record) == [
        (1, [BOS, "### Instruction:Add.1 2### Response:"]),
        (0, ["3", EOD]),
    ]
    assert render("chatflow", record, WITHOUT_BOS)[0] == (
        1,
        ["### Instruction:Add.1 2### Response:"],
    )


def test_in_chatflow_each_answer_ends_and_the_conversation_begins_once():
    assert render("chatflow", chat("a", "b", "c", "d", system="Be kind.")) == [
        (1, [BOS, "Be kind.### Instruction:a### Response:"]),
        (0, ["b", EOD]),
        (1, ["### Instruction:c### Response:"]),
        (0, ["d", EOD]),
    ]


def test_alpaca_is_stanford_s_with_and_without_input():
    task = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    assert render("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}) == [
        (
            1,
            [
                BOS,
                (
                    f"{task}, paired with an input that provides further context. {ask}### "
                    f"Input:\n1 2\n\n### Response:\n"
                ),
            ],
        ),
        (0, ["3", EOD]),
    ]
    assert render("alpaca", {"instruction": "Add.", "input": None, "output": "3"})[0] == (
        1,
        [BOS, f"{task}. {ask}### Response:\n"],
    )
    assert render("alpaca", chat("a", "b", "c", "d", system="S"))[2] == (
        1,
        ["\n\n### Instruction:\nc\n\n### Response:\n"],
    )
    assert render("alpaca", chat("a", "b", system="S"))[0] == (
        1,
        [BOS, "S\n\n### Instruction:\na\n\n### Response:\n"],
    )


def test_chatml_sets_the_marks_as_ids_where_the_tokenizer_has_them():
    assert render("chatml", chat("a", "b", "c", "d", system="S"), WithMarks()) == [
        (1, [300, "system\nS", 301, "\n", 300, "user\na", 301, "\n", 300, "assistant\n"]),
        (0, ["b", 301]),
        (1, ["\n", 300, "user\nc", 301, "\n", 300, "assistant\n"]),
        (0, ["d", 301]),
    ]


def test_chatml_writes_the_marks_as_text_where_the_tokenizer_lacks_them():
    assert render("chatml", {"instruction": "a", "input": "x", "output": "b"}) == [
        (1, ["<|im_start|>user\na\nx<|im_end|>\n<|im_start|>assistant\n"]),
        (0, ["b<|im_end|>"]),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "none of 'messages', 'conversations', 'instruction' and 'prompt'"),
        ({"messages": None}, "none of 'messages', 'conversations', 'instruction' and 'prompt'"),
        ({"instruction": "a"}, "no key 'output'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number, not text"),
        ({"messages": "a"}, "'messages' is not a list of messages"),
        ({"messages": []}, "'messages' is empty"),
        (
            {"messages": ["a"]},
            "message 0 is not an object with 'role' and 'content' (or 'from' and 'value')",
        ),
        (
            {"messages": [{"role": "user"}]},
            "message 0 is not an object with 'role' and 'content' (or 'from' and 'value')",
        ),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 0 has the role 'bot' " + KNOWN),
        (
            {"messages": [{"role": "user", "content": {}}]},
            "the content of message 0 is an object, not text",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "the content of message 0 has a lone surrogate at character 0",
        ),
        (chat("a"), "the roles are user " + EXPECTED),
        (chat("a", "b", "c"), "the roles are user, assistant, user " + EXPECTED),
        (chat(system="a"), "the roles are system alone " + EXPECTED),
    ],
)
def test_records_that_are_no_conversation_are_malformed(record, reason):
    with pytest.raises(MalformedRecord) as error:
        parse_conversation(record)
    assert str(error.value) == reason


def test_a_parallel_template_is_filled_with_the_fields_it_names():
    record = {"en": "{zh}\\n", "zh-CN": "你好", "0": "zero"}
    assert (
        ParallelTemplate("{en}\\n{zh-CN}\\t\\\\n{{0}}{0}").fill(record)
        == "{zh}\\n\n你好\t\\n{0}zero"
    )
    assert ParallelTemplate("{en}\n{en}").fill(record) == "{zh}\\n\n{zh}\\n"


@pytest.mark.parametrize("template", ["", "text", "{}", "{en", "en}", "{en!r}", "{en:5}"])
def test_a_template_without_fields_or_with_more_than_names_is_refused(template):
    with pytest.raises(ChatflowError, match=r"fields .*in braces.*, as in '\{en\}\\n\{zh\}'"):
        ParallelTemplate(template)


def test_a_missing_field_is_malformed():
    with pytest.raises(MalformedRecord, match="no key 'zh'"):
        ParallelTemplate("{en}{zh}").fill({"en": "a"})
    with pytest.raises(MalformedRecord, match="'a' is a number, not text"):
        text_field({"a": 1.5}, "a")
