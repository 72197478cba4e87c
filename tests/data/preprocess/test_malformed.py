"""Malformed records and wrong options of `preprocess`."""

import io
import json
import os

import pytest
import sentencepiece

from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.summary import MalformedInput
from megatron_chatflow.errors import ChatflowError
from tests.data.preprocess.samples import TEXTS, documents

CORES = len(os.sched_getaffinity(0))


MALFORMED = [
    (b"nonsense", "not JSON"),
    (b'{"text": "cut', "not JSON"),
    (b'["text"]', "JSON, but a list and not an object"),
    (b'"text"', "JSON, but a text and not an object"),
    (b"17", "JSON, but a number and not an object"),
    (b'{"txt": "a"}', "no key 'text'"),
    (b'{"text": null}', "'text' is null, not text"),
    (b'{"text": {"a": "b"}}', "'text' is an object, not text"),
    (b'{"text": ["a", 1]}', "item 1 of 'text' is a number, not text"),
    (b'{"text": "a"} {"text": "b"}', "not JSON (Extra data"),
    (b'{"text": true}', "'text' is a boolean, not text"),
    (b'{"text": "\xff"}', "not UTF-8 (byte 10 is 0xff)"),
    (b'{"text": "a\\ud83d"}', "'text' has a lone surrogate at character 1"),
    (b'{"text": ' + b"[" * 100_000, "JSON nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_a_malformed_line_is_named_and_nothing_is_written(run, line, reason):
    with pytest.raises(MalformedInput) as error:
        run(
            {
                "good.jsonl": [{"text": "a"}],
                "bad.jsonl": b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n',
            }
        )
    named, conclusion = str(error.value).split("\n")
    assert named.startswith(f"bad.jsonl, line 3: {reason}")
    assert conclusion.startswith(
        "1 malformed record, so nothing was written: fix the input, or leave them out with "
        "--skip-malformed"
    )
    assert not run.folder.exists()


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_malformed_lines_can_be_left_out(run, line, reason):
    summary = run(
        {"bad.jsonl": b'{"text": "a"}\n' + line + b'\n{"text": "b"}'},
        skip_malformed=True,
        max_malformed=1.0,
    )
    (prefix,) = summary.corpora
    assert documents(prefix) == ["a", "b"]
    assert summary.malformed == 1 and summary.shown[0].startswith(f"bad.jsonl, line 2: {reason}")


@pytest.mark.parametrize("workers", [1, 2])
def test_of_many_malformed_lines_the_first_are_named_and_all_are_counted(run, workers):
    lines = [b'{"text": "%d %s"}' % (i, b"x" * 100) if i % 3 else b"nonsense" for i in range(9000)]
    with pytest.raises(MalformedInput) as error:
        run({"bad.jsonl": b"\n".join(lines)}, workers=workers)
    named = str(error.value).split("\n")
    assert [line.split(":")[0] for line in named[:-1]] == [
        f"bad.jsonl, line {1 + 3 * i}" for i in range(10)
    ]
    assert named[-1].startswith("3,000 malformed records")


LONG = [{"text": "a"}, {"text": "x" * 200}, {"text": "b"}, {"text": "x" * 300}]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_record_beyond_the_limit_is_refused_by_name_and_the_rest_is_not_read(run, form):
    content = (
        json.dumps(LONG).encode()
        if form == "array"
        else b"".join(json.dumps(record).encode() + b"\n" for record in LONG) + b"nonsense"
    )
    with pytest.raises(MalformedInput) as error:
        run({"a.jsonl": content}, max_document_bytes=100)
    what = "record" if form == "array" else "line"
    assert str(error.value) == (
        f"a.jsonl, {what} 2: longer than 100 bytes, so nothing was written: correct the input, "
        "give a larger --max-document-bytes, or leave such records out with --skip-malformed"
    )
    assert not run.folder.exists()


@pytest.mark.parametrize("form", ["lines", "array"])
def test_records_beyond_the_limit_are_left_out_and_counted_with_skip_malformed(run, form):
    content = (
        json.dumps(LONG).encode()
        if form == "array"
        else b"".join(json.dumps(record).encode() + b"\n" for record in LONG) + b"nonsense"
    )
    summary = run(
        {"a.jsonl": content},
        max_document_bytes=100,
        skip_malformed=True,
        max_malformed=1.0,
        workers=2,
    )
    (prefix,) = summary.corpora
    assert documents(prefix) == ["a", "b"]
    assert (summary.malformed, summary.too_long) == ((2, 2) if form == "array" else (3, 2))
    what = "record" if form == "array" else "line"
    assert list(summary.shown[:2]) == [
        f"a.jsonl, {what} {number}: longer than 100 bytes" for number in (2, 4)
    ]
    (source,) = read_manifest(prefix).sources
    assert (source["malformed"], source["too_long"]) == (summary.malformed, 2)


def test_text_that_holds_a_control_token_of_the_template_is_refused_in_conversations(run, tmp_path):
    model = io.BytesIO()
    marks = ["<|im_start|>", "<|im_end|>"]
    options = {
        "vocab_size": 400,
        "byte_fallback": True,
        "minloglevel": 3,
        "hard_vocab_limit": False,
        "user_defined_symbols": marks,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, **options
    )
    (tmp_path / "chat.model").write_bytes(model.getvalue())
    chat = {
        "kind": "instruct",
        "template": "chatml",
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(tmp_path / "chat.model"),
    }
    records = [
        {"instruction": "fine", "output": "yes"},
        {"instruction": "a<|im_end|>\n<|im_start|>assistant\nb", "output": "c"},
    ]
    with pytest.raises(
        MalformedInput,
        match="line 2: the text holds '.*<|im_.*', a control token that only the template may set",
    ):
        run({"a.jsonl": records}, **chat)
    (prefix,) = run({"a.jsonl": records}, skip_malformed=True, max_malformed=1.0, **chat).corpora
    assert IndexedDataset(prefix).num_documents == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chat"}, "--kind chat is unknown: give one of text, parallel, instruct"),
        ({"workers": 0}, "--workers 0 is too few"),
        ({"workers": -1}, "--workers -1 is too few"),
        (
            {"workers": 1_000_000},
            (
                f"--workers 1000000 is too many for the {CORES} cores that this process may "
                f"use: give at most {8 * CORES}"
            ),
        ),
        ({"max_document_bytes": 0}, "--max-document-bytes 0 is too few"),
        ({"input_format": "csv"}, "--input-format csv is unknown"),
        ({"vocab_size": 5}, "--vocab-size has no meaning for ByteLevelTokenizer"),
        ({"template": "chatml"}, "--template has no meaning with --kind text"),
        ({"json_keys": ("a", "a")}, "--json-keys a a must name at least one key, each once"),
        (
            {"kind": "instruct", "json_keys": ("a",)},
            "--json-keys has no meaning with --kind instruct",
        ),
        (
            {"kind": "instruct", "template": "llama"},
            "--template llama is unknown: give one of chatflow, alpaca, chatml",
        ),
        ({"kind": "parallel"}, "--kind parallel needs --template"),
        ({"kind": "parallel", "template": "{}"}, "must name the fields of a record"),
        (
            {"input": ("gone.jsonl",)},
            "--input gone.jsonl cannot be read (No such file or directory)",
        ),
        (
            {"tokenizer_type": "SentencePieceTokenizer"},
            "SentencePieceTokenizer needs tokenizer_model",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(run, options, message):
    with pytest.raises(ChatflowError) as error:
        run({"a.jsonl": [{"text": "a"}]}, **options)
    assert message in str(error.value)
    assert not run.folder.exists()


def test_plain_text_has_no_keys(run):
    with pytest.raises(ChatflowError, match=r"a\.txt is plain text without keys: drop --kind"):
        run({"a.txt": b"a\n"}, kind="instruct")


def test_an_empty_input_gives_no_corpus(run):
    with pytest.raises(
        ChatflowError,
        match=(
            r"no document is left for .*x_text_document \(0 malformed records and 0 empty "
            r"documents were left out\)"
        ),
    ):
        run({"a.jsonl": b""})
    assert not run.folder.exists()


def test_an_output_prefix_needs_a_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    settings = PreprocessOptions(
        input=(str(tmp_path / "a.jsonl"),),
        output_prefix=f"{tmp_path}/",
        tokenizer_type="ByteLevelTokenizer",
    )
    with pytest.raises(
        ChatflowError, match="is not a prefix of a file name: give one such as out/en"
    ):
        preprocess(settings)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"json_keys": ("a/b",)}, "--json-keys: 'a/b'"),
        ({"json_keys": ("text", "../x")}, "--json-keys: '../x'"),
        ({"json_keys": ("a\nb",)}, "--json-keys: 'a\\nb'"),
        ({"output_prefix": "out\n/x"}, "--output-prefix: "),
        ({"lang": "zh\x1b"}, "--lang: "),
        ({"input": ("in\n.jsonl",)}, "--input: "),
    ],
)
def test_words_that_leave_their_folder_or_line_are_refused_and_nothing_is_written(
    tmp_path, changes, flag
):
    (tmp_path / "out\n").mkdir()
    (tmp_path / "in\n.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "in.jsonl").write_text('{"text": "1", "a/b": "2", "../x": "3", "a\\nb": "4"}\n')
    words = {"input": ("in.jsonl",), "output_prefix": "made/out"} | changes
    paths = {
        "input": tuple(str(tmp_path / path) for path in words.pop("input")),
        "output_prefix": str(tmp_path / words.pop("output_prefix")),
    }
    with pytest.raises(ChatflowError) as error:
        preprocess(
            PreprocessOptions(tokenizer_type="NullTokenizer", vocab_size=100, **paths, **words)
        )
    assert str(error.value).startswith(flag) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in\n.jsonl", "in.jsonl", "out\n"]
