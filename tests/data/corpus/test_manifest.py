"""The manifest of a corpus."""

import dataclasses
import json
import os
import zlib

import pytest

from megatron_chatflow.data import Manifest, read_manifest, write_manifest
from megatron_chatflow.data.corpus.manifest import file_crc32
from megatron_chatflow.errors import ChatflowError

MANIFEST = Manifest(
    tokenizer={
        "type": "SentencePieceTokenizer",
        "name": "中文.model",
        "hash": "ab",
        "vocab_size": 8000,
        "eod": 2,
    },
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


def test_checksums_are_kept_where_there_are_any(tmp_path):
    with_checksums = dataclasses.replace(MANIFEST, crc32={"bin": "00000000", "idx": "0123abcd"})
    write_manifest(tmp_path / "a", with_checksums)
    assert read_manifest(tmp_path / "a") == with_checksums
    write_manifest(tmp_path / "a", MANIFEST)
    assert "crc32" not in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


def test_the_checksum_of_a_file_is_that_of_its_bytes_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_chatflow.data.corpus.manifest._CHUNK", 7)
    (tmp_path / "a").write_bytes(bytes(range(100)))
    assert file_crc32(str(tmp_path / "a")) == f"{zlib.crc32(bytes(range(100))):08x}"


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
        (
            {"tokenizer": dict(MANIFEST.tokenizer) | {"vocab_size": "8000"}},
            "'8000' under `tokenizer`, `vocab_size`",
        ),
        ({"bytes": -1}, "-1 under `bytes`"),
        ({"crc32": "ab"}, "`crc32`"),
        ({"crc32": {"bin": "00000000"}}, "`crc32`"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(tmp_path, change, named):
    (tmp_path / "a.json").write_text(json.dumps(dataclasses.asdict(MANIFEST) | change))
    with pytest.raises(ChatflowError, match=named) as caught:
        read_manifest(tmp_path / "a")
    assert "a.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokens": 3}', "\ud800"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ChatflowError, match="a.json"):
        read_manifest(tmp_path / "a")
