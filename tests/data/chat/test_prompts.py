"""Prompts: text as it is, and conversations as training saw them."""

import json

import numpy as np
import pytest

from megatron_chatflow.cli.preprocess import main as preprocess
from megatron_chatflow.data import IndexedDataset
from megatron_chatflow.data.chat.prompts import chat_prompt, read_prompts, text_prompt
from megatron_chatflow.data.chat.templates import MalformedRecord
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from tests.sample import QUICKSTART

BYTES = load_tokenizer("ByteLevelTokenizer")
PIECES = load_tokenizer("SentencePieceTokenizer", tokenizer_model=QUICKSTART / "tokenizer.model")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "再说一遍。"},
    {"role": "assistant", "content": "四。"},
]


@pytest.mark.parametrize("template", ["chatflow", "alpaca", "chatml"])
def test_a_prompt_is_what_preprocess_writes_before_the_last_answer(template, tmp_path, capsys):
    records = [
        {"messages": CHAT},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say it.", "output": "It."},
    ]
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    flags = (
        f"--input {tmp_path}/chat.jsonl --kind instruct --template {template} --output-prefix "
        f"{tmp_path}/chat --workers 1"
    )
    flags += (
        f" --tokenizer-type SentencePieceTokenizer --tokenizer-model {QUICKSTART}/tokenizer.model"
    )
    assert preprocess(flags.split()) == 0
    corpus = IndexedDataset(str(tmp_path / "chat_document"))
    asked = [{"messages": CHAT[:-1]}, records[1], {"prompt": "Say it."}]
    for number, record in enumerate(asked):
        last = int(corpus.document_indices[number + 1]) - 1
        complete = corpus.document(number).tolist()
        answer = int(corpus.sequence_lengths[last])
        assert corpus.sequence_modes[last] == 0
        prompt = chat_prompt(record, template, PIECES)
        assert prompt.ids == complete[:-answer]
        if prompt.end_text:
            assert PIECES.decode(complete[-answer:]).endswith(prompt.end_text)
        else:
            assert complete[-1] in prompt.end_ids
    capsys.readouterr()


def test_an_answer_ends_with_the_template_s_mark_or_the_end_of_document():
    assert chat_prompt({"prompt": "a"}, "chatflow", BYTES).end_ids == {BYTES.eod}
    marked = chat_prompt({"prompt": "a"}, "chatml", BYTES)
    assert (marked.end_ids, marked.end_text) == ({BYTES.eod}, "<|im_end|>")
    assert text_prompt({"prompt": "a"}, BYTES).end_ids == {BYTES.eod}


def test_text_is_encoded_as_it_is_after_the_token_that_is_asked_for():
    assert text_prompt({"prompt": "ab"}, BYTES).ids == [97, 98]
    assert text_prompt({"text": "ab"}, BYTES, BYTES.bos).ids == [BYTES.bos, 97, 98]
    with pytest.raises(MalformedRecord, match="the prompt is empty"):
        text_prompt({"prompt": ""}, BYTES)
    with pytest.raises(MalformedRecord, match="no key 'prompt'"):
        text_prompt({"messages": CHAT}, BYTES)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT}, "the last message is the assistant's; a prompt ends with the user's"),
        ({"messages": []}, "the roles are assistant"),
        ({"messages": "a"}, "'messages' is not a list"),
        ({"text": "a"}, "no key 'instruction'"),
        ({"instruction": 3}, "'instruction' is a number, not text"),
    ],
)
def test_what_is_no_open_conversation_is_malformed(record, reason):
    with pytest.raises(MalformedRecord, match=reason):
        chat_prompt(record, "chatflow", BYTES)


def test_a_file_holds_a_prompt_a_line_as_json_or_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"messages": []}\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("one\n\n两\n", encoding="utf-8")
    assert [record for _, record in read_prompts(str(tmp_path / "a.jsonl"))] == [
        {"prompt": "a"},
        {"messages": []},
    ]
    assert [record for _, record in read_prompts(str(tmp_path / "a.txt"))] == [
        {"prompt": "one"},
        {"prompt": "两"},
    ]
    (tmp_path / "b.jsonl").write_text("one\n", encoding="utf-8")
    with pytest.raises(ChatflowError, match=r"b\.jsonl, line 1: not JSON"):
        list(read_prompts(str(tmp_path / "b.jsonl")))


def test_the_ids_are_plain_numbers():
    assert all(type(i) is int for i in chat_prompt({"prompt": "a"}, "alpaca", PIECES).ids)
    assert np.array(chat_prompt({"prompt": "a"}, "alpaca", PIECES).ids).max() < PIECES.vocab_size
