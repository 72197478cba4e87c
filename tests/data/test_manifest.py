"""The manifest beside a corpus."""

import dataclasses
import json
import os

import pytest

from megatron_chatflow.data import Manifest, read_manifest, write_manifest

MANIFEST = Manifest(
    tokenizer={"type": "SentencePieceTokenizer", "name": "中文.model", "hash": "ab", "vocab_size": 8000, "eod": 2},
    dtype="uint16",
    documents=3,
    tokens=40,
    bytes=120,
    sources=["a.jsonl", "b.jsonl"],
    append_eod=True,
    conversations=False,
)


def test_what_is_written_is_read_back(tmp_path):
    write_manifest(tmp_path / "a", MANIFEST)
    assert read_manifest(tmp_path / "a") == MANIFEST
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_corpus_of_megatron_has_none(tmp_path):
    assert read_manifest(tmp_path / "a") is None


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_manifest(tmp_path / "a", MANIFEST)
    with pytest.raises(TypeError):
        write_manifest(tmp_path / "a", dataclasses.replace(MANIFEST, sources=[object()]))
    assert read_manifest(tmp_path / "a") == MANIFEST
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": "many"}, "`tokens`"),
        ({"documents": True}, "`documents`"),
        ({"colour": 1}, "unknown key `colour`"),
        ({"dtype": None}, "`dtype`"),
        ({"tokenizer": {"type": "x"}}, "lacks `name` under `tokenizer`"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(tmp_path, change, named):
    (tmp_path / "a.json").write_text(json.dumps(dataclasses.asdict(MANIFEST) | change))
    with pytest.raises(ValueError, match=named) as caught:
        read_manifest(tmp_path / "a")
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokens": 3}', "\ud800"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="a.json"):
        read_manifest(tmp_path / "a")
