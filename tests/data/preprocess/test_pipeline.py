"""Text to `.bin/.idx`."""

import gzip
import hashlib
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
from tests.data.preprocess.samples import EOS, TEXTS, documents

CORES = len(os.sched_getaffinity(0))


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


def test_an_older_corpus_stays_until_a_new_one_is_complete(run):
    run({"a.jsonl": [{"text": "old"}]})
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(MalformedInput):
        run({"a.jsonl": b"nonsense"})
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    (prefix,) = run({"a.jsonl": [{"text": "new"}]}).corpora
    assert documents(prefix) == ["new"]


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
