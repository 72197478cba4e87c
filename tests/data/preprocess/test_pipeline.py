"""Text to `.bin/.idx`."""

import gzip
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from megatron_chatflow.data import IndexedDataset, read_manifest
from megatron_chatflow.data.corpus.verify import verify
from megatron_chatflow.data.preprocess.options import PreprocessOptions
from megatron_chatflow.data.preprocess.pipeline import preprocess
from megatron_chatflow.data.preprocess.summary import MalformedInput
from megatron_chatflow.errors import ChatflowError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.long_text import PIECE

TEXTS = [
    "All human beings are born free and equal in dignity and rights.",
    "人人生而自由,在尊严和权利上一律平等。",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน\r\nสอง\u2028บรรทัด",
    "</s> is text, and so are \u2581 and 👩‍👩‍👧‍👦",
]
EOS = 2
CORES = len(os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    content = io.BytesIO()
    options = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 3,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=content, **options
    )
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(content.getvalue())
    return path


@pytest.fixture
def run(tmp_path):
    """A function: files (name -> bytes, or records that become JSON lines) and settings -> summary;
    bytes by default.
    """

    def go(files, **options):
        for name, content in files.items():
            lines = (
                content
                if isinstance(content, bytes)
                else "".join(
                    json.dumps(record, ensure_ascii=False) + "\n" for record in content
                ).encode()
            )
            (tmp_path / name).write_bytes(lines)
        options = {
            "tokenizer_type": "ByteLevelTokenizer",
            "input": tuple(str(tmp_path / name) for name in files),
        } | options
        return preprocess(PreprocessOptions(output_prefix=str(tmp_path / "out" / "x"), **options))

    go.folder = tmp_path / "out"
    return go


def documents(prefix):
    dataset = IndexedDataset(prefix)
    return [
        bytes(i for i in dataset.document(n) if i < 256).decode()
        for n in range(dataset.num_documents)
    ]


@pytest.mark.parametrize("append_eod", [False, True])
def test_megatron_reads_the_ids_that_the_library_gives(run, model, append_eod):
    spm = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
    summary = run({"a.jsonl": [{"text": text} for text in TEXTS]}, append_eod=append_eod, **spm)
    (prefix,) = summary.corpora
    assert prefix == str(run.folder / "x_text_document")
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dataset = MegatronDataset(prefix)
    assert dataset.index.dtype == np.uint16
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        library.encode(text) + [EOS] * append_eod for text in TEXTS
    ]
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert verify(prefix) == []


def test_a_large_vocabulary_is_written_as_int32(run):
    (prefix,) = run(
        {"a.jsonl": [{"text": "65535 70000 1"}]}, tokenizer_type="NullTokenizer", vocab_size=70001
    ).corpora
    dataset = MegatronDataset(prefix)  # held: its arrays die with it
    assert dataset[0].tolist() == [65535, 70000, 1]
    assert IndexedDataset(prefix).dtype == np.int32


def test_each_key_becomes_a_corpus(run):
    summary = run(
        {"a.jsonl": [{"text": "body", "title": "head"}, {"text": "only body", "title": ""}]},
        json_keys=("text", "title"),
    )
    assert list(summary.corpora) == [
        str(run.folder / "x_text_document"),
        str(run.folder / "x_title_document"),
    ]
    assert [documents(prefix) for prefix in summary.corpora] == [["body", "only body"], ["head"]]
    assert summary.empty == 1


def test_parallel_text_is_put_together_by_the_template(run):
    records = [{"en": "Hello {zh}", "zh": "你好", "level": 3}]
    (prefix,) = run({"a.jsonl": records}, kind="parallel", template="{en}\\n{{}}\t{zh}").corpora
    assert prefix == str(run.folder / "x_text_document")
    assert documents(prefix) == ["Hello {zh}\n{}\t你好"]


def test_conversations_have_modes_that_megatron_reads(run):
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (prefix,) = run(
        {"a.jsonl": [{"messages": messages}, {"instruction": "I", "output": "O"}]}, kind="instruct"
    ).corpora
    assert prefix == str(run.folder / "x_document")
    dataset = MegatronDataset(prefix, multimodal=True)
    bos, eod = [257], [256]
    ask = [*b"### Instruction:", *b"I", *b"### Response:"]
    expected = [
        (bos + [*b"S### Instruction:U### Response:"], 1), ([*b"A"] + eod, 0),
        ([*b"### Instruction:V### Response:"], 1), ([*b"B"] + eod, 0),
        (bos + ask, 1), ([*b"O"] + eod, 0),
    ]  # fmt: skip
    assert [(dataset[i][0].tolist(), int(dataset[i][1])) for i in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == [0, 4, 6]
    manifest = read_manifest(prefix)
    assert (
        manifest.conversations
        and manifest.append_eod
        and manifest.sources[0]["template"] == "chatflow"
    )
    assert verify(prefix) == []


@pytest.mark.parametrize("kind", ["text", "instruct"])
def test_the_output_does_not_depend_on_the_number_of_workers(run, model, kind):
    number = 6000 if kind == "text" else 1500  # several chunks
    records = [
        {
            "text": f"{i} {TEXTS[i % 5]}" * (1 + i % 3),
            "instruction": str(i),
            "output": TEXTS[i % 5] * 4,
        }
        for i in range(number)
    ]
    written = []
    for workers in (1, 3):
        spm = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}
        run({"a.jsonl": records, "b.jsonl": records[:7]}, kind=kind, workers=workers, **spm)
        written.append({path.name: path.read_bytes() for path in run.folder.iterdir()})
    assert len(written[0]) == 3
    assert written[0] == written[1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=30) | st.sampled_from(TEXTS), min_size=1, max_size=20),
    ascii_only=st.booleans(),
    zipped=st.booleans(),
)
def test_any_text_comes_back_from_the_corpus(run, texts, ascii_only, zipped):
    lines = "".join(
        json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts
    ).encode()
    kept = [text for text in texts if text]
    files = {"a.jsonl": gzip.compress(lines) if zipped else lines}
    if not kept:
        with pytest.raises(ChatflowError, match="no document is left"):
            run(files)
        return
    (prefix,) = run(files, append_eod=True).corpora
    assert documents(prefix) == kept
    manifest = read_manifest(prefix)
    size = sum(len(text.encode()) for text in kept)
    assert (manifest.documents, manifest.tokens, manifest.bytes) == (
        len(kept),
        size + len(kept),
        size,
    )


def test_the_manifest_says_what_was_read_and_how(run):
    content = b'{"text": "a"}\nnonsense\n{"text": ""}\n'
    summary = run(
        {"a.jsonl": content, "b.jsonl": [{"text": "é"}]},
        skip_malformed=True,
        max_malformed=1.0,
        append_eod=True,
        lang="hungarian",
    )
    (prefix,) = summary.corpora
    manifest = read_manifest(prefix)
    assert manifest == summary.corpora[prefix]
    assert manifest.tokenizer == load_tokenizer("ByteLevelTokenizer").identity()
    assert (manifest.dtype, manifest.documents, manifest.tokens, manifest.bytes) == (
        "uint16",
        2,
        5,
        3,
    )
    assert manifest.append_eod and not manifest.conversations
    how = {"kind": "text", "lang": "hungarian"}
    first = {
        "name": "a.jsonl",
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "malformed": 1,
        "empty": 1,
    }
    assert manifest.sources[0] == first | how
    assert (
        manifest.sources[1]["name"],
        manifest.sources[1]["malformed"],
        manifest.sources[1]["empty"],
    ) == ("b.jsonl", 0, 0)


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


def test_byte_order_marks_windows_line_ends_and_blank_lines_are_no_text(run):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}'
    (prefix,) = run({"a.jsonl": content, "b.txt": b"\xef\xbb\xbfone\r\n\n two \n"}).corpora
    assert documents(prefix) == ["a", "b", "one", " two "]


def test_a_very_long_line_is_a_document_like_any_other(run):
    text = "long é " * 120_000
    (prefix,) = run({"a.jsonl": [{"text": "a"}, {"text": text}, {"text": "b"}]}, workers=2).corpora
    assert documents(prefix) == ["a", text, "b"]


@pytest.mark.parametrize("kind", ["text", "instruct"])
def test_documents_encoded_in_pieces_have_the_tokens_of_the_text(run, model, kind):
    text = " ".join(TEXTS) * 2500
    assert len(text) > 2 * PIECE
    records = [
        {"text": text, "instruction": text, "output": text},
        {"text": "a", "instruction": "b", "output": "c"},
    ]
    spm = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(model),
        "append_eod": True,
    }
    (prefix,) = run({"a.jsonl": records}, kind=kind, **spm).corpora
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    dataset = IndexedDataset(prefix)
    expected = (
        library.encode(text)
        if kind == "text"
        else library.encode(f"### Instruction:{text}### Response:")
    )
    assert dataset.sequence(0).tolist() == [1] * (kind == "instruct") + expected + [EOS] * (
        kind == "text"
    )
    if kind == "instruct":
        assert dataset.sequence(1).tolist() == [*library.encode(text), EOS]
    assert verify(prefix) == []


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


def test_an_older_corpus_stays_until_a_new_one_is_complete(run):
    run({"a.jsonl": [{"text": "old"}]})
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(MalformedInput):
        run({"a.jsonl": b"nonsense"})
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    (prefix,) = run({"a.jsonl": [{"text": "new"}]}).corpora
    assert documents(prefix) == ["new"]


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
    with pytest.raises(ChatflowError, match="is no prefix of a file name: give one such as out/en"):
        preprocess(settings)


def test_progress_reports_documents_bytes_and_the_share_that_is_done(tmp_path):
    Path(tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": "x" * 1000}) for _ in range(1000))
    )
    seen = []
    settings = PreprocessOptions(
        input=(str(tmp_path / "a.jsonl"),),
        output_prefix=str(tmp_path / "x"),
        tokenizer_type="ByteLevelTokenizer",
        log_interval=100,
    )
    preprocess(settings, seen.append)
    assert len(seen) > 2
    assert all(
        before.documents < after.documents and before.done < after.done
        for before, after in zip(seen, seen[1:], strict=False)
    )
    assert (seen[-1].documents, seen[-1].bytes, seen[-1].done) == (1000, 1_000_000, 1.0)
