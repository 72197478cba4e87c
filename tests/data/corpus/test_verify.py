"""The slow check of an entire corpus."""

import importlib
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import IndexedDataset, Manifest, verify, write_manifest
from megatron_chatflow.errors import ChatflowError

LENGTHS = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=8)


@given(LENGTHS)
@settings(max_examples=30)
def test_a_valid_corpus_has_no_error(write_numbered, lengths):
    assert verify(write_numbered(lengths)) == []
    assert (
        verify(
            write_numbered(lengths, [[i % 2 for i in range(len(document))] for document in lengths])
        )
        == []
    )


def change(prefix, suffix, offset, value):
    with open(prefix + suffix, "r+b") as file:
        file.seek(offset)
        file.write(value)


@pytest.mark.parametrize(
    ("suffix", "offset", "value", "named"),
    [
        (".idx", 34, struct.pack("<i", -3), "sequence 0 has a negative length"),
        (".idx", 34, struct.pack("<i", 1), "sequence 1 does not start"),
        (".idx", 34 + 12 + 8, struct.pack("<q", 4), "sequence 1 does not start"),
        (".idx", 34 + 36 + 8, struct.pack("<q", 9), "document 1 ends before"),
        (".idx", 34 + 36 + 24 + 1, b"\x05", "sequence 1 has mode 5"),
        (".bin", 8, struct.pack("<i", -7), "token 2 is -7"),
        (".bin", 8, struct.pack("<i", 90), "token 2 is 90, outside the vocabulary of 50"),
    ],
)
def test_each_error_is_found_and_named(write_numbered, suffix, offset, value, named):
    prefix = write_numbered([[3, 4], [5]], [[1, 0], [0]])
    dataset = IndexedDataset(prefix)
    write_manifest(
        prefix,
        Manifest(
            tokenizer={"type": "t", "name": "n", "hash": "h", "vocab_size": 50, "eod": 0},
            dtype="int32",
            documents=dataset.num_documents,
            tokens=dataset.num_tokens,
            bytes=1,
            sources=["x"],
            append_eod=False,
            conversations=True,
        ),
    )
    assert verify(prefix) == []
    change(prefix, suffix, offset, value)
    (error,) = verify(prefix)
    assert named in error and prefix in error


def test_a_corpus_is_checked_in_pieces_as_at_once(write_numbered, monkeypatch):
    lengths = [[i % 5, 2] for i in range(20)]
    prefix = write_numbered(lengths, [[1, 0]] * 20)
    monkeypatch.setattr(
        importlib.import_module("megatron_chatflow.data.corpus.verify"), "_CHUNK", 3
    )
    assert verify(prefix) == []
    change(prefix, ".idx", 34 + 40 * 4 + 31 * 8, struct.pack("<q", 0))
    change(prefix, ".idx", 34 + 40 * 12 + 16 * 8, struct.pack("<q", 99))
    change(prefix, ".idx", 34 + 40 * 12 + 21 * 8 + 35, b"\x07")
    change(prefix, ".bin", 4 * 50, struct.pack("<i", -1))
    found = " ".join(verify(prefix))
    for named in (
        "sequence 31 does not",
        "document 16 ends",
        "sequence 35 has mode 7",
        "token 50 is -1",
    ):
        assert named in found


def test_surplus_tokens_are_found(write_numbered):
    prefix = write_numbered([[3]])
    with open(prefix + ".bin", "ab") as file:
        file.write(np.int32(1).tobytes())
    assert verify(prefix) == [f"corpus {prefix}: the sequences end at byte 12, the .bin at 16"]


def test_a_corpus_that_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(ChatflowError, match="does not exist"):
        verify(os.path.join(tmp_path, "a"))
