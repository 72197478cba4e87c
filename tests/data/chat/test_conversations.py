"""Records in the forms that people have, with marks, tools, and keys that nothing reads."""

import json

import numpy as np
import pytest

from megatron_chatflow.cli.preprocess import main as preprocess
from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.chat.conversations import MARKS, parse_conversation
from megatron_chatflow.data.chat.templates import CHAT_TEMPLATES, MalformedRecord, Turn
from megatron_chatflow.tokenizer import load_tokenizer

BYTES = load_tokenizer("ByteLevelTokenizer")


def messages(*contents, **marks):
    return [
        {"role": ("user", "assistant")[i % 2], "content": c} | (marks if i % 2 else {})
        for i, c in enumerate(contents)
    ]


def modes(tmp_path, *records, flags="", code=0):
    """Writes the records; (mode, text) of the sequences of each document."""
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    words = (
        f"--input {tmp_path}/a.jsonl --kind instruct --output-prefix {tmp_path}/a --workers 1 "
        f"--tokenizer-type ByteLevelTokenizer {flags}"
    )
    assert preprocess(words.split()) == code
    if code:
        return None
    corpus = IndexedDataset(str(tmp_path / "a_document"))
    starts = corpus.document_indices
    return [
        [
            (
                int(corpus.sequence_modes[i]),
                bytes(t for t in corpus.sequence(i).tolist() if t < 256).decode(),
            )
            for i in range(starts[d], starts[d + 1])
        ]
        for d in range(corpus.num_documents)
    ]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize(
    ("value", "trained"),
    [(0, False), (False, False), (0.0, False), (1, True), (True, True), (1.0, True), (None, True)],
)
def test_a_mark_says_whether_an_answer_is_trained_on(mark, value, trained):
    marked = messages("a", "b", "c", "d")
    marked[1][mark] = value
    assert parse_conversation({"messages": marked}).trained == (trained, True)
    assert parse_conversation({"messages": messages("a", "b", "c", "d"), mark: value}).trained == (
        trained,
        trained,
    )


def test_an_answer_that_is_not_trained_on_becomes_a_sequence_of_mode_1(tmp_path):
    marked = messages("a", "b", "c", "d")
    marked[1]["weight"] = 0
    first, second = modes(tmp_path, {"messages": marked}, {"messages": messages("a", "", "c", "d")})
    assert [mode for mode, _ in first] == [1, 1, 1, 0] == [mode for mode, _ in second]
    assert first[1][1] == "b" and first[3][1] == "d" and second[1][1] == ""


def test_a_conversation_of_which_nothing_is_trained_on_is_left_out(tmp_path, capsys):
    unmarked = messages("a", "b")
    records = [
        {"messages": unmarked},
        {"messages": messages("a", "b", train=False)},
        {"messages": unmarked, "weight": 0},
        {"messages": messages("a", " ")},
    ]
    assert len(modes(tmp_path, *records)) == 1
    assert "3 empty documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"messages": messages("a", "b", weight=0.5)},
            "'weight' of message 1 is 0.5: write 0 or 1, true or false",
        ),
        ({"messages": messages("a", "b", loss="no")}, "'loss' of message 1 is 'no': write 0 or 1"),
        (
            {"messages": messages("a", "b", train=True, weight=0)},
            "'weight' and 'train' of message 1 say different things",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "train": True},
                    *messages("a", "b")[1:],
                ]
            },
            r"message 0 \(user\) is marked to be trained on",
        ),
        (
            {"messages": messages("a", "b", mask=True)},
            "message 1 has 'mask': say what is trained on with 'weight'",
        ),
        ({"messages": messages("a", "b"), "mask": "User"}, "the record has 'mask': say what"),
        (
            {"messages": messages("a", "b", function_call={"name": "f"})},
            "message 1 has 'function_call': write it as 'tool_calls'",
        ),
        ({"messages": messages("a", "b"), "chosen": "x"}, "the record has 'chosen'"),
        (
            {"messages": messages("a", [{"type": "image_url"}])},
            "part 0 of message 1 is 'image_url': only parts of type 'text' are read",
        ),
        (
            {"messages": [{"role": "system", "content": "S"}, *messages("a", "b")], "system": "T"},
            "'system' and a system message are both there",
        ),
        ({"messages": messages("a", "b"), "tools": "{"}, "'tools' is not JSON"),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            r"'history' is not a list of \[user, assistant\] pairs \(entry 0\)",
        ),
        (
            {"messages": messages("a", "b", tool_calls=[{"f": 1}])},
            "tool call 0 of message 1 is not an object with 'name'",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(record, reason):
    with pytest.raises(MalformedRecord, match=reason):
        parse_conversation(record)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
WITH_TOOLS = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "x"},
    {"role": "assistant", "content": "Two."},
]


@pytest.mark.parametrize("template", ["chatflow", "alpaca", "chatml"])
@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"messages": WITH_TOOLS}, "message 1 has 'tool_calls'"),
        ({"messages": messages("a", "b"), "tools": [{"name": "f"}]}, "'tools'"),
        (
            {"messages": messages("a", "b", reasoning_content="r")},
            "message 1 has 'reasoning_content'",
        ),
        (
            {
                "messages": [
                    *messages("a", "b"),
                    {"role": "tool", "content": "t"},
                    messages("a", "b")[1],
                ]
            },
            "the roles are",
        ),
    ],
)
def test_what_only_a_tokenizers_template_can_write_is_refused_by_ours(template, record, what):
    with pytest.raises(MalformedRecord, match=what):
        CHAT_TEMPLATES[template](parse_conversation(record), BYTES)


def test_the_refusal_names_file_line_and_what_to_do(tmp_path, capsys):
    modes(tmp_path, {"messages": messages("a", "b")}, {"messages": WITH_TOOLS}, code=1)
    message = capsys.readouterr().err
    assert (
        "a.jsonl, line 2: message 1 has 'tool_calls', which only a tokenizer's own chat "
        "template can write: use --template tokenizer"
    ) in message


def test_every_form_gives_the_same_conversation():
    system = {"role": "system", "content": "S"}
    wanted = parse_conversation({"messages": [system, *messages("a", "b", "c", "d")]})
    named = zip(("human", "gpt") * 2, "abcd", strict=True)
    parts = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
        for m in messages("a", "b", "c", "d")
    ]
    forms = [
        {"system": "S", "messages": messages("a", "b", "c", "d")},
        {"system_prompt": "S", "messages": parts},
        {
            "conversations": [
                {"from": "system", "value": "S"},
                *({"from": who, "value": text} for who, text in named),
            ]
        },
        {"system": "S", "conversations": messages("a", "b", "c", "d")},
        {"system": "S", "instruction": "c", "output": "d", "history": [["a", "b"]]},
        {"system": "S", "instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
    ]
    assert [parse_conversation(form) for form in forms] == [wanted] * len(forms)
    assert wanted.turns == (Turn("a", "", "b"), Turn("c", "", "d"))
    completion = parse_conversation(
        {
            "system": "S",
            "prompt": messages("a", "b", "c"),
            "completion": [{"role": "assistant", "content": "d"}],
        }
    )
    assert (completion.turns, completion.trained) == (wanted.turns, (False, True))
    assert parse_conversation({"prompt": "a", "completion": "b"}).turns == (Turn("a", "", "b"),)
    given = parse_conversation(
        {"instruction": "c", "input": "x", "output": "d", "history": [["a", "b"]]}
    )
    assert (
        given.turns == (Turn("a", "", "b"), Turn("c", "x", "d"))
        and given.messages[2]["content"] == "c\nx"
    )


def test_sharegpt_calls_and_results_are_those_of_messages():
    arguments = json.dumps({"name": "add", "arguments": {"a": 1}})
    share = [
        ("human", "1 + 1?"),
        ("function_call", arguments),
        ("observation", "2"),
        ("gpt", "Two."),
    ]
    tools = [{"name": "add", "parameters": {}}]
    ours = parse_conversation(
        {
            "conversations": [{"from": who, "value": text} for who, text in share],
            "tools": json.dumps(tools),
        }
    )
    assert [message["role"] for message in ours.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert ours.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    assert (ours.tools, ours.trained, ours.beyond) == (tools, (True, True), "'tools'")
    theirs = parse_conversation({"messages": WITH_TOOLS})
    assert theirs.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_keys_that_nothing_reads_are_counted_in_the_summary_and_the_manifest(tmp_path, capsys):
    stamped = [message | {"time": 1} for message in messages("a", "b")]
    records = [
        {"id": 1, "messages": stamped},
        {"id": 2, "text": "x", "instruction": "a", "output": "b"},
        {"messages": messages("a", "b", weight=1)},
    ]
    assert len(modes(tmp_path, *records)) == 3
    assert (
        'keys that nothing reads, with the number of records: "id" (2), "messages[].time" '
        '(1), "text" (1)'
    ) in capsys.readouterr().out
    assert read_manifest(tmp_path / "a_document").sources[0]["ignored"] == {
        "id": 2,
        "messages[].time": 1,
        "text": 1,
    }
    assert np.array_equal(
        IndexedDataset(str(tmp_path / "a_document")).document(0),
        IndexedDataset(str(tmp_path / "a_document")).document(2),
    )
